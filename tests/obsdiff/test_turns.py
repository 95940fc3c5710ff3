"""Pipelines whose denoisers take turns (Wan 2.2): each is pruned on its own steps, and all of it goes all the way."""

import contextlib
import copy
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

import obsdiff
from kinds import masked_before_the_cut
from obsdiff import adapters, allocation, calibration, precision, pruning, trajectories, turns, verbs
from obsdiff.adapters import Adapter, Delta
from obsdiff.cli import main
from obsdiff.core import timesteps
from obsdiff.evaluation import Evaluation, evaluate
from obsdiff.families import wan
from obsdiff.inspection import checkpoints
from obsdiff.loading import load_pipeline
from obsdiff.pipeline_runner import PipelineRunner
from obsdiff.precision import separate
from obsdiff.pruning import Pruned
from obsdiff.recipe import Sampling
from obsdiff.sampling import Pair
from obsdiff.settings import Settings
from obsdiff.verbs import Exported
from obsdiff.whatif import run
from obsdiff.whatif.subject import subject_of
from obsdiff_export.formats import FORMATS
from obsdiff_export.linears import weights_of
from obsdiff_export.pattern import check
from obsdiff_export.quantizing import imitated
from obsdiff_runtime.benchmark.runner import Request
from obsdiff_runtime.bundle import open_bundle
from obsdiff_runtime.errors import CalibrationError, ConfigError, ModelError
from obsdiff_runtime.pipeline import Pipeline

