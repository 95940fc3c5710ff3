"""Images that share runs of the denoiser, each at a step of its own, are what they are alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from obsdiff_runtime.errors import CancelledError, RunError
from obsdiff_runtime.pipeline import Pipeline

ORDERS: list[dict[str, Any]] = [
    {"prompt": "a large red circle above a small blue square", "seed": 1, "num_inference_steps": 5},
    {"prompt": "a small green triangle", "seed": 2, "num_inference_steps": 3, "guidance_scale": 1.0},
    {"prompt": "two yellow stars", "seed": 3, "num_inference_steps": 4, "guidance_scale": 2.0},
]


@pytest.fixture
def pipeline(pair: tuple[Any, Path]) -> Pipeline:
    return Pipeline(pair[1], threads=1)


def test_images_that_join_at_different_times_are_what_they_are_alone(pipeline: Pipeline) -> None:
    alone = [pipeline(**order) for order in ORDERS]
    joined = [pipeline.begin(**order)[0] for order in ORDERS]
    for count in range(1, len(joined) + 1):  # one more joins at each step
        pipeline.step([drawing for drawing in joined[:count] if not drawing.is_over])
    while active := [drawing for drawing in joined if not drawing.is_over]:
        pipeline.step(active)
    for drawing, images in zip(joined, alone, strict=True):
        assert drawing.error is None
        # float32 products of several rows may sum in another order
        np.testing.assert_allclose(drawing.sample, images.latents[0], rtol=0, atol=2e-5 * np.abs(images.latents).max())
        assert np.abs(pipeline.decode(drawing.sample).astype(int) - images.arrays[0].astype(int)).max() <= 1


def test_only_equal_shapes_go_together(pipeline: Pipeline) -> None:
    small, large = (pipeline.begin("a", height=side, width=32)[0] for side in (32, 16))
    other = pipeline.begin("b", height=32, width=32, seed=9, num_inference_steps=7)[0]
    assert small.shapes == other.shapes != large.shapes


def test_every_step_is_told_and_false_cancels(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int, float]] = []

    def note(done: int, calls: int, latents: np.ndarray) -> bool:
        seen.append((done, calls, float(latents.mean())))
        return done < 3

    with pytest.raises(CancelledError, match="cancelled after step 3 of"):
        pipeline("a", num_inference_steps=5, on_step=note)
    assert [done for done, _, _ in seen] == [1, 2, 3]
    assert len({mean for _, _, mean in seen}) == 3


def test_one_that_is_not_finite_leaves_the_others_alone(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = (pipeline.begin("a", seed=seed)[0] for seed in (1, 2))
    run = pipeline.networks.run

    def poisoned(
        component: str, inputs: Mapping[str, Any], outputs: Sequence[str], *, finite: bool = True
    ) -> dict[str, Any]:
        found = run(component, inputs, outputs, finite=finite)
        found[outputs[0]] = found[outputs[0]].copy()
        found[outputs[0]][-1, 0, 0, 0] = np.nan
        return found

    monkeypatch.setattr(pipeline.networks, "run", poisoned)
    pipeline.step([good, bad])
    assert good.error is None
    assert good.index == 1
    assert isinstance(bad.error, RunError)
    assert "1 of" in str(bad.error)
    assert bad.is_over
