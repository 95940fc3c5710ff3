import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from obsdiff.families.table import FAMILIES
from obsdiff.guidance import GuidanceScore, GuidanceSweep, parse_guidance, summarise, sweep_guidance
from obsdiff.metrics import Picture
from obsdiff.recipe import Sampling
from obsdiff_runtime.errors import ConfigError


def score(guidance_scale: float, dense: float, pruned: float) -> GuidanceScore:
    return GuidanceScore(guidance_scale=guidance_scale, dense=dense, pruned=pruned)


def test_each_model_has_its_own_best() -> None:
    sweep = summarise("taste", score(3.5, 0.7, 0.5), [score(5, 0.9, 0.4), score(2, 0.8, 0.6)])
    assert [entry.guidance_scale for entry in sweep.scores] == [2, 3.5, 5]
    assert (sweep.dense_best.guidance_scale, sweep.pruned_best.guidance_scale) == (5, 2)


def test_of_equals_the_nearest_to_the_fixed_scale_is_best() -> None:
    sweep = summarise("taste", score(3.5, 1, 0), [score(1, 1, 1), score(5, 1, 1)])
    assert sweep.dense_best == sweep.fixed
    assert sweep.pruned_best.guidance_scale == 5


def test_scales_are_sorted_and_counted_once() -> None:
    assert parse_guidance("5, 1,3.5,5.0") == (1, 3.5, 5)


@pytest.mark.parametrize("text", ["", "1,,2", "much", "nan", "-1", "inf"])
def test_scales_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--guidance-sweep .*1,2,3\.5,5"):
        parse_guidance(text)


def brightness(picture: Picture, prompt: str) -> float:
    return float(picture.mean()) / 255


def sweep_tiny(pipeline: DiffusionPipeline, **changes: Any) -> tuple[GuidanceSweep, list[tuple[int, int]]]:
    dense = pipeline.transformer
    pruned = copy.deepcopy(dense)
    with torch.no_grad():
        pruned.proj_out.weight.mul_(1.5)
    told: list[tuple[int, int]] = []
    sampling = Sampling(
        num_inference_steps=2, guidance_scale=3.0, height=32, width=32, max_sequence_length=4, batch_size=2, seed=5
    )
    sweep = sweep_guidance(
        pipeline,
        FAMILIES["sd3"],
        dense=dense,
        pruned=pruned,
        prompts=["a cat", "a dog", "red"],
        sampling=sampling,
        fixed=score(3.0, 0.1, 0.2),
        scales=(1.0, 3.0, 6.0),
        judge=("brightness", brightness),
        progress=lambda stage, done, total, note="": told.append((done, total)),
        **changes,
    )
    assert pipeline.transformer is dense
    return sweep, told


def test_every_scale_is_drawn_with_the_noise_of_the_evaluation(
    build_pipeline: Callable[..., DiffusionPipeline],
) -> None:
    """Oracle: the pipeline by itself."""
    pipeline = build_pipeline("sd3")
    sweep, told = sweep_tiny(pipeline)
    assert told == sorted(told)
    assert told[-1] == (16, 16)  # two scales, two models, two batches, two steps
    assert sweep.fixed == score(3.0, 0.1, 0.2)
    images = [
        pipeline(
            prompt,
            negative_prompt="",
            num_inference_steps=2,
            guidance_scale=6.0,
            height=32,
            width=32,
            max_sequence_length=4,
            generator=torch.Generator().manual_seed(5 + i),
            output_type="np",
        ).images[0]
        for i, prompt in enumerate(["a cat", "a dog", "red"])
    ]
    assert sweep.scores[-1].dense == pytest.approx(float(np.mean(images)), abs=0.002)
    assert sweep.scores[-1].pruned != sweep.scores[-1].dense


def test_what_is_known_of_the_dense_model_is_not_drawn_again(build_pipeline: Callable[..., DiffusionPipeline]) -> None:
    sweep, told = sweep_tiny(build_pipeline("sd3"), dense_scores={1.0: 0.25, 6.0: 0.75})
    assert told[-1] == (8, 8)
    assert [entry.dense for entry in sweep.scores] == [0.25, 0.1, 0.75]