PROMPTS = ["a red dog", "a cat"]
NAMES = ("transformer", "transformer_2")
SMALL: dict[str, Any] = {"steps": 4, "height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 8}
SCALES: dict[str, Any] = {"guidance_scale": 4.0, "guidance_scale_2": 3.0}
CUT: dict[str, Any] = {"sparsity": "ffn:0.25+2:4", "allocation": "uniform", "protect_first": 0, "protect_last": 0}
CONFIG = Path(__file__).parent / "configs" / "wan22_a14b.json"

Build = Callable[..., Any]


def sampling(steps: int = 4) -> Sampling:
    return Sampling(
        num_inference_steps=steps,
        guidance_scale=4.0,
        guidance_scale_2=3.0,
        height=32,
        width=32,
        num_frames=5,
        max_sequence_length=8,
        batch_size=2,
        seed=0,
    )


def drawn(pipeline: Any, **options: Any) -> Any:
    """What diffusers draws of a cat."""
    given = {"num_inference_steps": 4, "height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 8}
    seeded = torch.Generator().manual_seed(3)
    return pipeline(prompt="a cat", generator=seeded, **given, **SCALES, **options).frames


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {}


@pytest.fixture
def cut(build_pipeline: Build, made: dict[str, Any]) -> tuple[Pruned, dict[str, torch.nn.Module]]:
    """The pipeline pruned by the default method, and its denoisers before they were cut; made once."""
    if "pruned" not in made:
        with pytest.MonkeyPatch.context() as patch:
            masked = masked_before_the_cut(patch)
            given = {"prompts": PROMPTS, "align": 4, "draws": 1, **CUT, **SMALL, **SCALES}
            made["pruned"] = obsdiff.prune(build_pipeline("wan22", num_layers=1), **given)
        made["masked"] = dict(zip(reversed(NAMES), masked, strict=True))
    return made["pruned"], made["masked"]


@pytest.fixture
def folder(cut: tuple[Pruned, Any], tmp_path: Path) -> Path:
    obsdiff.save(cut[0], tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.fixture
def dense(build_pipeline: Build, tmp_path: Path) -> Path:
    build_pipeline("wan22", num_layers=1).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_steps_are_shared_by_the_timesteps_that_a_sampler_visits() -> None:
    both = {"transformer": 875.0, "transformer_2": 0.0}
    assert turns.steps_of(both, [999, 875, 874, 0], 4) == {"transformer": range(2), "transformer_2": range(2, 4)}
    twice = [999, 950, 950, 800, 800, 300, 300]  # Heun's: of 4 steps the last visits one timestep
    assert turns.steps_of(both, twice, 4) == {"transformer": range(2), "transformer_2": range(2, 4)}
    assert turns.steps_of(both, [999, 900], 2) == {"transformer": range(2), "transformer_2": range(2, 2)}
    assert turns.steps_of({"unet": 0.0}, [999, 500, 0], 3) == {"unet": range(3)}


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_denoiser_is_looked_at_in_its_own_calls(name: str, build_pipeline: Build) -> None:
    """As a hook sees them in a plain run. Behind its turn no other computes."""
    pipeline, plain, computed = build_pipeline("wan22"), [], []
    family = turns.placed(wan, name)
    prompts = calibration.encode(pipeline, family, PROMPTS, sampling())
    hook = getattr(pipeline, name).register_forward_pre_hook(
        lambda _, __, told: plain.append(told["hidden_states"].clone()), with_kwargs=True
    )
    calibration.sample(pipeline, prompts, range(2), sampling())
    hook.remove()
    for each in NAMES:
        getattr(pipeline, each).proj_out.register_forward_hook(lambda *_, each=each: computed.append(each))
    calls = trajectories.record(pipeline, family, prompts, sampling(), computed_steps=4, kept_steps=4)
    assert [call.step for call in calls] == {"transformer": [0, 1], "transformer_2": [2, 3]}[name]
    for index, call in enumerate(calls):
        assert torch.equal(call.arguments[1]["hidden_states"], torch.cat(plain[2 * index : 2 * index + 2]))
    assert computed == ["transformer"] * 4 + ["transformer_2"] * (4 if name == "transformer_2" else 0)


@torch.no_grad()
@pytest.mark.parametrize(("name", "steps"), [("transformer", (0, 1)), ("transformer_2", (2, 3))])
def test_tokens_of_a_denoiser_have_the_weights_of_its_steps(
    name: str, steps: tuple[int, int], build_pipeline: Build
) -> None:
    pipeline, seen = build_pipeline("wan22"), []
    family = turns.placed(wan, name)
    linear = wan.linears(pipeline.transformer)[0]
    prompts = calibration.encode(pipeline, family, PROMPTS, sampling())
    getattr(pipeline, name).get_submodule(linear.name).register_forward_pre_hook(
        lambda _, told: seen.append(told[0].double().flatten(0, -2))
    )
    found = calibration.calibrate(pipeline, family, [linear], prompts, sampling(), time_weights="log-decrease")
    weights = [float(timesteps.weights("log-decrease", 4)[step]) for step in steps for _ in range(2)]  # two calls each
    expected = sum(weight * rows.T @ rows for weight, rows in zip(weights, seen, strict=True))
    total = sum(weight * len(rows) for weight, rows in zip(weights, seen, strict=True))
    torch.testing.assert_close(found[linear.reads].matrix.double(), expected / total, rtol=1e-5, atol=1e-5)


def test_a_denoiser_that_takes_no_step_is_not_pruned(build_pipeline: Build) -> None:
    with pytest.raises(CalibrationError, match="transformer_2 takes none of 1 steps; take more of them"):
        obsdiff.prune(build_pipeline("wan22"), prompts=PROMPTS, sparsity="2:4", **{**SMALL, "steps": 1})


@torch.no_grad()
@pytest.mark.stage("weights", "structured", "saved", kind="wan22")
def test_both_are_pruned_cut_saved_and_loaded(cut: tuple[Pruned, dict[str, Any]], folder: Path) -> None:
    pruned, masked = cut
    loaded: Any = obsdiff.load(folder)
    assert [each.family.denoiser for each in pruned.turns] == list(NAMES)
    told = wan.example(masked["transformer"], batch=2, size=(2, 8, 8), text_tokens=7, pixels=(32, 32))
    for each in pruned.turns:
        name, denoiser = each.family.denoiser, each.denoiser
        expected = masked[name](**told).sample
        found = denoiser(**told).sample
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()  # fewer terms, in another order
        assert each.kept.keys() == {"blocks.0.ffn.neurons"}
        for layer in each.layers:
            if layer.pattern.endswith("2:4"):
                weight = denoiser.get_submodule(layer.name).weight
                assert bool(((weight.unflatten(1, (-1, 4)) == 0).sum(-1) >= 2).all()), layer.name
        assert torch.equal(getattr(loaded, name)(**told).sample, found)
    assert pruned.kept != pruned.behind[0].kept
    index = json.loads((folder / "model_index.json").read_text())
    assert index["boundary_ratio"] == 0.875
    manifests = [json.loads((folder / name / "obsdiff.json").read_text()) for name in NAMES]
    assert [manifest["recipe"]["sampling"]["guidance_scale_2"] for manifest in manifests] == [3.0, 3.0]
    assert manifests[0]["groups"] != manifests[1]["groups"]
    assert set(load_pipeline(folder).behind) == {"transformer_2"}


def test_each_is_fitted_as_if_the_other_were_dense(cut: tuple[Pruned, Any], build_pipeline: Build) -> None:
    """What comes of the second does not depend on the first, nor the other way round: both look at dense films."""
    pruned, _ = cut
    pipeline = build_pipeline("wan22", num_layers=1)
    alone = pruning._prune(
        pipeline, wan, pruned.recipe, stored=torch.float32, journal=None, scratch=None, progress=lambda *_, **__: None
    )
    found = pruned.denoiser.state_dict()
    assert all(torch.equal(weight, found[name]) for name, weight in alone.denoiser.state_dict().items())


@torch.no_grad()
def test_each_step_has_the_errors_of_the_denoiser_that_takes_it(build_pipeline: Build) -> None:
    pipeline = build_pipeline("wan22")
    pairs = {name: Pair(dense=getattr(pipeline, name), pruned=copy.deepcopy(getattr(pipeline, name))) for name in NAMES}
    for parameter in pairs["transformer_2"].pruned.get_submodule("proj_out").parameters():
        parameter.mul_(1.1)
    first = pairs.pop("transformer")
    asked: Any = {"dense": first.dense, "pruned": first.pruned, "behind": pairs, "prompts": PROMPTS[:1]}
    evaluation, images = evaluate(pipeline, wan, **asked, sampling=sampling())
    assert evaluation.velocity_error_per_step == pytest.approx([0, 0, 0.01, 0.01], rel=1e-3)
    assert evaluation.image_mse > 0
    assert pipeline.transformer is first.dense
    assert pipeline.transformer_2 is pairs["transformer_2"].dense
    pipeline.transformer_2 = pairs["transformer_2"].pruned
    seeded = torch.Generator().manual_seed(0)
    given = {"num_inference_steps": 4, "height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 8}
    film = pipeline(prompt=PROMPTS[0], generator=seeded, **given, **SCALES).frames[0]
    assert np.array_equal(images[0].pruned, np.rint(film[[0, 1, 3, 4]].reshape(4 * 32, 32, 3) * 255))


@torch.no_grad()
def test_a_pruned_folder_is_compared_with_both_dense_denoisers(folder: Path, dense: Path) -> None:
    report = verbs.evaluate(folder, str(dense), Settings(eval_prompts=1, **SMALL, **SCALES)).reports[0]
    assert isinstance(report.evaluation, Evaluation)
    assert all(error > 0 for error in report.evaluation.velocity_error_per_step)
    assert {layer.name.split(".")[0] for layer in report.layers} == set(NAMES)
    parts = [getattr(load_pipeline(dense).pipeline, name) for name in NAMES]
    assert report.dense.parameters == sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert report.pruned.parameters < report.dense.parameters


def test_weights_that_stay_in_their_files_are_exported_of_both(folder: Path) -> None:
    loaded = load_pipeline(folder, low_memory=True)
    assert {parameter.device.type for each in loaded.denoisers.values() for parameter in each.parameters()} == {"meta"}


def test_inspecting_a_folder_points_to_the_other_denoiser(folder: Path) -> None:
    found = checkpoints.read(folder)
    assert found.denoiser == "transformer WanTransformer3DModel"
    assert found.notes == (
        f"transformer_2 takes turns with transformer; obsdiff inspect {folder / 'transformer_2'} shows it",
    )
    assert checkpoints.read(folder / "transformer_2").sparsity == "ffn:0.25+2:4"


def test_blocks_of_both_come_and_go_where_the_gpu_holds_one(cut: tuple[Pruned, Any], dense: Path) -> None:
    """Without a GPU from the host to itself."""
    loaded = load_pipeline(dense, offload=True)
    found = pruning.prune(loaded.pipeline, wan, cut[0].recipe)
    for name, denoiser in found.denoisers.items():
        expected = cut[0].denoisers[name].state_dict()
        assert all(torch.equal(weight, expected[key]) for key, weight in denoiser.state_dict().items())


def test_a_killed_run_goes_on_behind_what_it_finished(dense: Path, tmp_path: Path) -> None:
    asked = Settings(model=str(dense), method="magnitude", **CUT, **SMALL)
    written: list[str] = []
    journal: Any = type(
        "Journal", (), {"read": lambda *_: None, "write": lambda _, package, __: written.append(package)}
    )
    loaded = load_pipeline(dense)
    recipe = verbs.open_job(asked).recipe
    pruning.prune(loaded.pipeline, wan, recipe, journal=journal())
    own = [package for package in written if not package.startswith("transformer_2-")]
    assert own
    assert [package for package in written if package not in own] == [f"transformer_2-{package}" for package in own]


def test_a_pipeline_in_torch_is_measured_denoiser_by_denoiser(dense: Path, build_pipeline: Build) -> None:
    runner = PipelineRunner(dense)
    told: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 4, "max_sequence_length": 8, "seed": 3}
    request = Request(height=32, width=32, num_images=1, num_frames=5, **told, **SCALES)
    runner.check(request)
    runner.load(request)
    found = runner.draw(request)
    assert np.array_equal(found.pictures, np.rint(drawn(build_pipeline("wan22", num_layers=1)) * 255).astype(np.uint8))
    assert {name: len(found.components[name]) for name in NAMES} == {"transformer": 4, "transformer_2": 4}


def test_both_are_rounded_by_ranges_of_films_drawn_in_float(dense: Path) -> None:
    """As each is where the other stays as it is; ranges are of the calls that a denoiser gets."""
    recipe = verbs.open_job(Settings(model=str(dense), sparsity="2:4", **SMALL, **SCALES)).recipe
    recipe = dataclasses.replace(recipe, prompts=tuple(PROMPTS))
    asked: dict[str, Any] = {"format": FORMATS["int8"], "dtype": torch.float32}
    pipeline: Any = load_pipeline(dense).pipeline
    found = precision.quantize_turns(pipeline, wan, recipe, **asked)
    assert list(found) == list(NAMES)
    for name, both in found.items():
        own: Any = load_pipeline(dense).pipeline
        alone = precision.quantize(own, turns.placed(wan, name), recipe, **asked)
        assert both.linears == alone.linears
        weights = getattr(own, name).state_dict()
        assert all(torch.equal(weight, weights[key]) for key, weight in getattr(pipeline, name).state_dict().items())
    inputs = [{name: scales.input for name, scales in each.quantization.linears.items()} for each in found.values()]
    assert all(inputs[0][name] != inputs[1][name] for name in inputs[0] if "ffn" in name)


def unlike(build_pipeline: Build) -> Any:
    """Denoisers of two blocks: in one of them the neurons of the first matter least, in the other the second's."""
    pipeline = build_pipeline("wan22")
    for place, name in enumerate(NAMES):
        getattr(pipeline, name).blocks[place].ffn.net[2].weight.data *= 0.1
    return pipeline


@pytest.fixture
def exported(
    build_pipeline: Build, made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Settings, Exported]:
    """A bundle in eight bits of denoisers of two blocks, which lose neurons at places of their own; made once."""
    if "exported" in made:
        found: tuple[Settings, Exported] = made["exported"]
        return found
    folder = tmp_path_factory.mktemp("turns")
    unlike(build_pipeline).save_pretrained(folder / "dense")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    asked = Settings(
        model=str(folder / "dense"),
        precision="int8+ffn:0.25+2:4",
        align=4,
        protect_first=0,
        protect_last=0,
        prompts_file=str(folder / "prompts.txt"),
        eval_prompts=1,
        draws=1,
        **SMALL,
        **SCALES,
    )
    made["exported"] = asked, verbs.export(asked, folder / "out")
    return asked, made["exported"][1]


@torch.no_grad()
def test_a_bundle_of_two_in_eight_bits_draws_what_torch_draws(exported: tuple[Settings, Exported]) -> None:
    """Rounding of codes flips where sums differ in a last bit, so not to the last bit."""
    asked, made = exported
    report = made.report
    assert {layer.name.split(".")[0] for layer in report.quantized} == set(NAMES)
    assert {layer.precision for layer in report.quantized} == {"int8"}
    counted = " and ".join(f"20 of the 20 linears inside the blocks of {name}" for name in NAMES)
    assert report.notes[0].startswith(f"{counted} compute in int8;")
    assert isinstance(report.evaluation, Evaluation)
    assert all(error > 0 for error in report.evaluation.velocity_error_per_step)
    components = open_bundle(made.folder).manifest.components
    assert [components[name].precision for name in NAMES] == ["int8", "int8"]
    for name in NAMES:
        linears = [
            layer.name.removeprefix(f"{name}.")
            for layer in report.layers
            if layer.name.startswith(f"{name}.") and layer.pattern.endswith("2:4")
        ]
        assert len(linears) == 20
        check(made.folder / name / "model.onnx", 2, 4, [f"{linear}.weight" for linear in linears])
    plain: Any = load_pipeline(str(asked.model)).pipeline
    job = verbs.open_job(separate(asked))
    pruned = pruning.prune(plain, wan, job.recipe)
    floats = drawn(plain, output_type="latent")
    rounded = precision.quantize_turns(plain, wan, job.recipe, FORMATS["int8"], dtype=torch.float32)
    with contextlib.ExitStack() as stack:
        for name, each in rounded.items():
            stack.enter_context(imitated(pruned.denoisers[name], each.quantization))
        expected = drawn(plain, output_type="latent")
    film = Pipeline(made.folder, threads=1)("a cat", seed=3, noise_source="torch")
    error, rounding = (
        (latents - torch.from_numpy(film.latents)).norm() / latents.norm() for latents in (expected, floats)
    )
    assert 5 * error < rounding < 0.02  # of the pipeline of one denoiser it is 0.006


def test_a_plan_tells_of_each_denoiser_and_of_both(tmp_path: Path) -> None:
    """Two of 14 B, says the models' card, widths as in the configuration that Wan2.2's repository has of T2V A14B."""
    config = json.loads(CONFIG.read_text())
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.875, "scheduler": [None, None]}
    for name in NAMES:
        index[name] = ["diffusers", "WanTransformer3DModel"]
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    asked: dict[str, Any] = {"model": str(tmp_path), "sparsity": "ffn:0.25", "method": "obsdiff"}
    whole = verbs.plan(Settings(**asked))
    first, second = whole.turns.values()
    assert first.parameters_before == second.parameters_before == 14_288_491_584
    assert whole.parameters_before == 2 * 14_288_491_584
    width, neurons, image, text = 5120, 13824, 21 * 30 * 52, 512
    products = 40 * ((6 * width**2 + 2 * width * neurons) * image + 2 * width**2 * text)
    assert products < first.macs_before < 1.01 * products
    assert whole.macs_before == 2 * first.macs_before
    lost = 38 * (2 * width + 1) * neurons // 4  # the first and the last block keep theirs
    assert whole.parameters_before - whole.parameters_after == 2 * lost
    assert whole.estimates.memory_bytes == first.estimates.memory_bytes > 4 * whole.parameters_before
    assert whole.estimates.checkpoint_bytes == 4 * whole.parameters_after
    assert whole.layers[0].name == "transformer.blocks.1.ffn.net.0.proj"
    json.dumps(whole.to_json())


def test_a_boundary_and_a_second_denoiser_belong_together(dense: Path, build_pipeline: Build) -> None:
    index = json.loads((dense / "model_index.json").read_text())
    (dense / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": None}))
    with pytest.raises(ModelError, match="has transformer and transformer_2 and boundary_ratio None; denoisers that"):
        verbs.plan(Settings(model=str(dense), sparsity="2:4"))
    pipeline = build_pipeline("wan")
    pipeline.register_to_config(boundary_ratio=0.9)
    with pytest.raises(ModelError, match=r"has transformer and boundary_ratio 0\.9"):
        obsdiff.prune(pipeline, prompts=PROMPTS, sparsity="2:4", **SMALL)


def test_denoisers_that_differ_are_refused(build_pipeline: Build, build_denoiser: Build, dense: Path) -> None:
    pipeline: WanPipeline = build_pipeline("wan22")
    pipeline.register_modules(transformer_2=build_denoiser("wan", num_layers=1))
    with pytest.raises(ModelError, match="differ in num_layers, and obsdiff knows only those that take turns and are"):
        obsdiff.prune(pipeline, prompts=PROMPTS, sparsity="2:4", **SMALL)
    file = dense / "transformer_2" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "ffn_dim": 32}))
    with pytest.raises(ModelError, match="differ in ffn_dim"):
        verbs.plan(Settings(model=str(dense), sparsity="2:4"))


