"""UNets that a ControlNet steers: calibrated with control pictures, cut, saved, exported and built with it."""

import contextlib
import copy
import dataclasses
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
from obsdiff import adapters, calibration, offloading, pruning, verbs
from obsdiff.adapters import Adapter, Delta
from obsdiff.cli import main
from obsdiff.evaluation import evaluate
from obsdiff.families import controls, exporting, unet
from obsdiff.families.checking import problems
from obsdiff.families.table import FAMILIES
from obsdiff.inspection import checkpoints
from obsdiff.job import given
from obsdiff.loading import load_pipeline
from obsdiff.manifest import read_manifest
from obsdiff.pruning import Pruned
from obsdiff.recipe import Sampling
from obsdiff.resolving import resolve
from obsdiff.results import PackageResult
from obsdiff.settings import Settings
from obsdiff.whatif.subject import subject_of
from obsdiff_export.build import BUILDERS, build
from obsdiff_export.onnx import export
from obsdiff_export.pattern import check
from obsdiff_export.profiles import profiles_for
from obsdiff_export.proof.receipt import load
from obsdiff_export.stored import is_stored
from obsdiff_runtime.errors import BundleError, ModelError
from obsdiff_runtime.pipeline import Pipeline

PROMPTS = ["a red circle", "a blue square", "a star"]
NETWORKS = ("unet", "controlnet")
TEXT = "encoder_hidden_states"
SIZES = {"height": 32, "width": 48}
STEPS = 2
UNET = FAMILIES["unet"]
SMALL: dict[str, Any] = {
    **{"steps": STEPS, "draws": 1, "align": 4, "allocation": "uniform", "batch_size": 3, "guidance_scale": 3.0},
    **SIZES,
}
Build = Callable[..., Any]
Prune = Callable[..., Pruned]


class Blocks:
    """A journal of what was done block by block, which is stopped at a number of them."""

    def __init__(self, done: dict[str, PackageResult], stop: int | None) -> None:
        self._done, self._stop = done, stop

    def read(self, key: str) -> PackageResult | None:
        return self._done.get(key)

    def write(self, key: str, result: PackageResult) -> None:
        if len(self._done) == self._stop:
            raise KeyboardInterrupt
        self._done[key] = result


def same(found: torch.nn.Module, expected: torch.nn.Module) -> bool:
    before, after = expected.state_dict(), found.state_dict()
    return before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def is_block_linear(name: str, module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) and "transformer_blocks" in name


@pytest.fixture
def steered(build_pipeline: Build, picture_folder: Path) -> Prune:
    """steered(sparsity, **settings): a small pipeline with a ControlNet, pruned on control pictures."""

    def run(sparsity: str, *, kind: str = "controlnet", **settings: Any) -> Pruned:
        asked = {**SMALL, "references": str(picture_folder), **settings}
        return obsdiff.prune(build_pipeline(kind), sparsity=sparsity, prompts=PROMPTS, **asked)

    return run


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
    """Both networks. What was masked draws what was cut; what was saved, as diffusers writes it, draws the same."""
    pipeline, masked = build_pipeline(kind), masked_before_the_cut(monkeypatch)
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
    cut = {name.partition("down_blocks")[0].rstrip(".") for name in pruned.kept if "down_blocks" in name}
    assert cut == {"controlnet", ""}
    assert pruned.pipeline is pipeline
    assert controls.of(pipeline.unet) is None
    assert pruned.to_json()["recipe"]["sampling"]["references"] == 2
    obsdiff.save(pruned, tmp_path / "out")
    loaded = obsdiff.load(tmp_path / "out")
    assert type(loaded) is type(pipeline)
    for name in NETWORKS:
        assert same(getattr(loaded, name), getattr(pipeline, name))
    pictures = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    results = []
    for networks in (controls.networks({"unet": masked[0]}), pipeline.components, loaded.components):
        loaded.unet, loaded.controlnet = (networks[name] for name in NETWORKS)
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


@pytest.mark.stage("weights", "saved", kind="controlnet")
@pytest.mark.parametrize("method", ["streamed", "obsdiff", "sparsegpt", "wanda", "magnitude", "dsnot"])
@pytest.mark.parametrize("sparsity", ["2:4", "0.5"])
def test_every_method_prunes_every_linear_of_both_networks_and_diffusers_loads_them(
    method: str, sparsity: str, steered: Prune, tmp_path: Path
) -> None:
    pruned = steered(sparsity, method=method)
    for name in NETWORKS:
        inside = [
            module for key, module in getattr(pruned.pipeline, name).named_modules() if is_block_linear(key, module)
        ]
        assert len(inside) == {"unet": 40, "controlnet": 20}[name]
        groups = torch.cat([module.weight.reshape(-1, 4) for module in inside])
        assert (
            ((groups == 0).sum(1) >= 2).all() if sparsity == "2:4" else abs((groups == 0).double().mean() - 0.5) < 0.01
        )
    obsdiff.save(pruned, tmp_path / "out")
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None, feature_extractor=None)
    for name in NETWORKS:
        assert same(getattr(theirs, name), getattr(pruned.pipeline, name))
        assert same(getattr(obsdiff.load(tmp_path / "out"), name), getattr(pruned.pipeline, name))
    records = read_manifest(tmp_path / "out" / "unet").linears
    assert sum(name.startswith(controls.PREFIX) for name in records) == 20
    assert not (tmp_path / "out" / "controlnet" / "obsdiff.json").exists()


