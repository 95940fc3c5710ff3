"""The denoiser's calls along the dense model's own trajectories: what streamed calibration looks at."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff import padding, ranks
from obsdiff.calibration import Prompts, StepIndex, batches, sample
from obsdiff.families import Family, guided
from obsdiff.padding import Masks
from obsdiff.pausing import Arguments
from obsdiff.recipe import Sampling
from obsdiff.sampling import quiet, velocity_of
from obsdiff_runtime.errors import CalibrationError
from obsdiff_runtime.progress import Progress, silent


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


@torch.no_grad()
def record(
    pipeline: DiffusionPipeline,
    family: Family,
    prompts: Prompts,
    sampling: Sampling,
    *,
    kept_steps: int,
    progress: Progress = silent,
    stage: str = "calibrate",
) -> list[Call]:
    """Runs the sampler over all prompts and keeps some of the denoiser's calls.

    Batch b keeps every (steps / kept_steps)-th step, beginning b steps in, so that together the batches see every
    step. Inputs of one trajectory resemble one another: more prompts are worth more than more steps of each. Each rank
    runs and keeps its share of the batches. Where guidance calls the denoiser on negative prompts by themselves, behind
    the others, both calls are kept as one, if their texts are of one length.

    Args:
        pipeline: in eval mode.
        family: of its denoiser.
        prompts: encoded.
        sampling: steps, guidance, size and seed.
        kept_steps: how many steps of each batch are kept, 1 to all.
        progress: told after every denoiser call.
        stage: what progress calls it.

    Raises:
        CalibrationError: there is no prompt, or the denoiser's output is not finite (names step and prompts).
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
    calls: list[Call] = []
    waiting: list[Call] = []
    place = own[0]

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        step = steps.advance(kwargs["timestep"] if "timestep" in kwargs else args[1])
        texts = f"prompts {passes[place].start + 1} to {passes[place].stop}"
        velocity = velocity_of(denoiser, output)
        if not bool(velocity.isfinite().all()):
            raise CalibrationError(f"step {step + 1}, {texts}: the denoiser's output is not finite; are its weights?")
        if step in wanted_steps(sampling.num_inference_steps, kept_steps, place):
            paired = len(velocity) == 2 * len(passes[place])
            call = Call(step=step, arguments=_copied(args, kwargs), prompts=texts, paired=paired)
            if waiting and (waiting[0].step, waiting[0].prompts) == (step, texts):
                calls.extend(_together(call, waiting.pop()))
            elif combined and not paired:
                calls.extend(waiting)
                waiting[:] = [call]
            else:
                calls.append(call)
        progress(stage, (place - own[0]) * sampling.num_inference_steps + step, total)

    handle = denoiser.register_forward_hook(keep, with_kwargs=True)
    try:
        with quiet(pipeline):
            for place in own:
                steps.restart()
                sample(pipeline, prompts, passes[place], sampling)
    finally:
        handle.remove()
    progress(stage, total, total)
    calls.extend(waiting)
    return [replace(call, masks=padding.masks(family, denoiser, call.arguments[1])) for call in calls]


def wanted_steps(steps: int, kept: int, batch: int) -> frozenset[int]:
    """The steps that a batch keeps: evenly spaced, shifted from batch to batch."""
    kept = min(kept, steps)
    return frozenset((batch + index * steps // kept) % steps for index in range(kept))


def _together(negative: Call, positive: Call) -> list[Call]:
    """Two calls of a step as one of twice the rows, the negative prompts first, as other pipelines make it.

    As they are where their texts are not of one length.
    """
    args, kwargs = positive.arguments
    others, more = negative.arguments
    pairs = [*zip(others, args, strict=True), *((more[name], kwargs[name]) for name in kwargs)]
    if any(_shape(without) != _shape(given) for without, given in pairs):
        return [positive, negative]

    def both(without: Any, given: Any) -> Any:
        return torch.cat([without, given]) if isinstance(given, Tensor) and given.ndim else given

    joined = tuple(both(*pair) for pair in zip(others, args, strict=True))
    named = {name: both(more[name], value) for name, value in kwargs.items()}
    return [replace(positive, arguments=(joined, named), paired=True)]


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The sampler goes on to change some of its tensors in place."""
    values = tuple(value.clone() if isinstance(value, Tensor) else value for value in args)
    return values, {name: value.clone() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
