"""Dense against pruned, paired: the same prompts, the same noise, the same sampler.

Velocity error: the dense pipeline runs, and at each call the pruned denoiser is given the very same inputs, so the
number says what pruning did to the network, free of the drift of trajectories. Latents and pictures come from two runs
of their own, so they hold the drift too.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff.families import Family
from obsdiff.metrics import WINDOW, Picture, mean_squared_error, psnr_db, ssim, wilson
from obsdiff.recipe import Sampling
from obsdiff.sampling import Batch, Sampler, Tell, quiet
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.progress import Progress, silent

Score = Callable[[Picture, str], bool]


@dataclass(frozen=True, kw_only=True)
class Share:
    """How many pictures obey their prompt, with the 95 % Wilson interval of the share."""

    obeyed: int
    prompts: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.obeyed / self.prompts


@dataclass(frozen=True, kw_only=True)
class PromptResult:
    """One prompt's pair.

    Attributes:
        prompt, seed: what was drawn, and the seed of its noise.
        velocity_error: mean over steps of |v_pruned - v_dense|^2 / |v_dense|^2.
        latents_mse: mean squared difference of the final latents.
        latents_relative: |z_pruned - z_dense|^2 / |z_dense|^2 of the final latents.
        image_mse: mean squared difference of the 8-bit pictures, full range = 1.
        psnr_db: of the 8-bit pictures; None where they are identical.
        ssim: of the 8-bit pictures.
        dense_obeys, pruned_obeys: None where nothing can judge the prompt.
    """

    prompt: str
    seed: int
    velocity_error: float
    latents_mse: float
    latents_relative: float
    image_mse: float
    psnr_db: float | None
    ssim: float
    dense_obeys: bool | None
    pruned_obeys: bool | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What pruning changed, measured on paired runs.

    Attributes:
        velocity_error: mean of `velocity_error_per_step`.
        velocity_error_per_step: (num_inference_steps,), each the mean over prompts.
        latents_mse, latents_relative, image_mse, ssim: means over prompts.
        psnr_db: mean over the pictures that differ; None where none does.
        identical_images: pairs equal in every 8-bit value.
        dense_obedience, pruned_obedience: None where nothing can judge the prompts.
        per_prompt: in the order of the prompts.
        sampling: how both were run; prompt i's noise comes from a generator seeded with sampling.seed + i.
        negative: the negative prompt; "" where no guidance is used.
        scheduler: class of the sampler.
    """

    velocity_error: float
    velocity_error_per_step: tuple[float, ...]
    latents_mse: float
    latents_relative: float
    image_mse: float
    psnr_db: float | None
    ssim: float
    identical_images: int
    dense_obedience: Share | None
    pruned_obedience: Share | None
    per_prompt: tuple[PromptResult, ...]
    sampling: Sampling
    negative: str
    scheduler: str

    def to_json(self) -> dict[str, Any]:
        """Plain data: dicts, lists, strings, finite numbers, None."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class ImagePair:
    """Both pictures of a prompt, (height, width, 3) uint8."""

    prompt: str
    seed: int
    dense: Picture
    pruned: Picture


@torch.no_grad()
def evaluate(
    pipeline: DiffusionPipeline,
    family: Family,
    *,
    dense: nn.Module,
    pruned: nn.Module,
    prompts: Sequence[str],
    sampling: Sampling,
    negative: str = "",
    score: Score | None = None,
    keep_images: int | None = None,
    progress: Progress = silent,
) -> tuple[Evaluation, tuple[ImagePair, ...]]:
    """Measures what pruning did to a denoiser, in its pipeline.

    Each denoiser takes its turn in the pipeline, which is left as it was; everything else is shared, so no second copy
    of text encoders or VAE is held. Costs three denoiser calls for each call of the sampler.

    Args:
        pipeline: gives text encoders, scheduler and VAE; its own denoiser may be either of the two.
        family: the architecture.
        dense: the denoiser before, in eval mode.
        pruned: the denoiser after, on the same device and of the same dtype, in eval mode.
        prompts: at least one.
        sampling: prompt i's noise comes from a generator seeded with sampling.seed + i, whatever the batch size, which
            bounds memory and changes results by no more than rounding.
        negative: negative prompt; used where the guidance scale is above 1.
        score: whether a picture obeys its prompt.
        keep_images: how many pairs are returned, the first ones; None for all.
        progress: told of every step of the sampler, as stage "evaluate".

    Returns:
        the measurements, and the picture pairs.

    Raises:
        ConfigError: no prompts, pictures too small to compare, or denoisers on different devices or of different dtype.
        CalibrationError: the dense pipeline produced a value that is not finite; names step and prompt.
        QualityError: the pruned one did.
    """
    _check(dense, pruned, prompts, sampling)
    guided = sampling.guidance_scale > 1
    options = {} if sampling.max_sequence_length is None else {"max_sequence_length": sampling.max_sequence_length}
    sampler = Sampler(pipeline=pipeline, family=family, sampling=sampling)
    steps, size = sampling.num_inference_steps, sampling.batch_size
    total = 2 * steps * math.ceil(len(prompts) / size)
    results: list[PromptResult] = []
    pairs: list[ImagePair] = []
    curves: list[Tensor] = []
    with quiet(pipeline):
        for start in range(0, len(prompts), size):
            texts = prompts[start : start + size]
            embeddings = family.encode(pipeline, texts, [negative] * len(texts) if guided else [], **options)
            batch = Batch(prompts=texts, seeds=[sampling.seed + start + i for i in range(len(texts))], text=embeddings)
            tell = Tell(progress=progress, before=2 * steps * (start // size), total=total)
            curve, dense_latents, dense_images = sampler.watched(batch, dense, pruned, tell)
            tell = Tell(progress=progress, before=tell.before + steps, total=total)
            pruned_latents, pruned_images = sampler.plain(batch, pruned, tell)
            curves.append(curve)
            for i, prompt in enumerate(texts):
                pair = ImagePair(prompt=prompt, seed=batch.seeds[i], dense=dense_images[i], pruned=pruned_images[i])
                results.append(_compare(pair, float(curve[i].mean()), dense_latents[i], pruned_latents[i], score))
                if keep_images is None or len(pairs) < keep_images:
                    pairs.append(pair)
    evaluation = _summarise(
        results,
        torch.cat(curves),
        sampling=sampling,
        negative=negative if guided else "",
        scheduler=type(pipeline.scheduler).__name__,
    )
    return evaluation, tuple(pairs)


def check_size(sampling: Sampling) -> None:
    """Raises ConfigError where pictures are too small to compare; asked before the work too."""
    if min(sampling.height, sampling.width) < WINDOW:
        raise ConfigError(
            f"pictures of {sampling.height}x{sampling.width} pixels are too small to compare; SSIM needs"
            f" {WINDOW}x{WINDOW}: raise --height and --width, or compare nothing with --eval-prompts 0"
        )


def _check(dense: nn.Module, pruned: nn.Module, prompts: Sequence[str], sampling: Sampling) -> None:
    if not prompts:
        raise ConfigError("evaluation needs at least one prompt; is --eval-prompts-file empty?")
    if sampling.batch_size < 1:
        raise ConfigError(f"--batch-size {sampling.batch_size}: must be at least 1")
    check_size(sampling)
    if dense is pruned:
        raise ConfigError("the pruned denoiser is the dense one itself; copy or load the dense one before pruning")
    before, after = next(dense.parameters()), next(pruned.parameters())
    if (before.device, before.dtype) != (after.device, after.dtype):
        raise ConfigError(
            f"the dense denoiser is {before.dtype} on {before.device}, the pruned one {after.dtype} on {after.device};"
            " move one with .to()"
        )


def _compare(
    pair: ImagePair, velocity_error: float, dense_latents: Tensor, pruned_latents: Tensor, score: Score | None
) -> PromptResult:
    dense, pruned = dense_latents.double(), pruned_latents.double()
    difference = float((pruned - dense).square().sum())
    return PromptResult(
        prompt=pair.prompt,
        seed=pair.seed,
        velocity_error=velocity_error,
        latents_mse=difference / dense.numel(),
        latents_relative=difference / float(dense.square().sum()),
        image_mse=mean_squared_error(pair.dense, pair.pruned),
        psnr_db=psnr_db(pair.dense, pair.pruned),
        ssim=ssim(pair.dense, pair.pruned),
        dense_obeys=None if score is None else bool(score(pair.dense, pair.prompt)),
        pruned_obeys=None if score is None else bool(score(pair.pruned, pair.prompt)),
    )


def _summarise(results: Sequence[PromptResult], curves: Tensor, **settings: Any) -> Evaluation:
    """Means over prompts; curves is (prompts, steps)."""
    per_step = curves.mean(0)
    ratios = [result.psnr_db for result in results if result.psnr_db is not None]
    return Evaluation(
        velocity_error=float(per_step.mean()),
        velocity_error_per_step=tuple(per_step.tolist()),
        latents_mse=float(np.mean([result.latents_mse for result in results])),
        latents_relative=float(np.mean([result.latents_relative for result in results])),
        image_mse=float(np.mean([result.image_mse for result in results])),
        psnr_db=float(np.mean(ratios)) if ratios else None,
        ssim=float(np.mean([result.ssim for result in results])),
        identical_images=len(results) - len(ratios),
        dense_obedience=_share([result.dense_obeys for result in results]),
        pruned_obedience=_share([result.pruned_obeys for result in results]),
        per_prompt=tuple(results),
        **settings,
    )


def _share(verdicts: Sequence[bool | None]) -> Share | None:
    judged = [verdict for verdict in verdicts if verdict is not None]
    if not judged:
        return None
    low, high = wilson(sum(judged), len(judged))
    return Share(obeyed=sum(judged), prompts=len(judged), low=low, high=high)
