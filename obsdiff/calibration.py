"""Runs the pipeline over prompts and collects a gram for every distinct input tensor.

The step index comes from the denoiser's own calls, so that schedulers which call it more than once a step are
weighted right. Prompt i has its own noise, seeded by seed + i, whatever the batch size and the rank that draws it.
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, SCMScheduler
from torch import Tensor, nn

from obsdiff import calls, offloading, padding, pictures, pointwise, ranks, turns
from obsdiff.core import timesteps
from obsdiff.core.gram import Gram, GramAccumulator
from obsdiff.families import Family, guided
from obsdiff.groups import LinearSpec
from obsdiff.padding import Masks
from obsdiff.recipe import Sampling
from obsdiff.sampling import call_of, named, quiet
from obsdiff_runtime.errors import CalibrationError
from obsdiff_runtime.progress import Progress, silent

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts, and pictures, as the pipeline's call takes them: (prompts, ...) on the CPU, encoded once."""

    texts: tuple[str, ...]
    embeddings: Mapping[str, Tensor]

    def batch(self, rows: range) -> dict[str, Tensor]:
        return {name: value[rows.start : rows.stop] for name, value in self.embeddings.items()}


@torch.no_grad()
def encode(
    pipeline: DiffusionPipeline, family: Family, texts: Sequence[str], sampling: Sampling, *, negative: str = ""
) -> Prompts:
    """Runs the text encoders once over all prompts, in batches, and the VAE over what pictures they are told with."""
    negatives = guided(family, getattr(pipeline, family.denoiser), sampling.guidance_scale)
    parts: list[dict[str, Tensor]] = []
    with offloading.borrowed(offloading.encoders(pipeline), pipeline.device):
        for rows in batches(len(texts), sampling.batch_size):
            chunk = texts[rows.start : rows.stop]
            unwanted = [negative] * len(chunk) if negatives else []
            parts.append(pictures.encode(pipeline, family, chunk, unwanted, sampling, rows))
    return Prompts(
        texts=tuple(texts), embeddings={name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
    )


def repeated(prompts: Prompts, times: int) -> Prompts:
    """The prompts several times over; each occurrence gets its own noise."""
    return Prompts(
        texts=prompts.texts * times,
        embeddings={name: torch.cat([value] * times) for name, value in prompts.embeddings.items()},
    )


def batches(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def sample(pipeline: DiffusionPipeline, prompts: Prompts, rows: range, sampling: Sampling, **overrides: Any) -> Tensor:
    """Final latents of some prompts, (rows, channels, height, width), and of films with frames before the height."""
    generators = [torch.Generator().manual_seed(sampling.seed + row) for row in rows]
    text = {name: value.to(pipeline.device) for name, value in prompts.batch(rows).items()}
    arguments: dict[str, Any] = {
        **call_of(pipeline, text, prompts.texts[rows.start : rows.stop], sampling),
        "generator": generators,
        "output_type": "latent",
    }
    latents: Tensor = calls.call(pipeline)(**(arguments | overrides))[0]  # images, or frames
    return latents


class StepIndex:
    """Which sampler step the denoiser is called for: 0 is the noisiest.

    Counts how often the timestep changes from one call to the next, so that two calls of one step (guidance in two
    passes) count once, and scales where a scheduler visits more timesteps than it was asked for steps (Heun).
    """

    def __init__(self, scheduler: Any, steps: int) -> None:
        self._scheduler = scheduler
        self._steps = steps
        self.restart()

    def restart(self) -> None:
        """Call before each run of the pipeline."""
        self._changes = -1
        self._last: float | None = None

    def advance(self, timestep: Tensor | float) -> int:
        """The step of a denoiser call with this timestep; where tokens have their own, with the last one's."""
        now = float(timestep.flatten()[-1]) if isinstance(timestep, Tensor) else float(timestep)
        if now != self._last:
            self._changes += 1
            self._last = now
        told = self._scheduler.timesteps.tolist()
        if isinstance(self._scheduler, SCMScheduler):
            told = told[:-1]  # where it ends
        visited = len(set(told))
        return min(self._changes * self._steps // max(visited, self._steps), self._steps - 1)


def calibrate(
    pipeline: DiffusionPipeline,
    family: Family,
    linears: Sequence[LinearSpec],
    prompts: Prompts,
    sampling: Sampling,
    *,
    time_weights: str,
    progress: Progress = silent,
    stage: str = "calibrate",
) -> dict[str, Gram]:
    """One calibration pass: a gram for each distinct input of `linears`.

    Args:
        pipeline: in eval mode; its denoiser's weights are read as they are.
        family: of the denoiser, or of one of those that take turns.
        linears: the layers of this package.
        prompts: encoded; conditional and unconditional rows both count, padding that is masked out does not.
        sampling: steps, guidance, size and seed.
        time_weights: a schedule of core.timesteps.
        progress: told after every denoiser call.
        stage: what progress calls this pass.

    Returns:
        LinearSpec.reads -> Gram, for every key in `linears`.

    Raises:
        CalibrationError: an activation is not finite (names layer, step and prompts), a layer saw no token, or
            two linears that should share an input do not.
        ConfigError: there are more ranks than batches of prompts.
    """
    if not prompts.texts:
        raise CalibrationError("no prompt to calibrate on; is --prompts-file empty?")
    denoiser: nn.Module = getattr(pipeline, family.denoiser)
    weights = timesteps.weights(time_weights, sampling.num_inference_steps).tolist()
    steps = StepIndex(pipeline.scheduler, sampling.num_inference_steps)
    others = [module for module in turns.modules(pipeline, family).values() if module is not denoiser]
    collector = _Collector(denoiser, others, family, linears, weights)
    passes = ranks.share(list(batches(len(prompts.texts), sampling.batch_size)), "batches of prompts")
    total = len(passes) * sampling.num_inference_steps

    with collector.attached(steps), quiet(pipeline), torch.no_grad():
        for index, rows in enumerate(passes):
            steps.restart()
            collector.prompts = f"prompts {rows.start + 1} to {rows.stop}"
            collector.told = lambda step, index=index: progress(  # type: ignore[misc]
                stage, index * sampling.num_inference_steps + step, total
            )
            sample(pipeline, prompts, rows, sampling)
    progress(stage, total, total)
    return collector.grams()


class _Collector:
    """Hooks that gather grams while the pipeline runs."""

    def __init__(
        self,
        denoiser: nn.Module,
        others: Sequence[nn.Module],
        family: Family,
        linears: Sequence[LinearSpec],
        weights: Sequence[float],
    ) -> None:
        self._denoiser = denoiser
        self._others = others
        self._family = family
        self._weights = weights
        self._linears = linears
        self._leaders: dict[str, str] = {}
        for linear in linears:
            self._leaders.setdefault(linear.reads, linear.name)
        self._accumulators: dict[str, GramAccumulator] = {}
        self._seen: dict[str, weakref.ref[Tensor]] = {}
        self._step = 0
        self._masks: Masks = {}
        self.prompts = ""
        self.told: Callable[[int], None] = lambda step: None

    @contextmanager
    def attached(self, steps: StepIndex) -> Iterator[None]:
        def advance(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._step = steps.advance(kwargs["timestep"] if "timestep" in kwargs else args[1])

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            advance(module, args, kwargs)
            self._masks = padding.masks(self._family, self._denoiser, named(module, args, kwargs))
            self.told(self._step)

        hooks = [self._denoiser.register_forward_pre_hook(count, with_kwargs=True)]
        hooks += [other.register_forward_pre_hook(advance, with_kwargs=True) for other in self._others]
        for linear in self._linears:
            module = self._denoiser.get_submodule(linear.name)
            take = self._add if self._leaders[linear.reads] == linear.name else self._check
            hooks.append(module.register_forward_pre_hook(lambda m, args, s=linear, t=take: t(s, m, args[0])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _add(self, linear: LinearSpec, module: nn.Module, x: Tensor) -> None:
        self._seen[linear.reads] = weakref.ref(x)
        x = pointwise.tokens(module, x)
        accumulator = self._accumulators.get(linear.reads)
        if accumulator is None:
            accumulator = self._accumulators[linear.reads] = GramAccumulator(x.shape[-1], device=x.device)
        mask = self._masks.get(linear.tokens)
        try:
            rows = x.flatten(0, -2) if mask is None else padding.unpadded(x, mask)  # (tokens, in)
            accumulator.add(rows, self._weights[self._step])
        except CalibrationError as error:
            raise CalibrationError(f"{linear.name}: step {self._step + 1}, {self.prompts}: {error}") from None

    def _check(self, linear: LinearSpec, _: nn.Module, x: Tensor) -> None:
        reference = self._seen.get(linear.reads)
        first = reference() if reference is not None else None
        same = first is x or (first is not None and first.data_ptr() == x.data_ptr() and first.shape == x.shape)
        if not same:
            leader = self._leaders[linear.reads]
            raise CalibrationError(f"{linear.name} and {leader} were taken to read the same input and do not")

    def grams(self) -> dict[str, Gram]:
        for reads, leader in self._leaders.items():
            if reads not in self._accumulators:
                raise CalibrationError(f"{leader}: no token reached this layer in the whole calibration")
        for reads in self._leaders:
            ranks.add_up(self._accumulators[reads].sums())
        return {reads: accumulator.gram() for reads, accumulator in self._accumulators.items()}
