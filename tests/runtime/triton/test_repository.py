"""The folder that `obsdiff triton` writes, read by Triton's own schema."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from obsdiff.triton.configs import Choice
from obsdiff.triton.pbtxt import Enum, render
from obsdiff.triton.repository import write_repository
from obsdiff_runtime.bundle import (
    Bundle,
    ComponentEntry,
    Defaults,
    EngineEntry,
    Manifest,
    TensorEntry,
    open_bundle,
    write_manifest,
)
from obsdiff_runtime.errors import CompatibilityError, ConfigError
from obsdiff_runtime.server.options import DEFAULT_BOUNDS
from obsdiff_runtime.shapes import Range

CHOICE = Choice(name="draw", images=8, instances=2, threads=0, bounds=DEFAULT_BOUNDS)


def profile(most: int) -> dict[str, Range]:
    sample = Range(min=(1, 4, 8, 8), opt=(2, 4, 16, 16), max=(most, 4, 32, 32))
    return {"sample": sample, "timestep": Range(min=(1,), opt=(2,), max=(most,))}


def engine(key: str, version: str = "10.13.3", *, targets: tuple[str, ...] = ("8.9",), **changes: Any) -> EngineEntry:
    path = f"engines/transformer/{key}.plan"
    built = {"backend": "tensorrt", "profiles": (profile(8), profile(4)), **changes}
    return EngineEntry(path=path, key=key, backend_version=version, targets=targets, **built)


def make_bundle(folder: Path, *engines: EngineEntry, dtype: str = "float16") -> Bundle:
    """A bundle of one network with files that hold a word each."""
    batched = TensorEntry(name="sample", dtype=dtype, shape=("batch", 4, "height", "width"))
    component = ComponentEntry(
        onnx="transformer/model.onnx",
        dtype=dtype,
        inputs=(batched, TensorEntry(name="timestep", dtype="float32", shape=("batch",))),
        outputs=(dataclasses.replace(batched, name="out"),),
        engines=engines,
    )
    files = ["transformer/model.onnx", "transformer/model.onnx.data", "transformer/config.json", "model_index.json"]
    for relative in (*files, *(each.path for each in engines)):
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        (folder / relative).write_text("{}")
    defaults = Defaults(height=32, width=32, num_inference_steps=4, guidance_scale=3.0)
    manifest = Manifest(
        created_by="a test",
        family="sd3",
        pipeline_class="StableDiffusion3Pipeline",
        sparsity="dense",
        defaults=defaults,
        components={"transformer": component},
    )
    return Bundle(root=folder, manifest=write_manifest(folder, manifest))


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_triton_reads_every_configuration(sd3_bundle: Path, tmp_path: Path, config_of: Callable[..., Any]) -> None:
    written = write_repository(open_bundle(sd3_bundle), tmp_path / "models", CHOICE)
    configs = {path.parent.name: config_of(path) for path in (tmp_path / "models").glob("*/config.pbtxt")}
    parts = {f"draw_{part}" for part in ("transformer", "text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder")}
    assert set(configs) == {"draw", *parts}
    assert written.components == dict.fromkeys(sorted(parts), "onnxruntime")
    assert {config.backend for name, config in configs.items() if name != "draw"} == {"onnxruntime"}
    assert configs["draw"].backend == "python"
    assert configs["draw"].instance_group[0].count == 2
    assert configs["draw"].HasField("dynamic_batching")
    assert configs["draw_transformer"].max_batch_size == 16, "two rows for each image"
    assert configs["draw_vae_decoder"].max_batch_size == 1, "one picture at a time"
    accelerators = configs["draw_transformer"].optimization.execution_accelerators
    assert dict(accelerators.gpu_execution_accelerator[0].parameters) == {"use_tf32": "0"}


def test_networks_are_hard_links_and_nothing_is_there_twice(sd3_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(sd3_bundle)
    write_repository(bundle, tmp_path / "models", CHOICE)
    link = tmp_path / "models" / "draw_transformer" / "1" / "model.onnx"
    assert link.samefile(bundle.onnx("transformer"))
    described = files_of(tmp_path / "models" / "draw" / "1" / "bundle")
    assert not [name for name in described if name.endswith((".onnx", ".data", ".plan"))]
    assert {"obsdiff.json", "transformer/config.json", "scheduler/scheduler_config.json"} <= described


def test_engines_are_served_by_their_gpu_and_all_profiles(tmp_path: Path, config_of: Callable[..., Any]) -> None:
    bundle = make_bundle(tmp_path / "bundle", engine("old"), engine("new", targets=("9.0",)), engine("newest"))
    written = write_repository(bundle, tmp_path / "models", CHOICE)
    config = config_of(tmp_path / "models" / "draw_transformer" / "config.pbtxt")
    assert (config.platform, config.backend) == ("tensorrt_plan", "tensorrt")
    assert dict(config.cc_model_filenames) == {"8.9": "newest.plan", "9.0": "new.plan"}
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert config.max_batch_size == 4, "what the smallest profile takes"
    assert files_of(tmp_path / "models" / "draw_transformer" / "1") == {"newest.plan", "new.plan"}
    assert written.left_out == ("engines/transformer/old.plan: engines/transformer/newest.plan is newer",)
    assert written.tensorrt == "10.13.3"


@pytest.mark.parametrize(
    ("unfit", "reason"),
    [
        (engine("a", backend="tensorrt_rtx"), "Triton does not run engines of tensorrt_rtx"),
        (engine("a", refit="stripped"), "holds no weights"),
    ],
)
def test_an_engine_that_triton_cannot_run_is_named_and_the_graph_takes_its_place(
    unfit: EngineEntry, reason: str, tmp_path: Path, config_of: Callable[..., Any]
) -> None:
    written = write_repository(make_bundle(tmp_path / "bundle", unfit), tmp_path / "models", CHOICE)
    assert reason in written.left_out[0]
    assert config_of(tmp_path / "models" / "draw_transformer" / "config.pbtxt").backend == "onnxruntime"
    assert files_of(tmp_path / "models" / "draw_transformer" / "1") == {"model.onnx", "model.onnx.data"}


def test_engines_of_two_versions_do_not_share_a_server(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", engine("a", "10.3.0"), engine("b", "10.13.3", targets=("9.0",)))
    written = write_repository(bundle, tmp_path / "models", CHOICE)
    assert written.tensorrt == "10.13.3"
    assert "another version" in written.left_out[0]


def test_bfloat16_at_the_border_of_a_network_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", dtype="bfloat16")
    with pytest.raises(CompatibilityError, match=r"transformer: sample is bfloat16.*--dtype fp16"):
        write_repository(bundle, tmp_path / "models", CHOICE)
    assert not (tmp_path / "models").exists()


def test_films_are_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    defaults = dataclasses.replace(bundle.manifest.defaults, num_frames=81)
    films = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, defaults=defaults))
    with pytest.raises(CompatibilityError, match=r"draws films, and .* pictures alone; use obsdiff serve"):
        write_repository(films, tmp_path / "out", CHOICE)


def test_reference_pictures_that_are_not_served_are_named(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    changed = dataclasses.replace(bundle.manifest, pipeline_class="FluxKontextPipeline")
    written = write_repository(dataclasses.replace(bundle, manifest=changed), tmp_path / "models", CHOICE)
    assert written.left_out == ("reference pictures: Triton's model takes none; obsdiff serve does",)


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "x" * 65])
def test_a_name_that_is_no_folder_is_refused(name: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    with pytest.raises(ConfigError, match="a model's name has letters"):
        write_repository(bundle, tmp_path / "models", dataclasses.replace(CHOICE, name=name))


def test_text_is_what_protobuf_reads(config_of: Callable[..., Any], tmp_path: Path) -> None:
    given = 'a "quote", a \\ and a\nline, é and 🎈'
    message = {"name": given, "max_batch_size": 3, "input": [{"data_type": Enum("TYPE_FP16"), "optional": True}]}
    (tmp_path / "config.pbtxt").write_text(render(message), encoding="utf-8")
    config = config_of(tmp_path / "config.pbtxt")
    assert (config.name, config.max_batch_size, config.input[0].optional) == (given, 3, True)


def obsdiff(*arguments: str) -> "subprocess.CompletedProcess[str]":
    code = (
        "import sys\nfor name in ('torch', 'diffusers', 'transformers', 'onnxruntime'):\n"
        "    sys.modules[name] = None\nfrom obsdiff.cli import main; main()"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_the_command_writes_it_without_torch_and_replaces_its_own_only(tmp_path: Path) -> None:
    make_bundle(tmp_path / "my bundle")
    line = ["triton", str(tmp_path / "my bundle"), "-o", str(tmp_path / "models")]
    first = obsdiff(*line, "--json")
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout)
    assert (told["model"], told["components"]) == ("my_bundle", {"my_bundle_transformer": "onnxruntime"})
    again = obsdiff(*line)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "--force" in again.stderr
    assert "my_bundle draws with" in obsdiff(*line, "--force").stdout


def test_a_number_that_makes_no_sense_is_one_line(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    result = obsdiff("triton", str(tmp_path / "bundle"), "-o", str(tmp_path / "models"), "--images", "0")
    assert (result.returncode, result.stderr) == (2, "obsdiff: --images 0: should be at least 1\n")
