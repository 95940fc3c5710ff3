"""Runs of a pipeline for comparison: the noise is fixed, the denoiser is watched, nothing may stop being finite.

    B       prompts in a batch
    rows    of a denoiser call: B, or a multiple of it where guidance stacks negative and positive prompts

A scheduler may call the denoiser more than once per step; the calls of a step count together.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor, nn

from obsdiff import calls, pictures
from obsdiff.families import Family, guided, parts
from obsdiff.metrics import Picture
from obsdiff.recipe import Sampling
from obsdiff.residuals import BlockErrors, Clock, block_modules
from obsdiff_runtime.errors import CalibrationError, QualityError
from obsdiff_runtime.progress import Progress

SHOWN: Final = 4
"""Frames of a film that are looked at, the first and the last among them."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts, the seeds of their noise, and their embeddings as arguments of the pipeline's call, (B, ...) each."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    text: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Tell:
    """Progress of one run of the sampler, `before` steps of all runs being done."""

    progress: Progress
    before: int
    total: int
    stage: str = "evaluate"

    def __call__(self, step: int, note: str) -> None:
        self.progress(self.stage, self.before + step, self.total, note)


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A dense run, and what the pruned denoiser made of the same inputs.

    Attributes:
        velocity_errors: (B, steps) float64.
        block_errors: (blocks, B, steps) float64; see residuals.py.
        latents: the dense pipeline's final ones, (B, ...).
        images: its pictures.
    """

    velocity_errors: Tensor
    block_errors: Tensor
    latents: Tensor
    images: list[Picture]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A denoiser before and after."""

    dense: nn.Module
    pruned: nn.Module


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Runs the pipeline on a batch with one denoiser or another.

    Attributes:
        behind: the dense and the pruned one of those that take their turns behind it, by name.
    """

    pipeline: DiffusionPipeline
    family: Family
    sampling: Sampling
    behind: Mapping[str, Pair] = field(default_factory=dict)

    def watched(self, batch: Batch, dense: nn.Module, pruned: nn.Module, tell: Tell) -> Watched:
        """Runs the dense denoiser and gives its very inputs to the pruned one too."""
        prompts, steps, clock = len(batch.prompts), self.sampling.num_inference_steps, Clock()
        velocities = VelocityErrors(prompts, steps, clock)
        blocks = BlockErrors(block_modules(self.family.linears(dense)), prompts, steps, clock)

        def compare(pair: Pair, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            found = {"dense": output, "pruned": pair.pruned(*args, **kwargs)}
            dense_velocity, pruned_velocity = (
                _finite(velocity_of(dense, each, kwargs), who, clock.step, batch.prompts) for who, each in found.items()
            )
            velocities.add(dense_velocity, pruned_velocity)

        with ExitStack() as stack:
            for pair in (Pair(dense=dense, pruned=pruned), *self.behind.values()):
                stack.enter_context(blocks.watching(pair.dense, pair.pruned))
                hook = partial(lambda pair, _, *called: compare(pair, *called), pair)
                stack.callback(pair.dense.register_forward_hook(hook, with_kwargs=True).remove)
            latents, images = self._run("dense", batch, dense, tell, clock)
        return Watched(
            velocity_errors=velocities.curve(batch.prompts),
            block_errors=blocks.curves(batch.prompts),
            latents=latents,
            images=images,
        )

    def plain(
        self, batch: Batch, denoiser: nn.Module, tell: Tell, *, who: Literal["dense", "pruned"] = "pruned"
    ) -> tuple[Tensor, list[Picture]]:
        """Final latents (B, ...) and pictures with one denoiser; `who` it is, for messages."""
        return self._run(who, batch, denoiser, tell, Clock())

    def _run(
        self, who: Literal["dense", "pruned"], batch: Batch, denoiser: nn.Module, tell: Tell, clock: Clock
    ) -> tuple[Tensor, list[Picture]]:
        order, steps = int(getattr(self.pipeline.scheduler, "order", 1)), self.sampling.num_inference_steps
        last: list[Tensor] = []

        def after_call(i: int, latents: Tensor) -> None:
            step = min(i // order, steps - 1)
            last[:] = [_finite(latents, who, step, batch.prompts)]
            clock.step = min((i + 1) // order, steps - 1)
            tell(step + 1, who)

        device = self.pipeline.device
        with ExitStack() as stack:
            # A scheduler that draws noise of its own takes it from the global generator: the same for both runs.
            stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
            torch.manual_seed(batch.seeds[0])
            stack.enter_context(_swapped(self.pipeline, self.family.denoiser, denoiser))
            for name, pair in self.behind.items():
                stack.enter_context(_swapped(self.pipeline, name, getattr(pair, who)))
            images = calls.call(self.pipeline)(
                **call_of(self.pipeline, batch.text, batch.prompts, self.sampling),
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in batch.seeds],
                output_type="np",
                **telling(self.pipeline, after_call),
            )[0]  # images, or frames
        if not np.isfinite(images).all():
            where = f"after step {steps}, in the decoded picture"
            _refuse(who, where, _prompt_of(np.asarray(images), batch.prompts))
        return last[0].clone(), [_picture(image) for image in images]


def batches(sampler: Sampler, prompts: Sequence[str], negative: str) -> Iterator[Batch]:
    """The prompts in batches, embedded; `negative` is used where guidance is that knows it.

    Prompt i's noise comes from a generator seeded with the sampling's seed + i, whatever the batch size.
    """
    sampling = sampler.sampling
    denoiser = getattr(sampler.pipeline, sampler.family.denoiser)
    negatives = guided(sampler.family, denoiser, sampling.guidance_scale)
    for start in range(0, len(prompts), sampling.batch_size):
        texts = prompts[start : start + sampling.batch_size]
        unwanted = [negative] * len(texts) if negatives else []
        rows = range(start, start + len(texts))
        text = pictures.encode(sampler.pipeline, sampler.family, texts, unwanted, sampling, rows)
        yield Batch(prompts=texts, seeds=[sampling.seed + start + i for i in range(len(texts))], text=text)


def call_of(
    pipeline: DiffusionPipeline, text: Mapping[str, Tensor], prompts: Sequence[str], sampling: Sampling
) -> dict[str, Any]:
    """What the pipeline's call is told; the prompts themselves where `text`, which is embedded, is empty."""
    embedded = text.keys() != {pictures.ARGUMENT} and bool(text)
    told: dict[str, Any] = dict(text) if embedded else {"prompt": list(prompts), **text}
    if not embedded and sampling.max_sequence_length is not None:
        told["max_sequence_length"] = sampling.max_sequence_length
    return {
        **told,
        **in_steps(type(pipeline), sampling.num_inference_steps),
        parts.guidance_argument(type(pipeline)): sampling.guidance_scale,
        "height": sampling.height,
        "width": sampling.width,
        **({} if sampling.num_frames is None else {"num_frames": sampling.num_frames}),
        **({} if sampling.guidance_scale_2 is None else {"guidance_scale_2": sampling.guidance_scale_2}),
        **exactly(pipeline, embedded=embedded, pixels=sampling.height * sampling.width),
    }


