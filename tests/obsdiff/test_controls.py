"""UNets that a ControlNet steers: calibrated with control pictures, cut, saved, exported and built with it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, MultiControlNetModel
from PIL import Image, ImageOps

import obsdiff
from kinds import masked_before_the_cut
from obsdiff import calibration
from obsdiff.cli import main
from obsdiff.families import controls, exporting, unet
from obsdiff.families.checking import problems
from obsdiff.families.table import FAMILIES
from obsdiff.recipe import Sampling
from obsdiff_export.build import BUILDERS, build
from obsdiff_export.onnx import export
from obsdiff_export.pattern import check
from obsdiff_export.profiles import profiles_for
from obsdiff_export.proof.receipt import load
from obsdiff_runtime.errors import ModelError
from obsdiff_runtime.pipeline import Pipeline

PROMPTS = ["a red circle", "a blue square", "a star"]
TEXT = "encoder_hidden_states"
SIZES = {"height": 32, "width": 48}
STEPS = 2
UNET = FAMILIES["unet"]
Build = Callable[..., Any]


def same(found: torch.nn.Module, expected: torch.nn.Module) -> bool:
    before, after = expected.state_dict(), found.state_dict()
    return before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def sampling(folder: Path | None) -> Sampling:
    files = () if folder is None else (str(folder / "a.jpg"), str(folder / "b.png"))
    given: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "batch_size": 3, "seed": 0}
    return Sampling(max_sequence_length=None, references=files, **given, **SIZES)


@pytest.mark.parametrize("kind", ["controlnet", "controlnet_xl"])
def test_calibration_draws_what_diffusers_draws_of_prompt_and_control_picture(
    kind: str, build_pipeline: Build, picture_folder: Path
) -> None:
    """Of a batch whose prompts have pictures of their own; without pictures, what it draws without a ControlNet."""
    pipeline = build_pipeline(kind)
    given = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent", **SIZES}
    for folder in (picture_folder, None):
        asked = sampling(folder)
        found = calibration.sample(pipeline, calibration.encode(pipeline, UNET, PROMPTS, asked), range(3), asked)
        for row, prompt in enumerate(PROMPTS):
            own, theirs = {}, controls.plain(pipeline)
            if folder is not None:
                image = Image.open(asked.references[row % 2]).convert("RGB")
                size = (SIZES["width"], SIZES["height"])
                own, theirs = {"image": ImageOps.fit(image, size, Image.Resampling.LANCZOS)}, pipeline
            with torch.no_grad():
                alone = theirs(prompt, generator=torch.Generator().manual_seed(row), **own, **given)[0]
            torch.testing.assert_close(found[row], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.stage("weights", "structured", "saved")
@pytest.mark.parametrize("kind", ["controlnet", "controlnet_xl"])
def test_a_steered_unet_is_pruned_on_control_pictures_cut_saved_and_loaded_by_diffusers_parts(
    kind: str, build_pipeline: Build, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, masked = build_pipeline(kind), masked_before_the_cut(monkeypatch)
    before = copy.deepcopy(pipeline.controlnet).state_dict()
    settings: dict[str, Any] = {"steps": STEPS, "draws": 1, "align": 4, "allocation": "uniform", **SIZES}
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
    assert pruned.to_json()["recipe"]["sampling"]["references"] == 2
    obsdiff.save(pruned, tmp_path / "out")
    loaded = obsdiff.load(tmp_path / "out")
    assert type(loaded) is type(pipeline)
    assert all(torch.equal(value, loaded.controlnet.state_dict()[name]) for name, value in before.items())
    pictures = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    results = []
    for each in (masked[0], pruned.denoiser, loaded.unet):
        loaded.unet = each
        with torch.no_grad():
            told = {
                "num_inference_steps": STEPS,
                "output_type": "latent",
                "generator": torch.Generator().manual_seed(0),
            }
            results.append(loaded("a red circle", image=pictures, **told)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(results[2], results[1])


@pytest.mark.parametrize("kind", ["controlnet", "controlnet_xl"])
def test_a_unet_that_runs_its_controlnet_is_what_the_family_says_and_draws_the_same_bits(
    kind: str, build_pipeline: Build, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of it runs its own ControlNet. Its graph gives what it gives."""
    pipeline, asked = build_pipeline(kind), sampling(picture_folder)
    joined: Any = controls.joined(pipeline)
    prompts = calibration.encode(pipeline, UNET, PROMPTS, asked)
    expected = calibration.sample(pipeline, prompts, range(3), asked)
    assert torch.equal(calibration.sample(joined, prompts, range(3), asked), expected)
    copied = copy.deepcopy(joined.unet)
    torch.nn.init.zeros_(controls.networks({"unet": copied})["controlnet"].controlnet_mid_block.weight)
    joined.unet, original = copied, joined.unet
    assert not torch.equal(calibration.sample(joined, prompts, range(3), asked), expected)
    assert torch.equal(calibration.sample(pipeline, prompts, range(3), asked), expected)
    assert all(
        same(getattr(controls.apart(joined), name), part) for name, part in controls.networks({"unet": copied}).items()
    )
    component, told = unet.component, controls.asked  # text of both networks counts as two, so it has to be two here
    monkeypatch.setattr(controls, "asked", lambda inputs, **more: told({**inputs, TEXT: inputs[TEXT].clone()}, **more))
    monkeypatch.setattr(
        unet,
        "component",
        lambda denoiser, **sizes: controls.component(component(denoiser, **sizes), denoiser, pipeline, 2),
    )
    assert problems(UNET, original) == []


