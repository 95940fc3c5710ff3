"""The denoiser's calls along the dense model's own trajectories: what streamed calibration looks at."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from obsdiff import padding, ranks, turns
from obsdiff.calibration import Prompts, StepIndex, batches, sample
from obsdiff.core import timesteps
from obsdiff.families import Family, guided, usual_scale
from obsdiff.instead import instead
from obsdiff.padding import Masks
from obsdiff.pausing import Arguments
from obsdiff.recipe import Recipe, Sampling
from obsdiff.sampling import named, quiet, velocity_of
from obsdiff_runtime.errors import CalibrationError
from obsdiff_runtime.progress import Progress, silent

GOLDEN: Final = (5**0.5 - 1) / 2
LATE: Final = 0.7
"""Power of the share of steps behind which the denoiser computes; 1 is evenly."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the denoiser.

    Attributes:
        step: of the sampler, 0 is the noisiest.
        arguments: what it is called with.
        prompts: whose it is, for messages.
        masks: which tokens it looks at.
        paired: whether it has two rows of each prompt, the negative one's first; some pipelines guide in two calls.
    """

    step: int
    arguments: Arguments
    prompts: str
    masks: Masks = field(default_factory=dict)
    paired: bool = False


@dataclass(frozen=True)
class Guidance:
    """What a sampler follows is s c - (s - 1) u of a call's conditional and unconditional rows.

    Errors that the rows do not share count s^2 + (s - 1)^2 times in it, and those that they share once.

    Attributes:
        scale: s.
    """

    scale: float

    @classmethod
    def of(cls, family: Family, denoiser: nn.Module, sampling: Sampling) -> "Guidance | None":
        """None where the denoiser is not guided."""
        if not guided(family, denoiser, sampling.guidance_scale):
            return None
        return cls(usual_scale(family, turns.guidance_scale(sampling, family)))

    def combined(self, value: Tensor) -> Tensor:
        """(2 rows, ...), the unconditional ones first, -> (rows, ...)."""
        without, given = value.chunk(2)
        return torch.lerp(without, given, self.scale)

    def spread(self, value: Tensor, share: float) -> Tensor:
        """Two tokens of the weight 1 + share / 2 for three: u and c of the weight 1 and their combination of `share`.

        All three lie at places 0, 1 and s of the line u + t (c - u); two at their mean, one deviation to either side,
        have the same weight in all, the same mean and the same second moments.

        Args:
            value: (2 rows, ...), the unconditional ones first.
            share: what the combination counts.

        Returns:
            (2 rows, ...), in value's dtype.
        """
        weight = 2 + share
        mean = (1 + share * self.scale) / weight
        deviation = math.sqrt((1 + share * self.scale**2) / weight - mean**2)
        without, given = value.chunk(2)
        return torch.cat([torch.lerp(without, given, mean + side * deviation) for side in (-1, 1)])


@torch.no_grad()
def record(
    pipeline: DiffusionPipeline,
    family: Family,
    prompts: Prompts,
    sampling: Sampling,
    *,
    computed_steps: int,
    kept_steps: int,
    progress: Progress = silent,
    stage: str = "calibrate",
) -> list[Call]:
    """Runs the sampler over all prompts and keeps some of the denoiser's calls.

    The sampler takes all its steps, but the denoiser computes at some of them alone (`computed`); in between, what it
    gave last stands. Some of those that it computes are kept (`kept`): inputs of one trajectory resemble one another,
    and more prompts are worth more than more steps of each. Each rank runs and keeps its share of the batches. Where
    guidance calls the denoiser on negative prompts by themselves, behind the others, both calls are kept as one, if
    their texts are of one length. Where denoisers take turns, those of one are kept, of the steps that it takes.

    Args:
        pipeline: in eval mode.
        family: of its denoiser, or of one of those that take turns.
        prompts: encoded.
        sampling: steps, guidance, size and seed.
        computed_steps: at how many steps of each batch the denoiser computes, 1 to all.
        kept_steps: how many of them are kept, 1 to all.
        progress: told after every denoiser call that is computed.
        stage: what progress calls it.

    Raises:
        CalibrationError: there is no prompt, the denoiser takes none of the steps, or its output is not finite (names
            step and prompts).
        ConfigError: there are more ranks than batches of prompts.
    """
    if not prompts.texts:
        raise CalibrationError("no prompt to calibrate on; is --prompts-file empty?")
    denoiser: nn.Module = getattr(pipeline, family.denoiser)
    steps = StepIndex(pipeline.scheduler, sampling.num_inference_steps)
    passes = list(batches(len(prompts.texts), sampling.batch_size))
    own = ranks.share(range(len(passes)), "batches of prompts")
    total = len(own) * sampling.num_inference_steps
    combined = guided(family, denoiser, sampling.guidance_scale)
    everyone = turns.of(pipeline, family)
    computing: frozenset[int] = frozenset()
    keeping: frozenset[int] = frozenset()
    calls: list[Call] = []
    waiting: list[Call] = []
    place = own[0]

    def answered(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal computing, keeping
        step = steps.advance(kwargs["timestep"] if "timestep" in kwargs else args[1])
        if not computing:  # the first call of a batch: only now the sampler has its timesteps
            taken = turns.steps_of(everyone, pipeline.scheduler.timesteps.tolist(), sampling.num_inference_steps)
            computing, among = shared(taken, family.denoiser, computed_steps, place)
            keeping = kept(among, kept_steps, place)
        return answers.at(step, computes=step in computing, compute=partial(look, step, compute, args, kwargs))

    def look(step: int, compute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        texts = f"prompts {passes[place].start + 1} to {passes[place].stop}"
        output = compute(*args, **kwargs)
        velocity = velocity_of(denoiser, output, kwargs)
        if not bool(velocity.isfinite().all()):
            raise CalibrationError(f"step {step + 1}, {texts}: the denoiser's output is not finite; are its weights?")
        if step in keeping:
            paired = len(velocity) == 2 * len(passes[place])
            arguments = _copied(args, kwargs)
            if paired and not family.negative_first:
                arguments = _exchanged(arguments, len(velocity))
            call = Call(step=step, arguments=arguments, prompts=texts, paired=paired)
            if waiting and (waiting[0].step, waiting[0].prompts) == (step, texts):
                calls.extend(_together(call, waiting.pop()))
            elif combined and not paired:
                calls.extend(waiting)
                waiting[:] = [call]
            else:
                calls.append(call)
        progress(stage, (place - own[0]) * sampling.num_inference_steps + step, total)
        return output

    with quiet(pipeline), ExitStack() as stack:
        for name in everyone:
            module = getattr(pipeline, name)
            stack.enter_context(instead(module, "forward", partial(answered, module.forward)))
        for place in own:
            computing = frozenset()
            answers = _Answers()
            steps.restart()
            sample(pipeline, prompts, passes[place], sampling)
    progress(stage, total, total)
    calls.extend(waiting)
    return [replace(call, masks=padding.masks(family, denoiser, named(denoiser, *call.arguments))) for call in calls]


def weights(calls: Sequence[Call], recipe: Recipe) -> list[float]:
    """Of each call's tokens, by its step."""
    schedule = timesteps.weights(recipe.time_weights, recipe.sampling.num_inference_steps).tolist()
    return [schedule[call.step] for call in calls]


