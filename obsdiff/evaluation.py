"""Dense against pruned, paired: the same prompts, the same noise, the same sampler.

Velocity error: the dense pipeline runs, and at each call the pruned denoiser is given the very same inputs, so the
number says what pruning did to the network, free of the drift of trajectories; so do the errors of the blocks' outputs.
Latents and pictures come from two runs of their own, so they hold the drift too.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff.families import Family, guided
from obsdiff.guidance import GuidanceSweep
from obsdiff.judges import Judges, frechet_distance
from obsdiff.metrics import WINDOW, Picture, mean_squared_error, psnr_db, ssim, wilson
from obsdiff.recipe import Sampling
from obsdiff.residuals import block_modules
from obsdiff.sampling import Pair, Sampler, Tell, Watched, batches, quiet
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.progress import Progress, silent

FIGURES: Final = (
    *("velocity_error", "block_error", "latents_mse", "latents_relative", "image_mse", "psnr_db", "ssim", "lpips"),
    "identical_images",
)


@dataclass(frozen=True, kw_only=True)
class Share:
    """How many pictures obey their prompt, with the 95 % Wilson interval of the share."""

    obeyed: int
    prompts: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, verdicts: Sequence[bool]) -> "Share":
        low, high = wilson(sum(verdicts), len(verdicts))
        share = sum(verdicts) / len(verdicts)
        return cls(obeyed=sum(verdicts), prompts=len(verdicts), share=share, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class ScorePair:
    """What one judge gives the dense and the pruned model."""

    dense: float
    pruned: float


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
        lpips: of the pictures; None where it was not asked for.
        scores: of the pictures, by judge.
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
    lpips: float | None = None
    scores: Mapping[str, ScorePair] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What pruning changed, measured on paired runs.

    Attributes:
        velocity_error: mean of `velocity_error_per_step`.
        velocity_error_per_step: (num_inference_steps,), each the mean over prompts.
        blocks: names of the denoiser's blocks, in forward order.
        block_error: that of the last block: what reaches the layers after it.
        block_errors: (blocks,), relative errors of what the blocks hand on, means over prompts and steps; residuals.py.
        block_errors_per_step: (blocks, num_inference_steps), means over prompts.
        latents_mse, latents_relative, image_mse, ssim: means over prompts.
        psnr_db: mean over the pictures that differ; None where none does.
        identical_images: pairs equal in every 8-bit value.
        dense_obedience, pruned_obedience: None where nothing can judge the prompts.
        lpips: mean over prompts; None where it was not asked for.
        scores: means over prompts, by judge.
        fid_clip: Fréchet distances to the reference pictures in CLIP's features; None where there are none.
        guidance: both models over guidance scales; None where it was not asked for.
        per_prompt: in the order of the prompts.
        sampling: how both were run; prompt i's noise comes from a generator seeded with sampling.seed + i.
        negative: the negative prompt; "" where no guidance is used.
        scheduler: class of the sampler.
    """

    velocity_error: float
    velocity_error_per_step: tuple[float, ...]
    blocks: tuple[str, ...]
    block_error: float
    block_errors: tuple[float, ...]
    block_errors_per_step: tuple[tuple[float, ...], ...]
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
    lpips: float | None = None
    scores: Mapping[str, ScorePair] = field(default_factory=dict)
    fid_clip: ScorePair | None = None
    guidance: GuidanceSweep | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data: dicts, lists, strings, finite numbers, None."""
        return dataclasses.asdict(self)

    def figures(self) -> dict[str, float | None]:
        """What gates and spreads read, by key of the JSON; None where not measured, infinite PSNR where identical."""
        found: dict[str, float | None] = dict.fromkeys(figure_names(self.scores))
        found |= {name: getattr(self, name) for name in FIGURES}
        if self.psnr_db is None:
            found["psnr_db"] = math.inf
        for name, share in (("dense", self.dense_obedience), ("pruned", self.pruned_obedience)):
            if share is not None:
                found[f"{name}_obedience.share"] = share.share
        pairs = {f"scores.{name}": pair for name, pair in self.scores.items()}
        if self.fid_clip is not None:
            pairs["fid_clip"] = self.fid_clip
        for name, pair in pairs.items():
            found |= {f"{name}.dense": pair.dense, f"{name}.pruned": pair.pruned}
        if self.guidance is not None:
            found["guidance.dense_best.dense"] = self.guidance.dense_best.dense
            found["guidance.pruned_best.pruned"] = self.guidance.pruned_best.pruned
        return found


def figure_names(scores: Iterable[str]) -> tuple[str, ...]:
    """Every figure of an evaluation in which these judges score."""
    pairs = [*(f"scores.{name}" for name in scores), "fid_clip"]
    return (
        *FIGURES,
        *("dense_obedience.share", "pruned_obedience.share"),
        *(f"{name}.{who}" for name in pairs for who in ("dense", "pruned")),
        *("guidance.dense_best.dense", "guidance.pruned_best.pruned"),
    )


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
    behind: Mapping[str, Pair] = MappingProxyType({}),
    negative: str = "",
    judges: Judges | None = None,
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
        behind: the dense and the pruned one of denoisers that take their turns behind it, by name. Each step has the
            errors of the one that takes it.
        negative: negative prompt; used where the guidance scale is above 1.
        judges: who looks at the pictures; None: nobody.
        keep_images: how many pairs are returned, the first ones; None for all.
        progress: told of every step of the sampler, as stage "evaluate".

    Returns:
        the measurements, and the picture pairs.

    Raises:
        ConfigError: no prompts, pictures too small to compare, or denoisers on different devices or of different dtype.
        CalibrationError: the dense pipeline produced a value that is not finite; names step and prompt.
        QualityError: the pruned one did.
    """
    judges = judges or Judges()
    _check(dense, pruned, prompts, sampling, judges)
    sampler = Sampler(pipeline=pipeline, family=family, sampling=sampling, behind=behind)
    steps = sampling.num_inference_steps
    total = 2 * steps * math.ceil(len(prompts) / sampling.batch_size)
    results: list[PromptResult] = []
    pairs: list[ImagePair] = []
    runs: list[Watched] = []
    features: dict[str, list[Tensor]] = {"dense": [], "pruned": []}
    with quiet(pipeline):
        for index, batch in enumerate(batches(sampler, prompts, negative)):
            tell = Tell(progress=progress, before=2 * steps * index, total=total)
            watched = sampler.watched(batch, dense, pruned, tell)
            tell = Tell(progress=progress, before=tell.before + steps, total=total)
            latents, images = sampler.plain(batch, pruned, tell)
            runs.append(dataclasses.replace(watched, images=[]))
            for i, prompt in enumerate(batch.prompts):
                pair = ImagePair(prompt=prompt, seed=batch.seeds[i], dense=watched.images[i], pruned=images[i])
                error = float(watched.velocity_errors[i].mean())
                results.append(_compare(pair, error, watched.latents[i], latents[i], judges))
                if judges.embed is not None:
                    features["dense"].append(judges.embed(pair.dense))
                    features["pruned"].append(judges.embed(pair.pruned))
                if keep_images is None or len(pairs) < keep_images:
                    pairs.append(pair)
    evaluation = _summarise(
        results,
        torch.cat([run.velocity_errors for run in runs]),
        torch.cat([run.block_errors for run in runs], 1),
        blocks=block_modules(family.linears(dense)),
        fid_clip=_fid(judges, features),
        sampling=sampling,
        negative=negative if guided(family, dense, sampling.guidance_scale) else "",
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


def _check(dense: nn.Module, pruned: nn.Module, prompts: Sequence[str], sampling: Sampling, judges: Judges) -> None:
    if not prompts:
        raise ConfigError("evaluation needs at least one prompt; is --eval-prompts-file empty?")
    if judges.reference is not None and len(prompts) < 2:
        raise ConfigError("--fid-reference needs at least two pictures of each model; raise --eval-prompts")
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
    pair: ImagePair, velocity_error: float, dense_latents: Tensor, pruned_latents: Tensor, judges: Judges
) -> PromptResult:
    dense, pruned = dense_latents.double(), pruned_latents.double()
    difference = float((pruned - dense).square().sum())
    obeys, prompt = judges.obeys, pair.prompt
    return PromptResult(
        prompt=prompt,
        seed=pair.seed,
        velocity_error=velocity_error,
        latents_mse=difference / dense.numel(),
        latents_relative=difference / float(dense.square().sum()),
        image_mse=mean_squared_error(pair.dense, pair.pruned),
        psnr_db=psnr_db(pair.dense, pair.pruned),
        ssim=ssim(pair.dense, pair.pruned),
        dense_obeys=None if obeys is None else bool(obeys(pair.dense, prompt)),
        pruned_obeys=None if obeys is None else bool(obeys(pair.pruned, prompt)),
        lpips=None if judges.lpips is None else judges.lpips(pair.dense, pair.pruned),
        scores={
            name: ScorePair(dense=float(judge(pair.dense, prompt)), pruned=float(judge(pair.pruned, prompt)))
            for name, judge in judges.scores.items()
        },
    )