@pytest.mark.slow
@pytest.mark.stage("engine", kind="controlnet")
def test_every_linear_of_both_networks_is_in_the_real_engine(build_pipeline: Build, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    pipeline = build_pipeline("controlnet")
    component = exporting.denoiser(pipeline, UNET, pipeline.unet, **SIZES)
    model = export(component, tmp_path / "unet", dtype=torch.float16)
    sizes = {"batch": (1, 2, 4), "height": (8, 16, 32), "width": (8, 24, 32), "text_tokens": 7}
    engine = build(
        model.path,
        tmp_path / "engines",
        builder=BUILDERS["tensorrt_rtx"],
        profiles=profiles_for(model.inputs, [sizes]),
        targets=("8.9",),
        patterns=check(model.path, 2, 4),
    )
    limits = engine.profiles[0]["controlnet_cond"]
    assert (limits.min, limits.opt, limits.max) == ((1, 12, 8, 8), (2, 12, 16, 24), (4, 12, 32, 32))
    proof = load(engine.receipt_path).proof
    assert {layer.dtype for layer in proof.layers} <= {"float16"}
    assert all(layer.layer for layer in proof.layers)
    names = {layer.weight for layer in proof.layers}
    for network in ("", "controlnet."):
        assert f"{network}down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.weight" in names


def test_a_folder_is_planned_exported_compared_and_drawn_by_its_bundle(
    exported: Callable[[str, str], Pipeline],
) -> None:
    pipeline = exported("controlnet", "a ControlNet steers this denoiser")
    assert pipeline.bundle.manifest.pipeline_class == "StableDiffusionControlNetPipeline"
    edges = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    with_one, without = (pipeline("a red circle", control=control).latents for control in (edges, None))
    assert np.abs(with_one - without).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("several", "controlnet is a MultiControlNetModel; a single ControlNetModel is exported"),
        ("pooled", "global_pool_conditions, which are not exported"),
        ("scale", "for 2 pixels a side of a latent pixel, and the VAE has 4"),
    ],
)
def test_what_is_not_exported_is_said(build_pipeline: Build, change: str, message: str) -> None:
    pipeline: DiffusionPipeline = build_pipeline("controlnet")
    if change == "several":
        pipeline.controlnet = MultiControlNetModel([pipeline.controlnet])
    elif change == "pooled":
        pipeline.controlnet.register_to_config(global_pool_conditions=True)
    else:
        pipeline.vae.register_to_config(block_out_channels=(8, 16, 16))
    with pytest.raises(ModelError, match=message):
        exporting.denoiser(pipeline, UNET, pipeline.unet, **SIZES)


def test_a_comparison_without_control_pictures_says_so(
    build_pipeline: Build, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_pipeline("controlnet").save_pretrained(tmp_path / "dense")
    (tmp_path / "prompts.txt").write_text("a red circle")
    small = ["--steps", "1", "--height", "32", "--width", "32"]
    line = [
        str(tmp_path / "dense"),
        "--method",
        "magnitude",
        "--sparsity",
        "2:4",
        "-o",
        str(tmp_path / "pruned"),
        *small,
    ]
    judged = [str(tmp_path / "pruned"), "--against", str(tmp_path / "dense"), "--eval-prompts", "1", *small]
    judged += ["--eval-prompts-file", str(tmp_path / "prompts.txt")]
    assert ended("prune", *line, "--prompts-file", str(tmp_path / "prompts.txt")) == 0
    capsys.readouterr()
    for more, says in (([], True), (["--references", str(picture_folder)], False)):
        assert ended("eval", *judged, *more) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert ("a ControlNet steers this denoiser, and this comparison draws without" in shown) == says


def ended(*line: str) -> int:
    """The exit code of `obsdiff`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["obsdiff", *line])
        with pytest.raises(SystemExit) as stopped:
            main()
    return int(stopped.value.code or 0)
