"""Guidance retuned: dense and pruned model drawn at several guidance scales, each judged at its own best.

Pruning can move the scale at which a model draws best, so that a comparison at one scale alone may be unfair to either.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from torch import nn

from obsdiff.families import Family
from obsdiff.judges import Judge
from obsdiff.recipe import Sampling
from obsdiff.sampling import Pair, Sampler, Tell, batches, quiet
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.progress import Progress, silent


@dataclass(frozen=True, kw_only=True)
class GuidanceScore:
    """Mean scores of both models at one guidance scale."""

    guidance_scale: float
    dense: float
    pruned: float


@dataclass(frozen=True, kw_only=True)
class GuidanceSweep:
    """Both models over guidance scales.

    The best is chosen on the prompts it is told of, for both models alike: a little too good for both.

    Attributes:
        judge: whose scores these are: "obedience" (a share) or the name of a score.
        fixed: at the guidance scale of the evaluation.
        scores: at every scale, `fixed` among them, in ascending order.
        dense_best, pruned_best: where that model scores most; of equals the one nearest to the fixed scale.
    """

    judge: str
    fixed: GuidanceScore
    scores: tuple[GuidanceScore, ...]
    dense_best: GuidanceScore
    pruned_best: GuidanceScore


def parse_guidance(text: str) -> tuple[float, ...]:
    """Guidance scales from "1,2,3.5", sorted, each once.

    Raises:
        ConfigError: something else is written there.
    """
    try:
        scales = sorted({float(part) for part in text.split(",")})
    except ValueError:
        scales = []
    if not scales or not all(math.isfinite(scale) and scale >= 0 for scale in scales):
        raise ConfigError(f"--guidance-sweep {text}: expected guidance scales such as 1,2,3.5,5")
    return tuple(scales)


@torch.no_grad()
def sweep_guidance(
    pipeline: DiffusionPipeline,
    family: Family,
    *,
    dense: nn.Module,
    pruned: nn.Module,
    prompts: Sequence[str],
    sampling: Sampling,
    fixed: GuidanceScore,
    scales: Sequence[float],
    judge: tuple[str, Judge],
    behind: Mapping[str, Pair] = MappingProxyType({}),
    negative: str = "",
    dense_scores: Mapping[float, float] | None = None,
    progress: Progress = silent,
) -> GuidanceSweep:
    """Draws every prompt at every scale with both models, with the noise of the evaluation, and judges.

    Args:
        pipeline: as for evaluation.evaluate, like all that follows up to `sampling`.
        family: the architecture.
        dense: the denoiser before.
        pruned: the denoiser after.
        prompts: what to draw.
        sampling: how; the guidance scale is that of `fixed`.
        fixed: what the evaluation found at sampling.guidance_scale.
        scales: guidance scales.
        judge: name and function.
        behind: as for evaluation.evaluate; these denoisers have the same scale.
        negative: negative prompt; used where there is guidance.
        dense_scores: the dense model's mean scores by scale, where an earlier sweep found them.
        progress: told of every step of the sampler, as stage "retune guidance".
    """
    known = dense_scores or {}
    name, judged = judge
    missing = [scale for scale in scales if scale != sampling.guidance_scale]
    runs: list[tuple[float, Literal["dense", "pruned"], nn.Module]] = []
    for scale in missing:
        runs.append((scale, "pruned", pruned))
        if scale not in known:
            runs.append((scale, "dense", dense))
    steps = sampling.num_inference_steps * math.ceil(len(prompts) / sampling.batch_size)
    found: dict[tuple[float, str], float] = {(scale, "dense"): known[scale] for scale in missing if scale in known}
    for done, (scale, who, denoiser) in enumerate(runs):
        later = None if sampling.guidance_scale_2 is None else scale
        sampled = dataclasses.replace(sampling, guidance_scale=scale, guidance_scale_2=later)
        sampler = Sampler(pipeline=pipeline, family=family, sampling=sampled, behind=behind)
        points = []
        with quiet(pipeline):
            for index, batch in enumerate(batches(sampler, prompts, negative)):
                before = done * steps + index * sampling.num_inference_steps
                tell = Tell(progress=progress, before=before, total=len(runs) * steps, stage="retune guidance")
                _, images = sampler.plain(batch, denoiser, tell, who=who)
                points += [judged(image, prompt) for image, prompt in zip(images, batch.prompts, strict=True)]
        found[scale, who] = sum(points) / len(points)
    scores = [
        GuidanceScore(guidance_scale=scale, dense=found[scale, "dense"], pruned=found[scale, "pruned"])
        for scale in missing
    ]
    return summarise(name, fixed, scores)


def summarise(judge: str, fixed: GuidanceScore, others: Sequence[GuidanceScore]) -> GuidanceSweep:
    """The sweep with the best of each model; `others` are at other scales than `fixed`."""
    scores = tuple(sorted((fixed, *others), key=lambda score: score.guidance_scale))

    def near(score: GuidanceScore) -> float:
        return abs(score.guidance_scale - fixed.guidance_scale)

    return GuidanceSweep(
        judge=judge,
        fixed=fixed,
        scores=scores,
        dense_best=max(scores, key=lambda score: (score.dense, -near(score))),
        pruned_best=max(scores, key=lambda score: (score.pruned, -near(score))),
    )