def in_steps(pipeline_class: type[DiffusionPipeline], steps: int) -> dict[str, Any]:
    """Arguments by which a call takes so many steps.

    By default that of Sana-Sprint says when the second of two steps is, and refuses other numbers of them.
    """
    known = inspect.signature(pipeline_class.__call__).parameters
    between = {"intermediate_timesteps": None} if "intermediate_timesteps" in known and steps != 2 else {}
    return {"num_inference_steps": steps, **between}


def exactly(pipeline: DiffusionPipeline, *, embedded: bool, pixels: int) -> dict[str, Any]:
    """Arguments by which a call draws what it is asked for, so many pixels, whether its text is embedded or not.

    By default PixArt's calls rewrite a prompt, draw the nearest of the sizes they were trained on and scale it, and
    have an empty negative prompt, which excludes an embedded one. Qwen-Image's has none, and does not guide without.
    FLUX.1 Kontext's scale what is drawn to a megapixel.
    """
    known = inspect.signature(type(pipeline).__call__).parameters
    told: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False, "max_area": pixels}
    if embedded:
        told["negative_prompt"] = None
    elif parts.guidance_argument(type(pipeline)) != parts.GUIDANCE:
        told["negative_prompt"] = ""
    return {name: value for name, value in told.items() if name in known}


