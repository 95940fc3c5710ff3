"""Pipelines that draw classes, called as those that draw prompts are."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any

from diffusers import DiTPipeline
from torch import Tensor

from obsdiff.families import dit
from obsdiff.instead import instead


def call(pipeline: DiTPipeline) -> Callable[..., Any]:
    """The pipeline's call with the arguments and results that others have."""
    return partial(_draw, pipeline)


def _draw(
    pipeline: DiTPipeline,
    *,
    class_labels: Tensor | None = None,
    prompt: str | Sequence[str] = (),
    num_images_per_prompt: int = 1,
    output_type: str = "pil",
    callback: Callable[[int, Any, Tensor], None] | None = None,
    **told: Any,
) -> Any:
    """Draws.

    Args:
        pipeline: it draws one size, whatever it is told.
        class_labels: numbers of classes, (n,).
        prompt: classes by name or number, where there are no `class_labels`.
        num_images_per_prompt: of each prompt.
        output_type: as of others: "latent" gives (latents,), (n, ...), and decodes nothing.
        callback: told of each call of the denoiser: which, at what timestep, and the latents after it, (n, ...).
        **told: arguments that all calls have.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    known = dit.labels_of(pipeline)
    given = [known.number(text) for text in prompts for _ in range(num_images_per_prompt)]
    numbers = given if class_labels is None else class_labels.tolist()
    same = {name: value for name, value in told.items() if name not in ("height", "width")}
    last: list[Tensor] = []

    def note(call: int, timestep: Any, latents: Tensor) -> None:
        last[:] = [latents[: len(numbers)]]  # under guidance they stand there twice
        if callback is not None:
            callback(call, timestep, last[0])

    with ExitStack() as stack:
        stack.enter_context(instead(pipeline.scheduler, "step", _noted(pipeline.scheduler.step, note)))
        if output_type != "latent":
            return pipeline(class_labels=numbers, output_type=output_type, **same)
        stack.enter_context(instead(pipeline, "vae", _Undecoding()))
        pipeline(class_labels=numbers, output_type="pt", **same)
    return (last[0],)


class _Undecoding:
    """Stands for a VAE whose pictures nobody wants."""

    config = SimpleNamespace(scaling_factor=1.0)

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=latents)


def _noted(step: Callable[..., Any], note: Callable[[int, Any, Tensor], None]) -> Callable[..., Any]:
    """A scheduler's step that tells of the latents after each call, counted from 0."""
    calls = 0

    def noted(output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        nonlocal calls
        found = step(output, timestep, sample, **options)
        note(calls, timestep, found.prev_sample)
        calls += 1
        return found

    return noted