def computed(steps: int, count: int, batch: int) -> frozenset[int]:
    """The steps at which the denoiser computes for a batch: the first one, and one of each of count - 1 parts of the
    others. Parts are shorter towards the end, where what pruning costs is largest against what is predicted. Where in
    its part a step lies differs from batch to batch, by the golden ratio, so that together they come everywhere.
    """
    count = min(count, steps)
    found = [0]
    for part in range(1, count):
        share = (part - 1 + batch * GOLDEN % 1) / (count - 1)
        asked = 1 + int(share**LATE * (steps - 1))
        found.append(min(max(asked, found[-1] + 1), steps - count + part))
    return frozenset(found)


def shared(taken: Mapping[str, range], denoiser: str, count: int, batch: int) -> tuple[frozenset[int], frozenset[int]]:
    """The steps at which denoisers that take turns compute for a batch, and those of one of them among these.

    Each has its share of the count, and at least one. Behind the turn of the one that is asked for none computes.

    Raises:
        CalibrationError: it takes no step.
    """
    steps = sum(len(turn) for turn in taken.values())
    found: frozenset[int] = frozenset()
    for name, turn in taken.items():
        own = computed(len(turn), max(round(count * len(turn) / steps), 1), batch) if turn else ()
        own = frozenset(turn.start + step for step in own)
        found |= own
        if name == denoiser:
            break
    if not own:
        raise CalibrationError(f"{denoiser} takes none of {steps} steps; take more of them (--steps)")
    return found, own


def kept(computing: frozenset[int], count: int, batch: int) -> frozenset[int]:
    """The steps that a batch keeps of those: evenly spaced among them, shifted from batch to batch."""
    among, count = sorted(computing), min(count, len(computing))
    return frozenset(among[(batch + index * len(among) // count) % len(among)] for index in range(count))


class _Answers:
    """What the denoiser gave at the last step that it computed, call by call of a step."""

    def __init__(self) -> None:
        self._step, self._place = -1, 0
        self._given: list[Any] = []

    def at(self, step: int, *, computes: bool, compute: Callable[[], Any]) -> Any:
        """The output of the next call, which is one of this step: computed, or what that call gave last."""
        self._step, self._place = step, self._place + 1 if step == self._step else 0
        if computes and self._place == 0:
            self._given = []
        if self._place == len(self._given):
            self._given.append(compute())
        return self._given[self._place]


def _together(negative: Call, positive: Call) -> list[Call]:
    """Two calls of a step as one of twice the rows, the negative prompts first, as other pipelines make it.

    As they are where their texts are not of one length. Places of tokens, (tokens, axes), are those of all rows.
    """
    args, kwargs = positive.arguments
    others, more = negative.arguments
    pairs = [*zip(others, args, strict=True), *((more[name], kwargs[name]) for name in kwargs)]
    if any(_shape(without) != _shape(given) for without, given in pairs):
        return [positive, negative]

    def both(without: Any, given: Any) -> Any:
        return torch.cat([without, given]) if isinstance(given, Tensor) and given.ndim else given

    joined = tuple(both(*pair) for pair in zip(others, args, strict=True))
    named = {
        name: value if name.endswith("_ids") and value is not None and value.ndim == 2 else both(more[name], value)
        for name, value in kwargs.items()
    }
    return [replace(positive, arguments=(joined, named), paired=True)]


def _exchanged(arguments: Arguments, rows: int) -> Arguments:
    """Arguments of a call with the second half of its rows before the first."""

    def turned(value: Any) -> Any:
        if isinstance(value, list) and len(value) == rows:
            return [*value[rows // 2 :], *value[: rows // 2]]
        has_rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
        return value.roll(rows // 2, 0) if has_rows else value

    args, kwargs = arguments
    return tuple(turned(value) for value in args), {name: turned(value) for name, value in kwargs.items()}


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The sampler goes on to change some of its tensors in place."""
    copies: Arguments = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    return copies
