"""Denoisers that are told what stays of a picture: calibrated on boxes that are drawn anew, cut, saved, built."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import obsdiff
from kinds import masked_before_the_cut
from obsdiff import calibration
from obsdiff.families import exporting, fills
from obsdiff.families.table import family_of
from obsdiff.recipe import Sampling
from obsdiff_export.build import BUILDERS, build
from obsdiff_export.onnx import export
from obsdiff_export.pattern import check
from obsdiff_export.profiles import profiles_for
from obsdiff_export.proof.receipt import load
from obsdiff_runtime.pipeline import Pipeline

PROMPTS = ["a red circle", "a blue square", "a star"]
SIZES = {"height": 32, "width": 48}
STEPS = 2
KINDS = ("inpaint", "inpaint_xl", "fill")
Build = Callable[..., Any]


def denoiser_of(pipeline: Any) -> Any:
    return pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet


def sampling(kind: str, folder: Path | None) -> Sampling:
    files = () if folder is None else (str(folder / "a.jpg"), str(folder / "b.png"))
    given: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "batch_size": 3, "seed": 0}
    return Sampling(max_sequence_length=6 if kind == "fill" else None, references=files, **given, **SIZES)


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_draws_a_box_of_each_picture_anew_or_all_of_it(
    kind: str, build_pipeline: Build, picture_folder: Path
) -> None:
    """What the denoiser is told beside the latents, call by call."""
    pipeline = build_pipeline(kind)
    denoiser = denoiser_of(pipeline)
    family = family_of(denoiser)
    for folder in (picture_folder, None):
        asked, seen = sampling(kind, folder), list[torch.Tensor]()

        def see(_: Any, args: Any, kwargs: dict[str, Any], seen: list[torch.Tensor] = seen) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        hook = denoiser.register_forward_pre_hook(see, with_kwargs=True)
        calibration.sample(pipeline, calibration.encode(pipeline, family, PROMPTS, asked), range(3), asked)
        hook.remove()
        boxes = fills.boxes(range(3), **SIZES) if folder is not None else torch.ones(3, 1, *SIZES.values())
        for call in seen:
            # tokens, behind the latents the mask, whose pixels are packed as channels are; or one channel of it
            masks = (call[..., -16:] if kind == "fill" else call[-3:, 4]).mean(dim=(1, 2))
            torch.testing.assert_close(masks, boxes.mean(dim=(1, 2, 3)), rtol=0, atol=0.02 if kind == "fill" else 0.06)
        assert len(seen) >= STEPS
    assert 0.05 < fills.boxes(range(9), **SIZES).mean() < 0.6


@pytest.mark.stage("weights", "structured", "saved")
@pytest.mark.parametrize("kind", KINDS)
def test_a_denoiser_that_is_told_what_stays_is_pruned_cut_and_comes_back(
    kind: str, build_pipeline: Build, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, masked = build_pipeline(kind), masked_before_the_cut(monkeypatch)
    settings: dict[str, Any] = {"steps": STEPS, "draws": 1, "align": 4, "allocation": "uniform", **SIZES}
    settings |= {"max_sequence_length": 6} if kind == "fill" else {}
    pruned = obsdiff.prune(
        pipeline,
        sparsity="structured:0.25+2:4",
        prompts=PROMPTS,
        references=str(picture_folder),
        protect_first=0,
        protect_last=0,
        **settings,
    )
    assert pruned.kept
    obsdiff.save(pruned, tmp_path / "out")
    loaded = denoiser_of(obsdiff.load(tmp_path / "out"))
    family = family_of(loaded)
    told = family.arguments(family.example(loaded, batch=2, size=(16, 24), text_tokens=7, pixels=(32, 48)))
    if kind == "fill":
        told["guidance"] = torch.tensor([3.0, 2.0])
    with torch.no_grad():
        results = [each(**told, return_dict=False)[0] for each in (masked[0], pruned.denoiser, loaded)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(results[2], results[1])


@pytest.mark.slow
@pytest.mark.stage("engine")
@pytest.mark.parametrize("kind", ["inpaint", "fill"])
def test_the_real_builder_takes_what_stays_as_an_input(kind: str, build_pipeline: Build, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    pipeline = build_pipeline(kind)
    denoiser = denoiser_of(pipeline)
    component = exporting.denoiser(pipeline, family_of(denoiser), denoiser, **SIZES)
    model = export(component, tmp_path / "denoiser", dtype=torch.float16)
    sizes = {"batch": (1, 2, 4), "height": (8, 16, 32), "width": (8, 24, 32), "text_tokens": 7}
    engine = build(
        model.path,
        tmp_path / "engines",
        builder=BUILDERS["tensorrt_rtx"],
        profiles=profiles_for(model.inputs, [sizes]),
        targets=("8.9",),
        patterns=check(model.path, 2, 4),
    )
    channels = 8 if kind == "fill" else 5
    limits = engine.profiles[0]["fill_states"]
    assert (limits.min, limits.max) == ((1, channels, 8, 8), (4, channels, 32, 32))
    proof = load(engine.receipt_path).proof
    assert all(layer.layer for layer in proof.layers)
    assert {layer.dtype for layer in proof.layers} <= {"float16"}


def test_a_folder_is_planned_exported_compared_and_drawn_by_its_bundle(
    exported: Callable[[str, str], Pipeline],
) -> None:
    pipeline = exported("inpaint", "this denoiser is told what stays of a picture")
    assert pipeline.bundle.manifest.pipeline_class == "StableDiffusionInpaintPipeline"
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    redrawn = np.arange(48) < np.full((32, 1), 20)
    one, other = (pipeline("a star", image=picture, mask=redrawn).latents for picture in (image, 255 - image))
    assert np.abs(one - other).max() > 1e-3


def test_a_pipeline_that_inpaints_with_four_channels_keeps_the_rest_itself(
    build_pipeline: Build, picture_folder: Path
) -> None:
    pipeline = build_pipeline("inpaint", in_channels=4)
    pruned = obsdiff.prune(
        pipeline, sparsity="2:4", prompts=PROMPTS, references=str(picture_folder), steps=STEPS, draws=1, **SIZES
    )
    assert pruned.layers
    assert "fill_states" not in exporting.denoiser(pipeline, family_of(pipeline.unet), pipeline.unet, **SIZES).inputs