def telling(pipeline: DiffusionPipeline, after: Callable[[int, Tensor], None]) -> dict[str, Any]:
    """Arguments by which a call tells of its latents after each call of the denoiser, counted from 0.

    Pipelines with the older `callback` tell of whole steps only, where a step takes several calls.
    """
    if "callback_on_step_end" not in inspect.signature(type(pipeline).__call__).parameters:
        order = int(getattr(pipeline.scheduler, "order", 1))
        return {"callback": lambda step, _, latents: after((step + 1) * order - 1, latents)}

    def tell(_: DiffusionPipeline, call: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        after(call, values["latents"])
        return {}

    return {"callback_on_step_end": tell}


def _picture(drawn: NDArray[Any]) -> Picture:
    """What a call gives of a prompt, (height, width, 3); or a film's SHOWN frames, evenly spaced, one below the other.

    Args:
        drawn: (height, width, 3), or (frames, height, width, 3), between 0 and 1.
    """
    if drawn.ndim == 4:
        places = np.linspace(0, len(drawn) - 1, SHOWN).round().astype(int)
        drawn = np.concatenate(list(drawn[places]))
    picture: Picture = np.rint(drawn * 255).clip(0, 255).astype(np.uint8)
    return picture


def named(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a denoiser's call by their names."""
    found = inspect.signature(type(denoiser).forward).bind(denoiser, *args, **kwargs).arguments
    return {**{name: found[name] for name in list(found)[1:] if name != "kwargs"}, **found.get("kwargs", {})}


def velocity_of(denoiser: nn.Module, output: Any, arguments: Mapping[str, Any]) -> Tensor:
    """What the sampler reads of what a denoiser's call with these arguments gives, (rows, ...).

    It is the first thing; some give it as a list of rows, and PixArt's has a variance behind it, which is not read.
    Nor is what is given at tokens of pictures that it was told, or in place of which a film has given frames.
    """
    first = output[0] if isinstance(output, tuple) else output.sample
    velocity = torch.stack(list(first)) if isinstance(first, list) else first
    drawn = pictures.drawn(arguments)
    if drawn is not None:
        if velocity.ndim < 5:
            return velocity[:, drawn]
        return velocity[:, :, drawn.reshape(velocity.shape[2], -1)[:, 0]]  # whole frames
    channels = getattr(denoiser.config, "in_channels", None)
    learned = channels is not None and velocity.ndim == 4 and velocity.shape[1] == 2 * channels
    return velocity[:, :channels] if learned else velocity


class VelocityErrors:
    """Squared norms of v_pruned - v_dense and of v_dense, summed per prompt and step over calls and rows."""

    def __init__(self, prompts: int, steps: int, clock: Clock) -> None:
        self._clock = clock
        self._difference = torch.zeros(prompts, steps, dtype=torch.float64)
        self._dense = torch.zeros(prompts, steps, dtype=torch.float64)

    def add(self, dense: Tensor, pruned: Tensor) -> None:
        """Adds a call's outputs, (rows, ...) each; row r belongs to prompt r mod B."""
        prompts = len(self._dense)
        pairs = ((self._difference, pruned.double() - dense.double()), (self._dense, dense.double()))
        for total, value in pairs:
            energy = value.flatten(1).square().sum(1)  # (rows,)
            total[:, self._clock.step] += energy.view(-1, prompts).sum(0).cpu()

    def curve(self, prompts: Sequence[str]) -> Tensor:
        """|v_pruned - v_dense|^2 / |v_dense|^2, (B, steps)."""
        if not (self._dense > 0).all():
            row, step = (int(index) for index in torch.nonzero(self._dense == 0)[0])
            raise CalibrationError(
                f"step {step + 1}, prompt {prompts[row]!r}: the dense denoiser predicts exactly zero, so no"
                " relative error exists; is it trained?"
            )
        return self._difference / self._dense


def _finite(values: Tensor, who: str, step: int, prompts: Sequence[str]) -> Tensor:
    """The values, (rows, ...), if all are finite; raises if not, naming step and prompt."""
    if not torch.isfinite(values).all():
        _refuse(who, f"at step {step + 1}", _prompt_of(values.float().cpu().numpy(), prompts))
    return values


def _prompt_of(values: Any, prompts: Sequence[str]) -> str:
    row = int(np.argmin(np.isfinite(values.reshape(len(values), -1)).all(axis=1)))
    return prompts[row % len(prompts)]


def _refuse(who: str, where: str, prompt: str) -> None:
    if who == "dense":
        raise CalibrationError(
            f"the dense pipeline gives values that are not finite {where}, prompt {prompt!r}; are its weights finite?"
        )
    raise QualityError(
        f"the pruned pipeline gives values that are not finite {where}, prompt {prompt!r};"
        " prune less, or fewer layers with --exclude"
    )


@contextmanager
def _swapped(pipeline: DiffusionPipeline, name: str, module: nn.Module | None) -> Iterator[None]:
    """The pipeline with another network under this name, until the block ends."""
    original = getattr(pipeline, name)
    setattr(pipeline, name, module)
    try:
        yield
    finally:
        setattr(pipeline, name, original)


@contextmanager
def quiet(pipeline: DiffusionPipeline) -> Iterator[None]:
    """The pipeline without its progress bar and without a filter that blackens pictures, until the block ends."""
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    with ExitStack() as stack:
        stack.callback(lambda: pipeline.set_progress_bar_config(**before))
        pipeline.set_progress_bar_config(**{**before, "disable": True})
        if getattr(pipeline, "safety_checker", None) is not None:
            stack.enter_context(_swapped(pipeline, "safety_checker", None))
        yield