WHATIF: dict[str, Any] = {"align": 4, **{name: value for name, value in SMALL.items() if name != "steps"}}


def test_denoisers_of_the_same_widths_are_timed_once_and_pruned_by_the_table(
    build_pipeline: Build, tmp_path: Path
) -> None:
    """Each saves at least the time that equal shares would, by what it is told of the linears of either."""
    unlike(build_pipeline).save_pretrained(tmp_path / "dense")
    found = run.run(Settings(model=str(tmp_path / "dense"), **WHATIF), minutes=0.05, shapes_only=True, threads=1)
    assert (
        found.notes[0] == "a call is one of transformer or of transformer_2: they take turns and have the same widths"
    )
    assert sum(row.linears for row in found.rows) == 20
    told = [(entry, 1e-6 * entry.m * entry.k * entry.n) for entry in found.table.entries]  # as no clock would be
    entries = tuple(dataclasses.replace(entry, ms=ms, low_ms=ms, high_ms=ms) for entry, ms in told)
    dataclasses.replace(found.table, entries=entries).save(tmp_path / "table.json")
    job = verbs.open_job(
        Settings(
            model=str(tmp_path / "dense"),
            sparsity="ffn:0.25",
            allocation=f"latency:{tmp_path / 'table.json'}",
            align=4,
            protect_first=0,
            protect_last=0,
            draws=1,
            **SMALL,
            **SCALES,
        )
    )
    pipeline = load_pipeline(tmp_path / "dense").pipeline
    groups = wan.groups(job.denoiser)
    pruned = pruning.prune(pipeline, wan, dataclasses.replace(job.recipe, prompts=tuple(PROMPTS)))
    paper = allocation.uniform(job.denoiser, wan, job.recipe)
    wanted = job.times().saved_ms(paper.groups, paper.removals)
    assert wanted > 0
    for each in pruned.turns:
        lost = {name: 96 - len(kept) for name, kept in each.kept.items()}
        assert job.times().saved_ms(groups, lost) >= wanted
    obsdiff.save(pruned, tmp_path / "pruned")
    with pytest.raises(ConfigError, match="transformer and transformer_2 of this model were cut to other widths"):
        subject_of(Settings(model=str(tmp_path / "pruned"), **WHATIF))


