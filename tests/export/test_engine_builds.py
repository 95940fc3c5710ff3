import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from obsdiff_export import children
from obsdiff_export.build import BUILDERS, Engine, available_builders, build, choose_builder
from obsdiff_export.builders.request import Builder, Flags
from obsdiff_export.content import content_hash
from obsdiff_export.gpu import compute_capability
from obsdiff_export.pattern import check
from obsdiff_export.ports import read_ports
from obsdiff_export.profiles import profiles_for
from obsdiff_export.proof.receipt import load
from obsdiff_runtime.errors import (
    BuildError,
    CompatibilityError,
    ConfigError,
    ExportError,
    MissingPackageError,
    ResourceError,
)

needs_rtx = pytest.mark.skipif(
    bool(BUILDERS["tensorrt_rtx"].missing()), reason=f"TensorRT-RTX: {BUILDERS['tensorrt_rtx'].missing()}"
)
SIZES = {"batch": (1, 2, 4), "length": (1, 5, 16)}


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """One 2:4 linear in float16."""
    weight = np.random.default_rng(0).standard_normal((16, 4, 32)).astype(np.float16)
    weight[:, 1:3] = 0
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["batch", 32])
    node = helper.make_node("MatMul", ["x", "w::T"], ["y"], name="linear")
    body = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight.reshape(64, 32), "w::T")])
    folder = tmp_path / "transformer"
    folder.mkdir()
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(body, opset_imports=[opset], ir_version=10), folder / "model.onnx")
    return folder / "model.onnx"


def build_here(path: Path, builder: Builder, **options) -> Engine:
    options = {"flags": Flags(sparse=True), "profiles": profiles_for(read_ports(path)[0], [SIZES]), **options}
    return build(path, path.parent.parent / "engines", builder=builder, **options)


@needs_rtx
def test_rtx_builds_engines_for_three_architectures_without_a_gpu(graph):
    engine = build_here(graph, BUILDERS["tensorrt_rtx"], patterns=check(graph, 2, 4))
    assert engine.targets == ("8.6", "8.9", "12.0")
    assert engine.path.stat().st_size == engine.bytes > 0
    assert not engine.reused
    receipt = load(engine.receipt_path)
    assert (receipt.sparse_requested, receipt.proof.chose, receipt.proof.verdict) == (True, None, "ignored")
    assert [(layer.weight, layer.weights) for layer in receipt.proof.layers] == [("w", "holds")]
    assert "ignores it" in json.loads(engine.receipt_path.read_text())["sparsity"]
    assert "linear" in engine.log_path.read_text()


@needs_rtx
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rtx_builds_what_the_export_wrote(exports, tmp_path, dtype):
    model = getattr(exports, dtype)
    engine = build(
        model.path,
        tmp_path,
        builder=BUILDERS["tensorrt_rtx"],
        profiles=profiles_for(model.inputs, [SIZES]),
        flags=Flags(sparse=True),
        targets=["8.9"],
    )
    assert engine.bytes > 0


@needs_rtx
def test_rtx_refuses_an_h100_and_says_what_to_do(graph):
    with pytest.raises(
        CompatibilityError, match=r"cannot build for compute capability 9\.0; it knows 7\.5.*obsdiff\[trt\]"
    ):
        build_here(graph, BUILDERS["tensorrt_rtx"], targets=["8.6", "9.0"])
    assert not list((graph.parent.parent / "engines").glob("*.plan"))


@needs_rtx
def test_rtx_refuses_bfloat16_where_the_hardware_has_none(exports, tmp_path):
    model = exports.bfloat16
    with pytest.raises(CompatibilityError, match=r"number format that 7\.5 lacks \(bfloat16 needs 8\.0"):
        build(
            model.path,
            tmp_path,
            builder=BUILDERS["tensorrt_rtx"],
            profiles=profiles_for(model.inputs, [SIZES]),
            targets=["7.5"],
        )


@needs_rtx
def test_a_graph_that_rtx_cannot_parse_is_a_build_error_with_its_words(graph):
    model = onnx.load(graph)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, graph)
    with pytest.raises(BuildError, match="NoSuchOperator"):
        build_here(graph, BUILDERS["tensorrt_rtx"])


@pytest.mark.gpu
@pytest.mark.skipif(compute_capability() is None or find_spec("tensorrt") is None, reason="needs TensorRT and a GPU")
def test_tensorrt_builds_for_the_gpu_that_is_here(graph):
    engine = build_here(graph, BUILDERS["tensorrt"])
    assert engine.targets == (compute_capability(),)
    assert load(engine.receipt_path).proof.chose is not None
    assert engine.layers_path is not None


def test_an_equal_engine_is_reused_and_an_altered_one_is_built_again(graph, scripted):
    builder = scripted("return b'a plan'")
    first = build_here(graph, builder)
    assert build_here(graph, builder).reused
    first.path.write_bytes(b"altered")
    again = build_here(graph, builder)
    assert not again.reused
    assert again.path.read_bytes() == b"a plan"