@pytest.mark.parametrize("kind", ["controlnet", "controlnet_xl"])
def test_streamed_errs_least_with_a_pruned_controlnet(kind: str, build_pipeline: Build, steered: Prune) -> None:
    """In the velocity of prompts and noise that calibration has not seen: 7 and 5 times less than the paper's method,
    and 40 and 15 times less than magnitudes."""
    errors = {}
    for method in ("magnitude", "obsdiff", "streamed"):
        pruned = steered("2:4", method=method, kind=kind, draws=2)
        dense, after = (controls.joined(each) for each in (build_pipeline(kind), pruned.pipeline))
        networks = {"dense": dense.unet, "pruned": after.unet}  # type: ignore[attr-defined]
        unseen = dataclasses.replace(pruned.recipe.sampling, seed=1000, batch_size=2)
        found, _ = evaluate(after, UNET, **networks, prompts=["a green tree", "an old house"], sampling=unseen)
        errors[method] = found.velocity_error
        assert found.blocks[0].startswith(controls.PREFIX)
    assert errors["streamed"] < errors["obsdiff"] / 2
    assert errors["obsdiff"] < errors["magnitude"] / 2


@pytest.mark.parametrize("finished", [2, 5])
def test_a_killed_run_goes_on_to_the_same_bits_of_both(
    finished: int, build_pipeline: Build, picture_folder: Path
) -> None:
    """Killed behind the ControlNet's first block, and behind the UNet's second."""
    runs, kept = [], dict[str, Any]()
    for stop in (None, finished, None):
        journal = Blocks(kept if runs else {}, stop)
        loaded = given(build_pipeline("controlnet"), steered=True)
        asked = Settings(sparsity="structured:0.25+2:4", references=str(picture_folder), **SMALL)
        recipe = resolve(asked, model="m", family=UNET, defaults=loaded.defaults, prompts=PROMPTS)
        with contextlib.suppress(KeyboardInterrupt):
            runs.append(pruning.prune(loaded.pipeline, UNET, recipe, journal=journal))
    undisturbed, resumed = runs
    assert set(kept) == {"gradients", *(f"block-{block}" for block in range(6))}
    assert same(undisturbed.denoiser, resumed.denoiser)
    assert (undisturbed.kept, undisturbed.layers) == (resumed.kept, resumed.layers)


def test_a_controlnet_that_is_excluded_or_told_no_picture_stays_dense(
    build_pipeline: Build, steered: Prune, tmp_path: Path
) -> None:
    dense = build_pipeline("controlnet").controlnet
    for settings in ({"exclude": ["controlnet.*"]}, {"references": None}):
        pruned = steered("2:4", **settings)
        assert same(pruned.pipeline.controlnet, dense)  # type: ignore[attr-defined]
        assert len(pruned.layers) == 40
    obsdiff.save(pruned, tmp_path / "out")
    assert same(obsdiff.load(tmp_path / "out").controlnet, dense)  # type: ignore[attr-defined]
    assert not any(name.startswith("controlnet") for name in read_manifest(tmp_path / "out" / "unet").linears)


