"""Pipelines as the runtime samples them: what a module of this folder says of each.

Shapes: n prompts, t text tokens, d width of a text token, p pooled width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from numpy.typing import NDArray

from obsdiff_runtime import openings
from obsdiff_runtime.autoencoder import FRAME_SCALE
from obsdiff_runtime.fills import Fill
from obsdiff_runtime.films import FPS
from obsdiff_runtime.networks import Array, Networks
from obsdiff_runtime.openings import MEAN, Given
from obsdiff_runtime.references import References, Sides
from obsdiff_runtime.seeing import Seen

PACKED: Final = 2  # latent pixels a side of a token, which the pipeline packs; the denoiser's patch_size is 1
IS_DISTILLED: Final = "is_distilled"  # in the index of a pipeline whose steps are distilled: it takes no guidance
PROMPT_TEMPLATE: Final = "prompt_template"  # in the configuration of a chat model that encodes: what is around a prompt
EXAMPLE: Final = "a large red circle above a small blue square"
"""A prompt that all draw that read text."""
Conditions = dict[str, NDArray[Any]]
"""By input of the denoiser; float32, but for the numbers of classes, int64."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a call resolved to; nothing in it is a default any more."""

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int
    num_frames: int | None = None  # of a film
    guided: bool  # each image is run twice, the first time on its negative prompt
    skipped_steps: int = 0
    strength: float = 1.0  # share of its noise levels that the scheduler spaces the steps over
    eta: float = 0.0  # how much noise the scheduler adds at each step
    guidance_scale_2: float | None = None  # of the denoisers behind the first, where some take turns
    references: tuple[Sides, ...] = ()  # pictures that the denoiser is told
    seen: tuple[Seen, ...] = ()  # the same, where the text encoder looks at them, too

    def scale_of(self, *, first: bool) -> float:
        """The guidance scale of the first denoiser, or of one behind it."""
        return self.guidance_scale if first or self.guidance_scale_2 is None else self.guidance_scale_2


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A pipeline as the loop sees it.

    Attributes:
        denoiser: component that is called at each step.
        noisy: its input for latents.
        predicted: its output.
        encode: conditions of one prompt each, (n, ...), by input of the denoiser; told the prompts and whether they
            are the negative ones.
        patch: pixels of the latent that the denoiser cannot split, from its config.
        channels: of the latents, from the denoiser's config.
        largest: largest latent side the denoiser takes, from its config; None where there is no limit.
        skipped: steps of so many that are left out where an image is changed by a strength; None where the scheduler
            spaces all of them over the noise levels that the strength leaves.
        only: the one latent side it draws, from its config; None where it draws others.
        negatives: whether guidance runs an image on its negative prompt too, unless the denoiser is told its scale.
        unguided: the scale up to which there is no such guidance. It is 0 where diffusers' pipeline means by its scale
            how much is added, which is one less than what others mean.
        draws_classes: whether prompts are names or numbers of classes, so that a negative one can but be empty.
        example: a prompt that it can draw.
        even_sigmas: whether diffusers' pipeline gives the scheduler its noise levels; see `make_scheduler`.
        levels: what diffusers' pipeline gives the scheduler instead, from the steps; see `make_scheduler`.
        scheduler: diffusers class of the only one whose timesteps its denoiser knows; None where there are others.
        shift: mu of a shift that depends on the image's tokens and the steps, where the pipeline says it and not the
            scheduler.
        counted: what a schedule that depends on the image's tokens is told; from the latents' channels and the tokens.
        kept_lengths: lengths of parts of (c, h, w) latents, which what guidance gives takes from what the prompt alone
            gives; they broadcast to (c, h, w). None where it does not.
        references: how the denoiser is told pictures; None where it is told none.
        opens: whether films begin with a picture, which the denoiser is told; see openings.py.
        fills: how the denoiser is told what stays of a picture of which a part is drawn anew, where it has channels for
            that; None where nothing is.
        controls: whether a ControlNet steers the denoiser, in its graph; see controls.py.
        masks: whether films can begin with a picture, whose latents stand in place of what is drawn.
        given: how they do.
        told_of_frames: inputs of the denoiser that are of a film's latent frames, (f, ...), from their number.
        fps: frames a second, of films.
        frame_scale: frames of a film in a latent frame behind the first, where there is no autoencoder to ask.
    """

    denoiser: str = "transformer"
    noisy: str = "hidden_states"
    predicted: str = "out_hidden_states"
    encode: Callable[[Networks, Sequence[str], bool, Settings], Conditions]
    patch: Callable[[Mapping[str, Any]], int] = lambda config: int(config["patch_size"])
    largest: Callable[[Mapping[str, Any]], int | None] = lambda config: None
    only: Callable[[Mapping[str, Any]], int | None] = lambda config: None
    skipped: Callable[[int, float], int] | None
    channels: Callable[[Mapping[str, Any]], int] = lambda config: int(config["in_channels"])
    negatives: bool = True
    unguided: float = 1.0
    draws_classes: bool = False
    example: str = EXAMPLE
    even_sigmas: bool = False
    levels: Callable[[int], Array] | None = None
    scheduler: str | None = None
    shift: Callable[[int, int], float] | None = None
    counted: Callable[[int, int], int] = lambda channels, tokens: tokens
    kept_lengths: Callable[[Array], Array] | None = None
    references: References | None = None
    opens: bool = False
    fills: Fill | None = None
    controls: bool = False
    masks: bool = False
    given: Given = MEAN
    told_of_frames: Mapping[str, Callable[[int], Array]] = field(default_factory=dict)
    fps: float = FPS
    frame_scale: int = FRAME_SCALE

    def ends(self, config: Mapping[str, Any]) -> bool:
        """Whether films have to end with a picture, too, from the denoiser's config."""
        return self.opens and openings.ends(config)

    def usual_scale(self, guidance_scale: float) -> float:
        """The pipeline's scale as most count it: 1 is what the prompt alone gives."""
        return guidance_scale + (1 - self.unguided)


def packed_channels(config: Mapping[str, Any]) -> int:
    """Of latents whose tokens the pipeline packs, from the denoiser's config."""
    return int(config["in_channels"]) // PACKED**2


def drawn_channels(config: Mapping[str, Any]) -> int:
    """That a denoiser gives, which may be told others beside."""
    return int(config.get("out_channels") or config["in_channels"])


def skipped_part(steps: int, strength: float) -> int:
    """Steps that are left out, rounded down."""
    return int(steps - steps * strength)


def skipped_whole(steps: int, strength: float) -> int:
    """Steps that are left out, rounded up: those that are taken are whole ones."""
    return steps - int(steps * strength)