def test_denoisers_that_were_cut_apart_count_by_the_steps_that_they_take(exported: tuple[Settings, Exported]) -> None:
    """Of 4 steps the first takes 2."""
    folder = exported[1].folder
    widths = [weights_of(folder / name / "model.onnx") for name in NAMES]
    found = subject_of(Settings(model=str(folder), **WHATIF))
    assert found.notes == (
        "a call is the mean of those of 4 steps, 2 of transformer and 2 of transformer_2, which take turns and differ "
        "in widths",
    )
    macs = [sum(linear.shape.macs for linear in found.components[name]) for name in NAMES]
    assert sum(shape.macs * found.count(shape) for shape in found.grouped) == sum(macs) / 2
    for name, stored in zip(NAMES, widths, strict=True):
        for linear in found.components[name]:
            assert (linear.shape.k, linear.shape.n) == (stored[linear.name].k, stored[linear.name].n)
    timed = run.run(Settings(model=str(folder), **WHATIF), minutes=0.1, threads=1)
    assert [step.name for step in timed.steps if step.name.endswith("dense")] == [f"{name}.dense" for name in NAMES]
    assert all(isinstance(step.ms, float) for step in timed.steps if step.name.endswith("dense"))


@pytest.fixture
def loras(cut: tuple[Pruned, dict[str, torch.nn.Module]], tmp_path: Path) -> tuple[Path, Path]:
    """Of the dense denoisers, one file each, named as those who train them do; both for a `transformer`, inside."""
    files = tmp_path / "style_high_noise.safetensors", tmp_path / "style_low_noise.safetensors"
    for seed, (path, dense) in enumerate(zip(files, cut[1].values(), strict=True)):
        drawn = torch.Generator().manual_seed(seed)
        shapes = {linear.name: dense.get_parameter(f"{linear.name}.weight").shape for linear in wan.linears(dense)}
        halves = {
            name: (0.3 * torch.randn(2, k, generator=drawn), torch.randn(n, 2, generator=drawn))
            for name, (n, k) in shapes.items()
        }
        deltas = {name: Delta(down=down, up=up, scale=0.5) for name, (down, up) in halves.items()}
        adapters.write(Adapter(deltas=deltas, others={}), path, "transformer")
    return files