def test_what_is_told_of_a_folder_counts_both_networks(
    build_pipeline: Build, picture_folder: Path, tmp_path: Path
) -> None:
    """Where there are control pictures; a comparison without says that it leaves the ControlNet out."""
    pipeline = build_pipeline("controlnet")
    pipeline.save_pretrained(tmp_path / "dense")
    sizes = [sum(each.numel() for each in getattr(pipeline, name).parameters()) for name in NETWORKS]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    files = {"model": str(tmp_path / "dense"), "prompts_file": str(tmp_path / "prompts.txt")}
    asked = Settings(sparsity="structured:0.25+2:4", **files, **SMALL)
    with_pictures = dataclasses.replace(asked, references=str(picture_folder))
    planned, alone = verbs.plan(with_pictures), verbs.plan(asked)
    assert (planned.parameters_before, alone.parameters_before) == (sum(sizes), sizes[0])
    assert (len(planned.layers), len(alone.layers)) == (60, 40)
    assert planned.macs_before > 1.3 * alone.macs_before
    assert len(subject_of(asked).linears) == 60
    verbs.prune_to_folder(with_pictures, tmp_path / "out")
    both = sum((tmp_path / "out" / name / "diffusion_pytorch_model.safetensors").stat().st_size for name in NETWORKS)
    content = checkpoints.read(tmp_path / "out")
    assert content.denoiser == "unet UNet2DConditionModel, controlnet ControlNetModel"
    assert (content.parameters, content.bytes, content.notes) == (planned.parameters_after, both, ())
    assert sum(linear.pattern == "2:4" and "2:4" in linear.holds for linear in content.linears) == 60
    assert "60 of 60 linears were pruned" in (tmp_path / "out" / "README.md").read_text()
    compared = {"model": None, "sparsity": None, "eval_prompts": 1}
    for settings, parameters, notes in ((with_pictures, sum(sizes), 0), (asked, sizes[0], 1)):
        found = verbs.evaluate(tmp_path / "out", str(tmp_path / "dense"), dataclasses.replace(settings, **compared))
        (report,) = found.reports
        assert (report.dense.parameters, len(report.layers)) == (parameters, 60)
        assert sum("the ControlNet was pruned, too" in note for note in report.notes) == notes
    again = dataclasses.replace(with_pictures, model=str(tmp_path / "out"), sparsity="2:4")
    assert verbs.plan(again).parameters_before == planned.parameters_after
    assert verbs.plan(dataclasses.replace(again, model=str(tmp_path / "out" / "unet"), references=None)).layers
    verbs.prune_to_folder(again, tmp_path / "again")
    assert read_manifest(tmp_path / "again" / "unet").keep == read_manifest(tmp_path / "out" / "unet").keep


def test_a_model_pruned_by_its_name_is_given_back_as_diffusers_has_it(
    build_pipeline: Build, picture_folder: Path, tmp_path: Path
) -> None:
    build_pipeline("controlnet").save_pretrained(tmp_path / "dense")
    asked = {**SMALL, "references": str(picture_folder)}
    pruned: Any = obsdiff.prune(tmp_path / "dense", sparsity="2:4", method="magnitude", prompts=PROMPTS, **asked)
    assert controls.of(pruned.denoiser) is None
    pruned.pipeline.save_pretrained(tmp_path / "theirs")
    obsdiff.save(pruned, tmp_path / "ours")
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "theirs", safety_checker=None, feature_extractor=None)
    for name in NETWORKS:
        assert same(getattr(theirs, name), getattr(obsdiff.load(tmp_path / "ours"), name))


def test_a_lora_merged_into_the_unet_leaves_the_pruned_controlnet(steered: Prune, tmp_path: Path) -> None:
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
    delta = Delta(down=torch.ones(2, 64), up=torch.ones(16, 2), scale=0.1)
    adapters.write(Adapter(deltas={layer: delta}, others={}), tmp_path / "lora.safetensors", "unet")
    pruned = steered("structured:0.25+2:4")
    before = copy.deepcopy(pruned.denoiser)
    obsdiff.save(pruned, tmp_path / "out")
    verbs.lora(tmp_path / "out", tmp_path / "lora.safetensors", tmp_path / "merged")
    merged: Any = obsdiff.load(tmp_path / "merged")
    assert same(merged.controlnet, pruned.pipeline.controlnet)  # type: ignore[attr-defined]
    changed = [
        name for name, value in before.state_dict().items() if not torch.equal(value, merged.unet.state_dict()[name])
    ]
    assert changed == [f"{layer}.weight"]


def test_a_cut_controlnet_is_left_in_its_files_and_named_where_it_is_damaged(steered: Prune, tmp_path: Path) -> None:
    obsdiff.save(steered("structured:0.25"), tmp_path / "out")
    left = load_pipeline(tmp_path / "out", low_memory=True).pipeline
    assert all(is_stored(getattr(left, name)) for name in NETWORKS)
    (tmp_path / "out" / "controlnet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"controlnet/diffusion_pytorch_model\.safetensors is missing"):
        obsdiff.load(tmp_path / "out")


def test_blocks_of_both_come_and_go(build_pipeline: Build, steered: Prune, picture_folder: Path) -> None:
    """`--offload`: without a GPU from the host to itself."""
    loaded = given(build_pipeline("controlnet"), steered=True)
    offloading.place(loaded.pipeline, UNET, torch.device("cpu"))
    asked = Settings(sparsity="2:4", references=str(picture_folder), **SMALL)
    recipe = resolve(asked, model="m", family=UNET, defaults=loaded.defaults, prompts=PROMPTS)
    found = pruning.prune(loaded.pipeline, UNET, recipe)
    for name, network in controls.networks({"unet": found.denoiser}).items():
        assert same(network, getattr(steered("2:4").pipeline, name))


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
    held = {found.name: found.holds for found in check(pipeline.bundle.onnx("unet"), 2, 4)}
    for network in ("", controls.PREFIX):
        inside = [
            holds for name, holds in held.items() if name.startswith(f"{network}down_blocks") and ".attentions." in name
        ]
        assert (len(inside), sum(inside)) == (12, 10)  # all but the projections around the blocks


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
