"""What there is to choose for a call beside prompt, steps and seed; for whoever shows it, such as the server."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What makes a difference to a pipeline's pictures; the rest it refuses, or has no use for.

    Attributes:
        negative_prompt, guidance_scale, guidance_scale_2: whether these do.
        size_step: height and width are multiples of it; None where there is one size alone.
        frame_step: films have one frame and a multiple of this behind it; None where pictures are drawn.
        pictures: that it is told, the least and the most; None instead of the most where there is no limit.
        changes: whether it changes the picture that it is told, by a strength, and all of it or what a mask says.
        control: whether a picture can steer it; see controls.py.
        classes: what each is called, by number, with commas between several names; None where prompts are text.
    """

    negative_prompt: bool
    guidance_scale: bool
    guidance_scale_2: bool
    size_step: int | None
    frame_step: int | None
    pictures: tuple[int, int | None]
    changes: bool
    control: bool
    classes: tuple[str, ...] | None
