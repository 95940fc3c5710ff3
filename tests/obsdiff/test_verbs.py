"""The verbs on tiny pipelines, from folder to folder: what one writes, the next one reads."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor, nn

import obsdiff
from networks.whole.denoisers import ONE_LEVEL
from obsdiff import verbs
from obsdiff.checkpoint import pruned_manifest
from obsdiff.cli import main
from obsdiff.settings import Settings
from obsdiff_export import contest, engines, orders
from obsdiff_export.build import BUILDERS, Engine
from obsdiff_runtime.bundle import open_bundle
from obsdiff_runtime.errors import BuildError, BundleError, ConfigError, ModelError, QualityError

PROMPTS = ["a red circle", "a blue square"]
TINY: dict[str, Any] = {"steps": 1, "height": 32, "width": 32, "num_samples": 2, "eval_prompts": 1, "draws": 1}
WHOLE: dict[str, Any] = {"protect_first": 0, "protect_last": 0, "align": 1}

needs_rtx = pytest.mark.skipif(
    bool(BUILDERS["tensorrt_rtx"].missing()), reason=f"TensorRT-RTX: {BUILDERS['tensorrt_rtx'].missing()}"
)


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return str(path)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, sd3_t5_folder: Path, prompts_file: str) -> Path:
    """A tiny SD3 with T5, pruned to 2:4."""
    folder = tmp_path_factory.mktemp("pruned") / "half"
    settings = Settings(
        model=str(sd3_t5_folder), sparsity="2:4", prompts_file=prompts_file, max_sequence_length=4, **TINY
    )
    verbs.prune_to_folder(settings, folder)
    return folder


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, sd3_folder: Path, prompts_file: str) -> Path:
    """A tiny SD3 without T5 that lost heads and neurons."""
    folder = tmp_path_factory.mktemp("pruned") / "cut"
    settings = Settings(
        model=str(sd3_folder),
        sparsity="structured:0.25",
        prompts_file=prompts_file,
        allocation="uniform",
        max_sequence_length=4,
        **TINY,
        **WHOLE,
    )
    verbs.prune_to_folder(settings, folder)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, half: Path, prompts_file: str) -> Path:
    """The bundle of `half`, exported as it is."""
    folder = tmp_path_factory.mktemp("bundles") / "half"
    settings = Settings(model=str(half), prompts_file=prompts_file, max_sequence_length=4, **TINY)
    verbs.export(settings, folder)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def zeros(module: nn.Module, names: list[str]) -> float:
    weights = [module.get_submodule(name).weight for name in names]
    return float(sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights))


def without_torch(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'onnx'):\n    sys.modules[name] = None\n"
        "from obsdiff.cli import main\nmain()"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_a_masked_folder_loads_with_plain_diffusers(half: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(half)
    manifest = pruned_manifest(half)
    assert manifest is not None
    masked = [name for name, record in manifest.linears.items() if record.pattern == "2:4"]
    assert zeros(pipeline.transformer, masked) == 0.5
    assert list(manifest.linears) == masked


def test_a_shrunk_folder_loads_with_obsdiff_and_draws(cut: Path, denoise: Callable[[nn.Module], Tensor]) -> None:
    pipeline = obsdiff.load(cut)
    assert pipeline.transformer.get_submodule("transformer_blocks.1.attn").heads == 3
    assert torch.isfinite(denoise(pipeline.transformer)).all()


def test_a_shrunk_folder_can_be_pruned_again(cut: Path, tmp_path: Path, prompts_file: str) -> None:
    settings = Settings(model=str(cut), sparsity="heads:0.34+2:4", prompts_file=prompts_file, max_sequence_length=4)
    again = verbs.prune_to_folder(
        Settings(**{**vars(settings), **TINY, **WHOLE, "allocation": "uniform"}), tmp_path / "again"
    )
    loaded = obsdiff.load(tmp_path / "again")
    assert loaded.transformer.get_submodule("transformer_blocks.1.attn").heads == 2
    manifest = pruned_manifest(tmp_path / "again")
    assert manifest is not None
    group = manifest.groups["transformer_blocks.1.attn.heads"]
    assert (group.units, len(group.kept)) == (4, 2)  # told from the dense model on
    assert manifest.groups.keys() > again.kept.keys()  # the neurons that went the first time
    assert any(record.pattern == "2:4" for record in manifest.linears.values())


def test_pruning_twice_gives_the_same_bytes(cut: Path, sd3_folder: Path, tmp_path: Path, prompts_file: str) -> None:
    settings = {"model": str(sd3_folder), "sparsity": "structured:0.25", "prompts_file": prompts_file, **TINY, **WHOLE}
    verbs.prune_to_folder(Settings(**settings, allocation="uniform", max_sequence_length=4), tmp_path / "out")
    first, again = digests(cut), digests(tmp_path / "out")
    assert first.pop("README.md") != again.pop("README.md")  # the card has a date
    assert first == again
    assert "structured:0.25" in (cut / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no journal, no partial


@pytest.mark.slow
def test_a_pruned_folder_exports_as_it_is(bundle: Path, half: Path) -> None:
    opened = open_bundle(bundle)
    report = json.loads((bundle / "report.json").read_text(), parse_constant=pytest.fail)
    assert {"transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae_decoder"} <= set(
        opened.manifest.components
    )
    assert report["dense"]["parameters"] == report["pruned"]["parameters"]
    assert all(component["max_error"] < 1e-4 for component in report["components"])
    assert (bundle / "report.html").stat().st_size > 1000
    assert opened.manifest.sparsity == report["sparsity"] == pruned_manifest(half).sparsity
    assert any(layer["zeros"] >= 0.5 for layer in report["layers"])


def test_a_bundle_draws_without_torch(bundle: Path, tmp_path: Path) -> None:
    result = without_torch("generate", str(bundle), "a red circle", "-o", "new/a.png", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["image"] == "new/a.png"
    assert result.stderr == ""
    assert np.asarray(Image.open(tmp_path / "new" / "a.png")).shape == (32, 32, 3)


def test_a_bundle_is_measured_without_torch(bundle: Path, tmp_path: Path) -> None:
    result = without_torch("bench", str(bundle), "--iterations", "1", "--warmup", "0", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    json.loads(result.stdout, parse_constant=pytest.fail)


@pytest.mark.slow
@needs_rtx
def test_engines_are_added_to_a_bundle_in_place(bundle: Path, tmp_path: Path) -> None:
    before = open_bundle(bundle).manifest
    built = verbs.build(bundle, targets=["8.9"])
    after = open_bundle(bundle).manifest  # every file as listed
    assert len(built.entries) == len(built.engines) == len(before.components)
    for name, component in after.components.items():
        assert [engine.targets for engine in component.engines] == [("8.9",)], name
        assert "ignores it" in component.engines[0].sparsity
    assert before.files.items() <= after.files.items()
    listed = digests(bundle)
    verbs.build(bundle, targets=["8.9"])
    assert digests(bundle) == listed  # equal engines are reused


def test_a_build_that_dies_half_way_leaves_the_bundle_valid(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (bundle / "obsdiff.json").read_bytes()
    calls = []

    def build(graph: Path, folder: Path, **options: Any) -> Engine:
        calls.append(graph)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "half.plan").write_bytes(b"half")
        raise BuildError("the builder crashed")

    class Any8:
        name = "any"

        def targets(self, asked: Any) -> tuple[str, ...]:
            return tuple(asked)

        def check(self, flags: Any, targets: Any) -> None:
            pass

    monkeypatch.setattr(contest, "build", build)
    monkeypatch.setattr(engines, "build_one", build)
    monkeypatch.setattr(orders, "choose_builder", lambda name: Any8())
    with pytest.raises(BuildError):
        verbs.build(bundle)
    assert (bundle / "obsdiff.json").read_bytes() == before
    with pytest.raises(BundleError, match="not a file of this bundle"):
        open_bundle(bundle).path(f"engines/{calls[0].parent.name}/half.plan")


@pytest.mark.slow
def test_a_stable_diffusion_unet_goes_the_whole_way(
    build_pipeline: Callable[..., DiffusionPipeline], tmp_path: Path, prompts_file: str
) -> None:
    build_pipeline("sd15", **ONE_LEVEL).save_pretrained(tmp_path / "dense")
    settings = Settings(
        model=str(tmp_path / "dense"), sparsity="structured:0.5+2:4", prompts_file=prompts_file, **TINY, **WHOLE
    )
    exported = verbs.export(settings, tmp_path / "out")
    assert exported.report.pruned.parameters < exported.report.dense.parameters
    json.dumps(exported.to_json(), allow_nan=False)
    result = without_torch("generate", "out", "a red circle", "-o", "a.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "out", "a.png"}


def test_eval_compares_a_folder_with_its_dense_model(half: Path, sd3_t5_folder: Path, tmp_path: Path) -> None:
    settings = Settings(max_sequence_length=4, **{**TINY, "num_samples": None})
    report = verbs.evaluate(half, str(sd3_t5_folder), settings, html=tmp_path / "new" / "page.html").reports[0]
    assert report.evaluation.velocity_error > 0  # type: ignore[union-attr]
    assert report.pruned.nonzero < report.dense.nonzero
    assert report.recipe == pruned_manifest(half).recipe
    assert report.method == report.recipe["method"]
    json.dumps(report.to_json(), allow_nan=False)
    assert (tmp_path / "new" / "page.html").is_file()


def test_eval_of_several_folders_gives_mean_and_spread(
    half: Path, sd3_t5_folder: Path, tmp_path: Path, prompts_file: str
) -> None:
    other = tmp_path / "other"
    settings = Settings(model=str(sd3_t5_folder), sparsity="4:8", prompts_file=prompts_file, max_sequence_length=4)
    verbs.prune_to_folder(dataclasses.replace(settings, method="magnitude", steps=1, height=32, width=32), other)
    asked = Settings(
        **{**TINY, "num_samples": None},
        max_sequence_length=4,
        guidance_sweep="1,7",
        fail_if=["velocity_error>0", "ssim<-1"],
    )
    result = verbs.evaluate(
        [half, other],
        str(sd3_t5_folder),
        asked,
        html=tmp_path / "page.html",
        judges={"bright": lambda picture, prompt: float(picture.mean())},
    )
    errors = [report.evaluation.velocity_error for report in result.reports]  # type: ignore[union-attr]
    spread = result.spread["velocity_error"]
    assert spread.mean == pytest.approx(np.mean(errors))
    assert spread.std == pytest.approx(np.std(errors, ddof=1))
    assert (spread.least, spread.most, spread.runs) == (min(errors), max(errors), 2)
    assert result.spread["scores.bright.dense"].std == 0  # the same noise
    sweeps = [report.evaluation.guidance for report in result.reports]  # type: ignore[union-attr]
    assert [score.dense for score in sweeps[0].scores] == [score.dense for score in sweeps[1].scores]
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert [run["folder"] for run in data["runs"]] == [str(half), str(other)]
    assert data["spread"]["velocity_error"]["mean"] == spread.mean
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 3  # dense and two pruned, one prompt
    assert "other" in page
    with pytest.raises(QualityError, match=r"half: .*velocity_error is .* > 0$"):
        result.hold()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fail_if": ["velocty_error>0"]}, "did you mean velocity_error"),
        ({"fail_if": ["scores.clip_score.pruned<20"]}, "no metric scores.clip_score.pruned"),
        ({"guidance_sweep": "1,2"}, "nothing here can say which picture is better"),
        ({"fid_reference": "."}, "--clip-model"),
    ],
)
def test_eval_refuses_what_it_cannot_judge_before_any_work(
    half: Path, sd3_t5_folder: Path, changes: dict[str, Any], message: str
) -> None:
    def never(*_: Any) -> None:
        pytest.fail("work was begun")

    with pytest.raises(ConfigError, match=message):
        verbs.evaluate(half, str(sd3_t5_folder), Settings(**TINY, **changes), progress=never)


def test_eval_of_a_folder_named_twice_is_an_error(half: Path) -> None:
    with pytest.raises(ConfigError, match="each once"):
        verbs.evaluate([half, half])


def test_a_gate_on_what_this_run_does_not_measure_is_a_usage_error(half: Path, sd3_t5_folder: Path) -> None:
    settings = Settings(max_sequence_length=4, fail_if=["lpips>0.1"], **{**TINY, "num_samples": None})
    with pytest.raises(ConfigError, match="lpips was not measured"):
        verbs.evaluate(half, str(sd3_t5_folder), settings).hold()


def test_eval_exits_with_3_after_it_has_printed_and_written_its_report(
    half: Path, sd3_t5_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--steps", "1", "--height", "32", "--width", "32", "--max-sequence-length", "4", "--eval-prompts", "1"]
    command = ["eval", str(half), "--against", str(sd3_t5_folder), *sizes, "--html", str(tmp_path / "a.html"), "--json"]
    monkeypatch.setattr(sys, "argv", ["obsdiff", *command, "--fail-if", "velocity_error > 1e-12"])
    with pytest.raises(SystemExit) as exited:
        main()
    out, err = capfd.readouterr()
    assert exited.value.code == 3
    assert json.loads(out)["evaluation"]["velocity_error"] > 1e-12
    assert err.count("\n") == 1
    assert "velocity_error is" in err
    assert (tmp_path / "a.html").is_file()


def test_eval_of_something_that_was_not_pruned_is_an_error(sd3_folder: Path) -> None:
    with pytest.raises(ConfigError, match="was not pruned by obsdiff"):
        verbs.evaluate(sd3_folder, str(sd3_folder), Settings(**TINY))


def test_eval_against_another_model_is_an_error_that_names_the_flag(half: Path, sd15_folder: Path) -> None:
    for other in (None, str(sd15_folder)):
        with pytest.raises(ConfigError, match=r"was not pruned from .*--against"):
            verbs.evaluate(half, other, Settings(**TINY))


def test_a_pipeline_in_memory_is_pruned_saved_and_loaded(
    build_pipeline: Callable[..., DiffusionPipeline], tmp_path: Path, denoise: Callable[[nn.Module], Tensor]
) -> None:
    pipeline = build_pipeline("sd3")
    seen: list[str] = []
    pruned = obsdiff.prune(
        pipeline,
        sparsity="structured:0.5+2:4",
        prompts=PROMPTS,
        steps=1,
        draws=1,
        max_sequence_length=2,
        progress=lambda stage, *_: seen.append(stage),
        **WHOLE,
    )
    assert pruned.pipeline is pipeline
    assert pruned.recipe.prompts == tuple(PROMPTS)
    assert {"calibrate", "measure sensitivities", "prune blocks"} <= set(seen)
    obsdiff.save(pruned, str(tmp_path / "out"))
    loaded = obsdiff.load(str(tmp_path / "out"))
    assert torch.equal(denoise(loaded.transformer), denoise(pipeline.transformer))


def test_a_pipeline_in_memory_keeps_its_precision(
    build_pipeline: Callable[..., DiffusionPipeline], tmp_path: Path
) -> None:
    pipeline = build_pipeline("sd3").to(torch.float16)
    pipeline.vae.float()
    text = {name: tensor.clone() for name, tensor in pipeline.text_encoder.state_dict().items()}
    pruned = obsdiff.prune(pipeline, sparsity="2:4", prompts=PROMPTS, steps=1, draws=1, max_sequence_length=2)
    assert pipeline.transformer.dtype == pipeline.text_encoder.dtype == torch.float16
    assert pipeline.vae.dtype == torch.float32
    assert all(torch.equal(tensor, text[name]) for name, tensor in pipeline.text_encoder.state_dict().items())
    obsdiff.save(pruned, tmp_path / "out")
    masked = [layer.name for layer in pruned.layers if layer.pattern == "2:4"]
    assert zeros(obsdiff.load(tmp_path / "out").transformer, masked) == 0.5


def test_a_pipeline_in_memory_without_a_denoiser_is_an_error(build_pipeline: Callable[..., DiffusionPipeline]) -> None:
    pipeline = build_pipeline("sd3")
    pipeline.transformer = None
    with pytest.raises(ModelError, match="has no denoiser"):
        obsdiff.prune(pipeline, sparsity="2:4", prompts=PROMPTS)
