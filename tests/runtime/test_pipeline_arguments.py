from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from obsdiff_runtime.backends.ort import OrtSession
from obsdiff_runtime.bundle import open_bundle
from obsdiff_runtime.errors import CompatibilityError, ConfigError, RunError
from obsdiff_runtime.kinds.table import kind_of
from obsdiff_runtime.pictures import read_picture
from obsdiff_runtime.pipeline import Pipeline

GREY = np.full((32, 32, 3), 128, np.uint8)
CHEAP: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipeline(sd3_bundle: Path) -> Pipeline:
    return Pipeline(open_bundle(sd3_bundle), threads=1)


def test_an_image_does_not_depend_on_its_batch(pipeline: Pipeline) -> None:
    alone = pipeline("a small green triangle", seed=3, **CHEAP)
    batch = pipeline("a small green triangle", seed=3, num_images=3, **CHEAP)
    assert len(batch) == 3
    np.testing.assert_allclose(batch.latents[:1], alone.latents, atol=1e-5)  # kernels may sum in another order
    assert np.abs(batch.latents[0] - batch.latents[1]).max() > 0.1
    assert np.abs(pipeline("a small green triangle", seed=4, **CHEAP).latents - alone.latents).max() > 0.1


def test_a_seed_always_gives_the_same_image(pipeline: Pipeline) -> None:
    first, second = (pipeline("a small green triangle", seed=7, **CHEAP) for _ in range(2))
    np.testing.assert_array_equal(first.arrays, second.arrays)


def test_defaults_are_the_bundle_s(pipeline: Pipeline) -> None:
    told: list[tuple[str, int, int]] = []
    images = pipeline("red", progress=lambda stage, done, total, note="": told.append((stage, done, total)))
    assert images.arrays.shape == (1, 32, 32, 3)
    assert [entry for entry in told if entry[0] == "denoise"] == [("denoise", step, 4) for step in range(1, 5)]
    assert told[-1] == ("decode", 1, 1)
    assert set(images.seconds) == {"text", "denoise", "decode"}
    assert images.pil()[0].size == (32, 32)


def test_sessions_are_loaded_when_first_used(sd3_bundle: Path) -> None:
    fresh = Pipeline(open_bundle(sd3_bundle, "sizes"), threads=1)
    assert fresh.networks.load_seconds == {}
    first = fresh("red", **CHEAP)
    assert set(first.load_seconds) == {"text_encoder", "text_encoder_2", "transformer", "vae_decoder"}
    assert fresh("red", **CHEAP).load_seconds == {}


def test_what_the_sampler_refuses_is_said_before_anything_is_loaded(sd3_bundle: Path) -> None:
    fresh = Pipeline(open_bundle(sd3_bundle, "sizes"), threads=1)
    with pytest.raises(ConfigError, match="eta is for DDIMScheduler and TCDScheduler"):
        fresh("red", eta=0.5)
    assert fresh.networks.load_seconds == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 30}, "height should be a multiple of 4, not 30; near are 28, 32"),
        ({"width": 0}, "width should be a multiple of 4, not 0; near are 4, 8"),
        ({"width": 64}, "width should be at most 32 for this model, not 64"),
        ({"num_inference_steps": 0}, "num_inference_steps should be at least 1"),
        ({"num_inference_steps": 2**40}, "num_inference_steps should be at most 100000, not 1099511627776"),
        ({"guidance_scale": float("nan")}, "guidance_scale should be a finite number"),
        ({"max_sequence_length": 0}, "max_sequence_length should be at least 1"),
        ({"max_sequence_length": 2**40}, "max_sequence_length should be at most 100000"),
        ({"num_images": 0}, "num_images should be at least 1"),
        ({"num_images": 2**40}, "num_images should be at most 100000"),
        ({"seed": -1}, "seed should not be negative"),
        ({"seed": [1, 2]}, "2 seeds for 1 images"),
        ({"noise_source": "jax"}, "no noise 'jax'; there is numpy, torch"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"latents": np.zeros((1, 4, 8, 8), np.float32)}, r"latents should be \(1, 4, 16, 16\)"),
        ({"strength": 0.5}, "strength says how much of an image is changed, and there is no image"),
        ({"image": GREY, "strength": 0.0}, "strength should be above 0 and at most 1, not 0"),
        ({"image": GREY, "strength": 1.5}, "strength should be above 0 and at most 1, not 1.5"),
        ({"image": GREY, "height": 16}, "height 16 is not that of the image, 32; resize it before"),
        ({"image": GREY[:30]}, "height should be a multiple of 4, not 30"),
        ({"image": GREY[..., :1]}, r"image should be \(height, width, 3\) of uint8, not \(32, 32, 1\) of uint8"),
    ],
)
def test_an_argument_it_cannot_take_is_explained(pipeline: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline("red", **options)


@pytest.mark.parametrize(("prompt", "message"), [([], "there is no prompt"), ([3], "a prompt should be text, not int")])
def test_a_prompt_that_is_none_is_explained(pipeline: Pipeline, prompt: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline(prompt)


def test_no_threads_and_an_unknown_backend_are_errors(sd3_bundle: Path) -> None:
    opened = open_bundle(sd3_bundle, "sizes")
    with pytest.raises(ConfigError, match="threads should be at least 1"):
        Pipeline(opened, threads=0)
    with pytest.raises(ConfigError, match="threads should be at most 100000"):
        Pipeline(opened, threads=2**40)
    with pytest.raises(ConfigError, match="no backend 'cuda'"):
        Pipeline(opened, backend="cuda")


def test_an_unknown_pipeline_lists_the_known() -> None:
    with pytest.raises(CompatibilityError, match=r"cannot sample a CogView3PlusPipeline; it can StableDiff"):
        kind_of("CogView3PlusPipeline")


@pytest.mark.parametrize(("component", "output"), [("transformer", "out_hidden_states"), ("vae_decoder", "sample")])
def test_a_nan_names_the_component_and_draws_no_black_image(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, component: str, output: str
) -> None:
    run = OrtSession.run

    def broken(
        self: OrtSession, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        results = run(self, inputs, outputs)
        if output in results and self._name == component:
            results[output].flat[0] = np.nan
        return results

    monkeypatch.setattr(OrtSession, "run", broken)
    with pytest.raises(
        RunError, match=rf"{component}: 1 of \d+ values of its output {output} are not finite; .*float32"
    ):
        pipeline("red", **CHEAP)


def test_a_bundle_without_an_encoder_changes_no_image(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.networks, "has", lambda component: False)
    with pytest.raises(CompatibilityError, match="this bundle has no VAE encoder"):
        pipeline("red", image=GREY, **CHEAP)


def test_progress_counts_the_steps_that_are_taken(pipeline: Pipeline) -> None:
    told: list[tuple[int, int]] = []
    pipeline("red", image=GREY, strength=0.5, on_step=lambda done, calls, latents: told.append((done, calls)))
    assert told == [(1, 2), (2, 2)]


def test_image_files_come_in_any_format_and_fit_the_model(tmp_path: Path) -> None:
    Image.new("L", (35, 26), 128).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", 4).shape == (24, 32, 3)
    assert read_picture(tmp_path / "a.png", 4, height=8, width=12).shape == (8, 12, 3)
    with pytest.raises(ConfigError, match="35 x 26 pixels, and the model draws no fewer than 64"):
        read_picture(tmp_path / "a.png", 64)
    (tmp_path / "b.png").write_text("no image")
    for name in ("b.png", "none.png"):
        with pytest.raises(ConfigError, match=f"{name}: no image that can be read"):
            read_picture(tmp_path / name, 4)
