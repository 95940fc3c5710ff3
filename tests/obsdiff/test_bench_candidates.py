"""What `obsdiff bench` measures beside bundles: pipelines in torch; and the page it writes."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from torch import nn

from obsdiff import candidates
from obsdiff.bench_page import page
from obsdiff.candidates import Terms, open_candidates
from obsdiff.loading import load_pipeline
from obsdiff.pipeline_runner import PipelineRunner
from obsdiff_runtime.benchmark import bench
from obsdiff_runtime.benchmark.runner import Request
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.vitals import Sensors

REQUEST = Request(
    prompt="a red circle",
    num_images=1,
    num_inference_steps=2,
    guidance_scale=3.0,
    height=32,
    width=32,
    max_sequence_length=4,
    seed=5,
)
QUIET = Sensors(gpu=lambda index: None, resident_bytes=lambda: None, cpu_time=lambda: None, load_average=lambda: 0.0)


def drawn_by_diffusers(folder: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    pipeline: Any = load_pipeline(folder, dtype=torch.float32).pipeline
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        REQUEST.prompt,
        num_inference_steps=REQUEST.num_inference_steps,
        guidance_scale=REQUEST.guidance_scale,
        height=REQUEST.height,
        width=REQUEST.width,
        max_sequence_length=REQUEST.max_sequence_length,
        generator=torch.Generator("cpu").manual_seed(REQUEST.seed),
    ).images
    return np.asarray(images[0])


def test_a_pipeline_draws_what_diffusers_draws_and_its_parts_are_timed(sd3_folder: Path) -> None:
    runner = PipelineRunner(sd3_folder)
    runner.check(REQUEST)
    loaded = runner.load(REQUEST)
    drawn = runner.draw(REQUEST)
    assert np.array_equal(drawn.pictures[0], drawn_by_diffusers(sd3_folder))
    assert {"text_encoder", "text_encoder_2", "transformer", "vae_decoder"} == set(drawn.components)
    assert len(drawn.components["transformer"]) == REQUEST.num_inference_steps
    assert len(drawn.components["vae_decoder"]) == 1
    assert 0 < drawn.components["transformer"][0] < drawn.first_step_seconds
    assert (loaded.dtype, set(loaded.devices.values()), loaded.gpu) == ("float32", {"CPU"}, None)
    assert runner.subject.sparsity == "dense"
    assert runner.device_memory() is None


def test_a_pipeline_that_guides_by_another_name_is_guided(build_pipeline: Callable[..., Any], tmp_path: Path) -> None:
    build_pipeline("qwen").save_pretrained(tmp_path)
    runner, request = PipelineRunner(tmp_path), replace(REQUEST, max_sequence_length=240)
    runner.load(request)
    drawn = runner.draw(request)
    assert len(drawn.components["transformer"]) == 2 * REQUEST.num_inference_steps


def test_an_editor_that_draws_nothing_without_a_picture_is_told_a_grey_one(
    build_pipeline: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 32 * 32)
    build_pipeline("qwen_edit").save_pretrained(tmp_path)
    runner, request = PipelineRunner(tmp_path), replace(REQUEST, max_sequence_length=None)
    runner.load(request)
    assert len(runner.draw(request).components["transformer"]) == 2 * REQUEST.num_inference_steps


def test_a_controlnet_has_a_picture_and_counts_to_the_denoiser_as_in_a_bundle(
    build_pipeline: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = ControlNetModel.forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.05)
        return forward(*args, **kwargs)

    monkeypatch.setattr(ControlNetModel, "forward", slow)
    pipeline = build_pipeline("controlnet")
    pipeline.save_pretrained(tmp_path)
    runner, request = PipelineRunner(tmp_path), replace(REQUEST, max_sequence_length=None)
    runner.load(request)
    drawn, grey = runner.draw(request), Image.new("RGB", (32, 32), (127,) * 3)
    given = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(5)}
    expected = pipeline(request.prompt, image=grey, output_type="np", **given).images[0]
    assert np.abs(drawn.pictures[0] / 255 - expected).max() < 0.003, "rounded to 256 values"
    assert [seconds > 0.05 for seconds in drawn.components["unet"]] == [True, True]
    assert len(drawn.components["vae_decoder"]) == 1, "with the convolution before it"


def test_compiled_means_every_block(sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *_, **__: compiled.append(type(self).__name__))
    runner = PipelineRunner(sd3_folder, compiled=True)
    runner.load(REQUEST)
    assert compiled == ["JointTransformerBlock"] * 3
    assert runner.subject.backend == "torch.compile"


@pytest.mark.parametrize(
    ("text", "terms", "says"),
    [
        ("torch:model", Terms(), "there is no kind 'torch'; there are diffusers, compiled, and bundles by folder"),
        ("bundle", Terms(dtype="fp16"), "--dtype fp16 is for pipelines in torch, and none is named"),
        ("bundle", Terms(device="cuda"), "--device cuda is for pipelines in torch"),
        ("diffusers:none", Terms(dtype="fp8"), "--dtype fp8: torch candidates take fp32, fp16, bf16"),
        ("diffusers:none", Terms(threads=0), "threads should be at least 1, not 0"),
        ("diffusers:none", Terms(), "none"),
    ],
)
def test_what_names_no_candidate_is_refused(text: str, terms: Terms, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        open_candidates([text], terms)


def test_a_size_that_the_pipeline_cannot_draw_is_refused(sd3_folder: Path) -> None:
    runner = PipelineRunner(sd3_folder)
    for wrong in ({"height": 33}, {"num_inference_steps": 0}, {"width": 0}):
        with pytest.raises(ConfigError):
            runner.check(Request(**{**vars(REQUEST), **wrong}))


def test_a_kind_without_a_model_is_the_shipped_pipeline() -> None:
    (runner,) = open_candidates(["diffusers:"], Terms())
    assert runner.subject.name == "diffusers:shapes"
    assert set(candidates.KINDS) == {"diffusers", "compiled"}


def test_the_page_shows_every_candidate_and_its_verdict(fake_runner: Callable[..., Any]) -> None:
    def noisy(seconds: float) -> Iterator[float]:
        random = np.random.default_rng(0)
        return (seconds * (1 + 0.02 * random.random()) for _ in repeat(None))

    report = bench(fake_runner("dense", noisy(4)), fake_runner("<b>cut", noisy(2)), iterations=8, sensors=QUIET)
    html = page(report, "obsdiff bench dense cut")
    assert "&lt;b&gt;cut is faster than dense: 2.0" in html
    assert "<b>cut" not in html
    assert "obsdiff bench dense cut" in html
    assert ">nan" not in html
    assert "https:" not in html