def test_what_a_killed_build_left_is_swept_away(graph, scripted):
    left = graph.parent.parent / "engines" / ".building-x"
    left.mkdir(parents=True)
    (left / "plan").write_bytes(b"half")
    build_here(graph, scripted("return b'a plan'"))
    assert not left.exists()


def test_everything_that_makes_an_engine_is_in_its_key(graph, scripted, exports):
    builder = scripted("return b'a plan'")
    keys = [
        build_here(graph, builder).key,
        build_here(graph, builder, flags=Flags()).key,
        build_here(graph, builder, flags=Flags(sparse=True, refit="yes")).key,
        build_here(graph, builder, flags=Flags(sparse=True, weight_streaming=True)).key,
        build_here(graph, builder, flags=Flags(sparse=True, optimization_level=3)).key,
        build_here(graph, builder, repeat=1).key,
        build_here(graph, builder, targets=["8.9"]).key,
        build_here(graph, replace(builder, release="2.0")).key,
        build_here(graph, replace(builder, name="other")).key,
        build_here(graph, replace(builder, gpu="a GPU")).key,
        build_here(graph, builder, profiles=profiles_for(read_ports(graph)[0], [SIZES, {"batch": 3}])).key,
    ]
    model = onnx.load(graph)
    model.graph.initializer[0].raw_data = bytes(len(model.graph.initializer[0].raw_data))
    onnx.save(model, graph)
    keys.append(build_here(graph, builder).key)
    assert len(set(keys)) == len(keys)


def test_the_hash_of_a_graph_covers_the_file_of_its_weights(graph):
    onnx.save(onnx.load(graph), graph, save_as_external_data=True, location="w", size_threshold=0)
    before = content_hash(graph)
    weights = graph.parent / "w"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert content_hash(graph) != before
    weights.unlink()
    with pytest.raises(ExportError, match="cannot be read"):
        content_hash(graph)


def test_a_crash_is_a_build_error_with_the_last_lines_of_the_log(graph, scripted):
    builder = scripted("log('INFO', 'about to fall'); import os; os.abort()")
    with pytest.raises(BuildError, match=r"ended by signal SIGABRT(.|\n)*about to fall"):
        build_here(graph, builder)


def test_an_exception_in_the_builder_is_a_build_error_with_its_traceback(graph, scripted):
    with pytest.raises(BuildError, match=r"exit code 1(.|\n)*ZeroDivisionError"):
        build_here(graph, scripted("1 / 0"))


@pytest.mark.parametrize(
    "script", ["import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "raise MemoryError('20 GiB')"]
)
def test_running_out_of_memory_says_what_to_lower(graph, scripted, script):
    with pytest.raises(ResourceError, match="fewer targets, for smaller sizes"):
        build_here(graph, scripted(script))
    left = {path.suffix for path in (graph.parent.parent / "engines").iterdir()}
    assert left == {".log"}


def test_progress_is_told_before_and_after(graph, scripted):
    seen = []
    build_here(graph, scripted("return b'a plan'"), progress=lambda *told: seen.append(told))
    assert seen == [("build", 0, 1, "transformer for 8.6"), ("build", 1, 1, "transformer for 8.6")]


def test_a_profile_for_other_inputs_is_refused(graph, scripted):
    with pytest.raises(ConfigError, match=r"the profile is for \[\], the graph's inputs are \['x'\]"):
        build_here(graph, scripted("return b''"), profiles=[{}])
    with pytest.raises(ConfigError, match="needs a profile"):
        build_here(graph, scripted("return b''"), profiles=[])


def test_without_any_builder_the_error_names_both_extras(monkeypatch):
    for builder in BUILDERS.values():
        monkeypatch.setattr(type(builder), "missing", lambda self: "not installed")
    assert available_builders() == ()
    with pytest.raises(MissingPackageError, match=r"'obsdiff\[trt\]'.*'obsdiff\[rtx\]'"):
        choose_builder()


def test_tensorrt_is_chosen_before_rtx(monkeypatch):
    for builder in BUILDERS.values():
        monkeypatch.setattr(type(builder), "missing", lambda self: "")
    assert choose_builder().name == "tensorrt"
    assert choose_builder("tensorrt_rtx").name == "tensorrt_rtx"


def test_a_builder_nobody_knows_is_refused():
    with pytest.raises(ConfigError, match="'onnx'; there are tensorrt, tensorrt_rtx"):
        choose_builder("onnx")


def test_tensorrt_builds_for_no_other_gpu_than_the_one_here(monkeypatch):
    monkeypatch.setattr("obsdiff_export.builders.tensorrt.compute_capability", lambda: "8.7")
    assert BUILDERS["tensorrt"].targets([]) == ("8.7",)
    with pytest.raises(CompatibilityError, match=r"\(8\.7\), not for 9\.0"):
        BUILDERS["tensorrt"].targets(["9.0"])


def test_building_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import obsdiff_export.build, obsdiff_export.builders.worker"
    subprocess.run([sys.executable, "-c", code], check=True, env=children.environment(BUILDERS["tensorrt"].environment))
