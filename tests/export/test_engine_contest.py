"""The A/B around real builds, by a builder that writes what it was asked into the plan."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from obsdiff_export import contest
from obsdiff_export.build import Engine
from obsdiff_export.builders.request import Flags
from obsdiff_export.contest import build_faster, example_inputs
from obsdiff_export.pattern import PatternReport
from obsdiff_export.ports import Port
from obsdiff_export.proof.receipt import load
from obsdiff_runtime.errors import BuildError
from obsdiff_runtime.shapes import Range

PROFILES = ({"x": Range(min=(1, 4), opt=(2, 4), max=(8, 4))},)
PLAN = "return f'{request.flags.sparse} {Path(request.onnx).parent.name}'.encode()"
SCRIPT = f"from pathlib import Path\n{PLAN}"
HOLDS = (PatternReport(name="w", node="MatMul", k=4, n_out=4, holds=True, zeros=0.5, reason=""),)
SECONDS = {"True pruned": 1.0, "False pruned": 1.2, "False dense": 1.3}


@pytest.fixture
def graphs(tmp_path: Path) -> dict[str, Path]:
    made = {}
    for name, value in (("pruned", 1.0), ("dense", 2.0)):
        x, y = (helper.make_tensor_value_info(port, TensorProto.FLOAT, ["batch", 4]) for port in "xy")
        weight = numpy_helper.from_array(np.full((4, 4), value, np.float32), "w")
        body = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
        made[name] = tmp_path / name / "model.onnx"
        made[name].parent.mkdir()
        onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), made[name])
    return made


def timed(seconds: Mapping[str, float]):
    def run(engines: Mapping[str, Engine]) -> dict[str, list[float]]:
        return {name: [seconds[engine.path.read_text()]] * 20 for name, engine in engines.items()}

    return lambda builder, inputs: run


def contested(graphs, scripted, tmp_path, script=SCRIPT, **more):
    options = {"profiles": PROFILES, "flags": Flags(), "patterns": HOLDS, "dense": graphs["dense"], "builds": 1} | more
    return build_faster(graphs["pruned"], tmp_path / "engines", builder=scripted(script), **options)


@pytest.mark.parametrize(("sparse_seconds", "variant"), [(1.0, "sparse"), (1.19, "pruned"), (1.5, "pruned")])
def test_only_the_shipped_engine_is_left(graphs, scripted, tmp_path, monkeypatch, sparse_seconds, variant) -> None:
    monkeypatch.setattr(contest, "timing_here", timed({**SECONDS, "True pruned": sparse_seconds}))
    found = contested(graphs, scripted, tmp_path)
    assert found.variant == variant
    assert found.shipped.path.read_text() == ("True pruned" if variant == "sparse" else "False pruned")
    assert found.shipped.path.parent == tmp_path / "engines"
    assert {path.name.split(".")[0] for path in (tmp_path / "engines").iterdir()} == {found.shipped.key}
    receipt = load(found.shipped.receipt_path)
    assert (receipt.key, receipt.sparse_requested) == (found.shipped.key, variant == "sparse")
    assert found.shipped.log_path.exists()
    assert len(found.builds) == 3
    assert found.to_json()["shipped"] == found.shipped.key


def test_without_the_dense_graph_two_variants_are_built(graphs, scripted, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(contest, "timing_here", timed(SECONDS))
    found = contested(graphs, scripted, tmp_path, dense=None)
    assert [build.variant for build in found.builds] == ["sparse", "pruned"]


@pytest.mark.parametrize("patterns", [(), HOLDS])
def test_where_nothing_is_timed_the_flagged_engine_is_built_once(graphs, scripted, tmp_path, patterns) -> None:
    found = contested(graphs, scripted, tmp_path, patterns=patterns)
    assert found.shipped.path.read_text() == "True pruned"
    assert len(found.builds) == 1
    assert found.decision.outcome == "not measured"
    assert ("no weight holds 2:4" in found.decision.why) == (not patterns)
    again = contested(graphs, scripted, tmp_path, patterns=patterns)
    assert again.shipped.reused


def test_a_cut_model_is_timed_beside_the_dense_one(graphs, scripted, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(contest, "timing_here", timed(SECONDS))
    found = contested(graphs, scripted, tmp_path, patterns=())
    assert [build.variant for build in found.builds] == ["pruned", "dense"]
    assert found.shipped.path.read_text() == "False pruned"
    assert found.decision.why.startswith("1.08x against the dense model")
    alone = contested(graphs, scripted, tmp_path, patterns=(), dense=None)
    assert "no weight holds 2:4" in alone.decision.why


def test_an_interrupted_contest_is_gone_on_with(graphs, scripted, tmp_path, monkeypatch) -> None:
    def interrupt(engines: Mapping[str, Engine]) -> dict[str, list[float]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(contest, "timing_here", lambda builder, inputs: interrupt)
    with pytest.raises(KeyboardInterrupt):
        contested(graphs, scripted, tmp_path)
    monkeypatch.setattr(contest, "timing_here", timed(SECONDS))
    found = contested(graphs, scripted, tmp_path)
    assert [build.engine.reused for build in found.builds] == [True] * 3


def test_an_engine_that_was_there_before_stays(graphs, scripted, tmp_path, monkeypatch) -> None:
    flagged = contested(graphs, scripted, tmp_path).shipped
    monkeypatch.setattr(contest, "timing_here", timed({**SECONDS, "True pruned": 2.0}))
    found = contested(graphs, scripted, tmp_path)
    assert found.variant == "pruned"
    assert {path.stem for path in (tmp_path / "engines").glob("*.plan")} == {flagged.key, found.shipped.key}


def test_a_builder_that_refuses_leaves_its_log(graphs, scripted, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(contest, "timing_here", timed(SECONDS))
    with pytest.raises(BuildError) as error:
        contested(graphs, scripted, tmp_path, script="raise SystemExit(3)")
    (log, _) = sorted((tmp_path / "engines").glob("*.log"), key=lambda path: str(path) not in str(error.value))
    assert str(log) in str(error.value)
    assert list((tmp_path / "engines").glob("*.plan")) == []


def test_examples_have_the_best_shapes_and_the_right_types() -> None:
    ports = (Port(name="x", dtype="float16", shape=("b", 4)), Port(name="ids", dtype="int64", shape=("b",)))
    profile = {"x": Range(min=(1, 4), opt=(2, 4), max=(8, 4)), "ids": Range(min=(1,), opt=(3,), max=(8,))}
    made = example_inputs(ports, profile)
    assert (made["x"].shape, made["x"].dtype) == ((2, 4), np.float32)
    assert (made["ids"].shape, made["ids"].dtype) == ((3,), np.int64)
    assert np.isfinite(made["x"]).all()