def _fid(judges: Judges, features: Mapping[str, list[Tensor]]) -> ScorePair | None:
    if judges.reference is None:
        return None
    found = {who: frechet_distance(judges.reference, torch.stack(rows)) for who, rows in features.items()}
    return ScorePair(dense=found["dense"], pruned=found["pruned"])


def _summarise(results: Sequence[PromptResult], velocities: Tensor, residuals: Tensor, **known: Any) -> Evaluation:
    """Means over prompts; velocities is (prompts, steps), residuals (blocks, prompts, steps)."""
    per_step, block_steps = velocities.mean(0), residuals.mean(1)
    ratios = [result.psnr_db for result in results if result.psnr_db is not None]
    distances = [result.lpips for result in results if result.lpips is not None]

    def mean(name: str) -> float:
        return float(np.mean([getattr(result, name) for result in results]))

    return Evaluation(
        velocity_error=float(per_step.mean()),
        velocity_error_per_step=tuple(per_step.tolist()),
        block_error=float(block_steps[-1].mean()),
        block_errors=tuple(block_steps.mean(1).tolist()),
        block_errors_per_step=tuple(tuple(row) for row in block_steps.tolist()),
        latents_mse=mean("latents_mse"),
        latents_relative=mean("latents_relative"),
        image_mse=mean("image_mse"),
        psnr_db=float(np.mean(ratios)) if ratios else None,
        ssim=mean("ssim"),
        identical_images=len(results) - len(ratios),
        dense_obedience=_share([result.dense_obeys for result in results]),
        pruned_obedience=_share([result.pruned_obeys for result in results]),
        lpips=float(np.mean(distances)) if distances else None,
        scores={name: _mean_pair([result.scores[name] for result in results]) for name in results[0].scores},
        per_prompt=tuple(results),
        **known,
    )


def _mean_pair(pairs: Sequence[ScorePair]) -> ScorePair:
    return ScorePair(
        dense=float(np.mean([pair.dense for pair in pairs])), pruned=float(np.mean([pair.pruned for pair in pairs]))
    )


def _share(verdicts: Sequence[bool | None]) -> Share | None:
    judged = [verdict for verdict in verdicts if verdict is not None]
    return Share.of(judged) if judged else None
