"""`obsdiff-engines`, where torch and the packages of obsdiff's own command are not; also run on Python 3.10 alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bundles import write_tiny
from obsdiff_export import children
from obsdiff_export.cli import COMMAND, VERBS
from obsdiff_export.latency_table import DENSE, SPARSE, Entry, LatencyTable, load
from obsdiff_export.settings import FIELDS
from obsdiff_runtime.bundle import open_bundle

ABSENT = ("torch", "diffusers", "transformers", "pydantic", "typer", "rich", "safetensors", "onnxscript", "obsdiff")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OBSDIFF_CACHE", str(tmp_path / "cache"))
    return write_tiny(tmp_path / "bundle")


def run(*arguments: object) -> int:
    return COMMAND.run([str(argument) for argument in arguments])


def test_engines_are_built_where_nothing_else_is_installed(bundle: Path) -> None:
    line = ["build", str(bundle), "--builder", "onnxruntime", "--json"]
    code = (
        f"import sys\nfor name in {ABSENT}: sys.modules[name] = None\n"
        f"from obsdiff_export.cli import COMMAND\nsys.exit(COMMAND.run({line}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=children.environment({})
    )
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout)
    assert [engine["component"] for engine in built["engines"]] == ["transformer", "vae_decoder"]
    for name in ("transformer", "vae_decoder"):
        (engine,) = open_bundle(bundle).component(name).engines
        assert engine.backend == "onnxruntime"
        assert engine.targets == ("cpu",)


def test_flags_are_those_of_obsdiff_build(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {flag.key: flag for flag in VERBS["build"].flags}
    assert set(flags) == {*FIELDS, "component"}
    assert (flags["targets"].many, flags["builds"].kind, flags["require_sparse"].kind) == (True, int, bool)
    same: list[Any] = ["--builder", "onnxruntime", "--component", "transformer", "--no_cache"]
    assert run("build", bundle, *same, "--profile", "512,768", "--profile", "1024@1-2") == 0
    shown = capsys.readouterr().out
    assert shown.count("takes ") == 3
    assert "height 128" in shown


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--builder", "onnxruntime", "--require-sparse"], 6, "multiplies zeros like any other"),
        (["--builder", "tensor"], 2, "no builder is called 'tensor'"),
        (["--builder", "onnxruntime", "--component", "vae"], 2, "the bundle has transformer, vae_decoder"),
        (["--builder", "onnxruntime", "--refit", "maybe"], 2, "--refit maybe: there are no, yes, stripped"),
    ],
)
def test_what_cannot_be_is_a_sentence_and_a_code(
    bundle: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, message: str
) -> None:
    assert run("build", bundle, *more) == code
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith("obsdiff-engines: ")
    assert message in said.err


def test_the_products_of_an_estimate_are_timed_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bound = {"ms": 1e-6, "low_ms": 1e-6, "high_ms": 1e-6, "rounds": 0, "dtype": "float16"}
    entries = tuple(
        Entry(m=8, k=64, n=n, variant=kind, **bound) for n, kind in ((64, DENSE), (64, SPARSE), (32, DENSE))
    )
    call = {"height": 512, "width": 512, "rows": 2, "text_tokens": 77}
    table = LatencyTable(
        what="estimate", device="Orin", backend="roofline", date="today", model="a model", call=call, entries=entries
    )
    table.save(tmp_path / "shapes.json")
    line = ["time", tmp_path / "shapes.json", "-o", tmp_path / "table.json", "--threads", "1"]
    assert run(*line, "--backend", "cpu") == 0
    assert "ONNX Runtime has no sparse kernels on the CPU" in capsys.readouterr().out
    found = load(tmp_path / "table.json")
    assert [(entry.n, entry.rounds > 0) for entry in found.entries] == [(64, True), (32, True)]
    for more, code, message in (
        (["--backend", "gpu"], 2, "--backend gpu: unknown; there are tensorrt, cpu"),
        (["--backend", "cpu", "--dtype", "fp16"], 2, "--dtype fp16: --backend cpu times fp32"),
        (["--backend", "cpu", "--minutes", "0"], 2, "--minutes 0: must be more than 0"),
        (["-o", tmp_path], 2, "is a folder; name a file"),
    ):
        assert run(*line, *more) == code
        assert message in capsys.readouterr().err


def test_what_was_built_can_be_looked_at(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", bundle, "--builder", "onnxruntime", "--component", "transformer") == 0
    capsys.readouterr()
    assert run("inspect", bundle) == 0
    assert "every sha256 is that of the manifest" in capsys.readouterr().out
    (engine,) = open_bundle(bundle).component("transformer").engines
    assert run("inspect", bundle / engine.path, "--layers", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["weights"] for layer in found["receipt"]["proof"]["layers"]] == ["holds"]
    assert run("inspect", bundle, "--require-sparse") == 6
    assert "obsdiff-engines: no proof of sparsity" in capsys.readouterr().err
    assert run("inspect", bundle / "transformer" / "model.onnx") == 0
    assert run("inspect", bundle / "transformer" / "config.json") == 2


def test_the_doctor_looks_for_what_building_needs(capsys: pytest.CaptureFixture[str]) -> None:
    code = run("doctor", "--quick", "--json")
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert code == (0 if found["ready"] else 5)
    assert found["abilities"][0]["name"] == "build engines"
    assert "torch" not in found["facts"]["libraries"]


def test_a_wrong_flag_is_named(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("build", bundle, "--sparsity", "2:4")
    assert stopped.value.code == 2
    assert "--sparsity" in capsys.readouterr().err