@torch.no_grad()
def test_loras_of_both_draw_in_the_pruned_pipeline_what_they_draw_where_units_are_masked(
    cut: tuple[Pruned, dict[str, torch.nn.Module]],
    folder: Path,
    loras: tuple[Path, Path],
    tmp_path: Path,
    build_pipeline: Build,
) -> None:
    found = verbs.lora(folder, loras[0], tmp_path / "cut.safetensors", second=loras[1])
    assert (found.layers, found.unchanged) == (20, ())
    assert found.files == {"transformer": tmp_path / "cut.safetensors", "transformer_2": tmp_path / "cut_2.safetensors"}
    ours: Any = obsdiff.load(folder)
    without = drawn(ours, output_type="latent")
    ours.load_lora_weights(str(tmp_path / "cut.safetensors"))
    ours.load_lora_weights(str(tmp_path / "cut_2.safetensors"), load_into_transformer_2=True)
    theirs: Any = build_pipeline("wan22", num_layers=1)
    theirs.register_modules(**copy.deepcopy(cut[1]))
    for each in cut[0].turns:  # LoRAs are of channels at their old places
        ((name, order),) = each.orders.items()
        neurons = getattr(theirs, each.family.denoiser).blocks[0].ffn.net
        places = torch.arange(96)
        places[list(each.kept[name])] = torch.tensor(order)
        neurons[0].proj.weight[places] = neurons[0].proj.weight.clone()
        neurons[0].proj.bias[places] = neurons[0].proj.bias.clone()
        neurons[2].weight[:, places] = neurons[2].weight.clone()
    theirs.load_lora_weights(str(loras[0]))
    theirs.load_lora_weights(str(loras[1]), load_into_transformer_2=True)
    theirs.fuse_lora(components=list(NAMES))
    theirs.unload_lora_weights()
    for each in cut[0].turns:
        (kept,) = each.kept.values()
        gone = sorted(set(range(96)) - set(kept))
        getattr(theirs, each.family.denoiser).blocks[0].ffn.net[2].weight[:, gone] = 0
    expected, films = (drawn(pipeline, output_type="latent") for pipeline in (theirs, ours))
    assert (films - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (films - without).abs().max() > 1e-2 * expected.abs().max()


@torch.no_grad()
def test_loras_merged_into_both_keep_their_zeros(folder: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    found = verbs.lora(folder, loras[0], tmp_path / "merged", second=loras[1])
    assert found.masked == 20
    before, after = obsdiff.load(folder), obsdiff.load(tmp_path / "merged")
    verbs.lora(folder, loras[0], tmp_path / "cut.safetensors", second=loras[1])
    before.load_lora_weights(str(tmp_path / "cut.safetensors"))
    before.load_lora_weights(str(tmp_path / "cut_2.safetensors"), load_into_transformer_2=True)
    zeros = {name: obsdiff.load(folder).components[name].state_dict() for name in NAMES}
    before.fuse_lora(components=list(NAMES))
    before.unload_lora_weights()
    for name in NAMES:
        for key, weight in after.components[name].state_dict().items():
            expected = before.components[name].state_dict()[key]
            if key.startswith("blocks.") and weight.ndim == 2 and "scale_shift" not in key:
                expected = expected.where(zeros[name][key] != 0, 0)
            torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5, msg=f"{name}.{key}")


def test_a_lora_of_one_denoiser_leaves_the_other_as_it_is(
    folder: Path,
    loras: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ["obsdiff", "lora", str(folder), "--second", str(loras[1]), "-o", str(tmp_path / "cut.safetensors")]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit, match="0"):
        main()
    told = capsys.readouterr().out.replace("\n", "")
    assert "transformer stays as it is: no LoRA of it was given" in told
    assert "cut_2.safetensors', load_into_transformer_2=True)" in told
    assert not (tmp_path / "cut.safetensors").exists()
    verbs.lora(folder, None, tmp_path / "merged", second=loras[1])
    before, after = obsdiff.load(folder), obsdiff.load(tmp_path / "merged")
    states = [[each.components[name].state_dict() for each in (before, after)] for name in NAMES]
    assert [all(torch.equal(old[key], new[key]) for key in old) for old, new in states] == [True, False]


def test_loras_that_are_exchanged_by_their_names_are_refused(
    folder: Path, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is of low_noise by its name, and transformer is for high noise"):
        verbs.lora(folder, loras[1], tmp_path / "out.safetensors", second=loras[0])
    with pytest.raises(ConfigError, match="is of high_noise by its name, and transformer_2 is for low noise"):
        verbs.lora(folder, None, tmp_path / "out.safetensors", second=loras[0])
    with pytest.raises(ConfigError, match="there is no LoRA; name its"):
        verbs.lora(folder, None, tmp_path / "out.safetensors")
    (tmp_path / "out_2.safetensors").touch()
    with pytest.raises(ConfigError, match=r"out_2\.safetensors exists; choose another name"):
        verbs.lora(folder, loras[0], tmp_path / "out.safetensors", second=loras[1])
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("kind", ["wan", "wan22"])
def test_the_second_scale_is_for_a_second_denoiser(kind: str, build_pipeline: Build, tmp_path: Path) -> None:
    build_pipeline(kind).save_pretrained(tmp_path / "dense")
    asked: dict[str, Any] = {"model": str(tmp_path / "dense"), "sparsity": "2:4", **SMALL}
    if kind == "wan":
        with pytest.raises(ConfigError, match="--guidance-scale-2 3: one denoiser takes all steps here"):
            verbs.plan(Settings(**asked, guidance_scale_2=3.0))
    else:
        assert verbs.open_job(Settings(**asked)).recipe.sampling.guidance_scale_2 == 5.0  # as the first one's
        with pytest.raises(ConfigError, match="--guidance-scale-2 -1: must be a finite number"):
            verbs.plan(Settings(**asked, guidance_scale_2=-1.0))
