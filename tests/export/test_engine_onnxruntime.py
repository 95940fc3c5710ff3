from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from obsdiff_export.build import BUILDERS, build
from obsdiff_export.builders import onnxruntime as builders
from obsdiff_export.builders.onnxruntime import CPU, CUDA, TENSORRT, provider_options
from obsdiff_export.builders.request import Flags, RefusalError, Request
from obsdiff_export.caches import Cache
from obsdiff_export.casting import inputs_in
from obsdiff_export.profiles import profiles_for
from obsdiff_export.proof import receipt
from obsdiff_runtime.errors import BuildError, CompatibilityError

ORT = BUILDERS["onnxruntime"]
SIZES = {"batch": (1, 2, 4), "length": (1, 5, 16)}


def make(model, folder: Path, **options):
    options = {"builder": ORT, "targets": ["cpu"], "profiles": profiles_for(model.inputs, [SIZES]), **options}
    return build(model.path, folder, **options)


def run(path: Path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=[CPU])
    return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_plan_computes_what_the_graph_computes(exports, toy, tmp_path, dtype):
    model = getattr(exports, dtype)
    engine = make(model, tmp_path)
    assert engine.targets == ("cpu",)
    assert {path.suffix for path in tmp_path.iterdir()} == {".plan", ".data", ".json", ".log"}
    inputs = inputs_in(getattr(torch, dtype), toy.inputs)
    tolerance = 1e-6 if dtype == "float32" else 5e-3  # fused differently, rounded differently
    for found, expected in zip(run(engine.path, inputs), run(model.path, inputs), strict=True):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_float16_on_the_cpu_is_built_and_told_to_be_slow(exports, tmp_path):
    (note,) = make(exports.float16, tmp_path).notes
    assert "computes parts of this graph in float32" in note
    assert "--dtype fp32" in note
    assert make(exports.float16, tmp_path).notes == (note,)  # the receipt remembers it
    assert make(exports.float32, tmp_path / "32").notes == ()


def test_bfloat16_on_the_cpu_is_refused_with_what_to_do(exports, tmp_path):
    with pytest.raises(CompatibilityError, match="no kernels on the CPU; export it with --dtype fp32"):
        make(exports.bfloat16, tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_node_is_told_in_the_log_with_its_provider(exports, tmp_path):
    log = make(exports.float32, tmp_path).log_path.read_text()
    assert f"{CPU} runs MatMul" in log


def test_weights_beside_the_plan_are_verified_and_cached_too(exports, tmp_path):
    cache = Cache(tmp_path / "cache")
    engine = make(exports.float32, tmp_path / "one", cache=cache)
    weights = engine.path.with_suffix(".data")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert not make(exports.float32, tmp_path / "one").reused
    again = make(exports.float32, tmp_path / "two", cache=cache)
    assert again.path.with_suffix(".data").exists()


def test_sparsity_is_told_to_be_ignored(exports, tmp_path):
    engine = make(exports.float32, tmp_path, flags=Flags(sparse=True))
    assert "like any other number" in receipt.sparsity_statement(receipt.load(engine.receipt_path))


def test_a_graph_that_onnx_runtime_refuses_is_a_build_error_with_its_words(exports, tmp_path):
    model = onnx.load(exports.float32.path)
    model.graph.node[0].op_type = "NoSuchOperator"
    (tmp_path / "bad").mkdir()
    onnx.save(model, tmp_path / "bad" / "model.onnx")
    with pytest.raises(BuildError, match="NoSuchOperator"):
        make(replace(exports.float32, path=tmp_path / "bad" / "model.onnx"), tmp_path / "out")


def test_cuda_where_there_is_none_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(builders, "_providers", lambda: [CPU])
    with pytest.raises(CompatibilityError, match=r"has no CUDAExecutionProvider, or no GPU: pip install 'obsdiff\[gpu"):
        ORT.targets(["cuda"])
    with pytest.raises(CompatibilityError, match=r"one of cpu and cuda, not for 8\.9"):
        ORT.targets(["8.9"])
    assert ORT.targets([]) == ("cpu",)


def test_the_gpu_is_taken_where_there_is_one(monkeypatch):
    monkeypatch.setattr(builders, "_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(builders, "compute_capability", lambda: "8.9")
    assert ORT.targets([]) == ("cuda:8.9",)
    assert ORT.targets(["cpu"]) == ("cpu",)


@pytest.mark.parametrize("flags", [Flags(refit="yes"), Flags(weight_streaming=True), Flags(optimization_level=3)])
def test_flags_of_tensorrt_are_refused(flags):
    with pytest.raises(CompatibilityError, match="is TensorRT's"):
        ORT.check(flags, ("cpu",))


@dataclass
class FakeOrt:
    """An onnxruntime whose sessions use the providers, and place the nodes, that a test says."""

    used: list[str]
    placed: list[tuple[str, str]] = field(default_factory=list)
    available: tuple[str, ...] = (TENSORRT, CUDA, CPU)

    def get_available_providers(self):
        return list(self.available)

    def InferenceSession(self, path, options, providers, enable_fallback):  # noqa: N802
        assert enable_fallback == 0
        parts = [
            SimpleNamespace(ep_name=name, get_nodes=lambda op=op: [SimpleNamespace(op_type=op, name=f"the {op}")])
            for name, op in self.placed
        ]
        return SimpleNamespace(get_providers=lambda: self.used, get_provider_graph_assignment_info=lambda: parts)


def test_a_provider_that_falls_back_is_refused():
    with pytest.raises(RefusalError, match="CUDAExecutionProvider was asked for and ONNX Runtime took CPU") as caught:
        builders._open(FakeOrt(used=[CPU]), "m.onnx", None, [CUDA])
    assert caught.value.failure == "incompatible"
    with pytest.raises(RefusalError, match="has no CUDAExecutionProvider"):
        builders._open(FakeOrt(used=[CPU], available=(CPU,)), "m.onnx", None, [CUDA])


def placement(*placed):
    told = []
    session = builders._open(FakeOrt(used=[CUDA, CPU], placed=list(placed)), "m.onnx", None, [CUDA])
    builders._check_placement(session, CUDA, lambda *line: told.append(line))
    return [message for severity, message in told if severity == "NOTE"]


def test_products_on_another_provider_are_refused_and_shapes_are_told_of():
    assert placement((CUDA, "MatMul")) == []
    (note,) = placement((CUDA, "MatMul"), (CPU, "Shape"), (CPU, "Gather"), (CPU, "Shape"))
    assert note == f"3 of 4 nodes run on another provider than {CUDA}: 2 Shape, 1 Gather"
    with pytest.raises(RefusalError, match="CPUExecutionProvider would run FusedMatMul the FusedMatMul"):
        placement((CUDA, "MatMul"), (CPU, "FusedMatMul"))
    with pytest.raises(RefusalError, match="would run Shape"):
        placement((CPU, "Shape"))


def test_an_onnx_runtime_that_cannot_tell_says_so():
    told = []
    builders._check_placement(SimpleNamespace(), CUDA, lambda *line: told.append(line))
    assert told[0][0] == "NOTE"


REQUEST = Request(
    builder="b",
    onnx="m.onnx",
    plan="plan",
    answer="a",
    layers="l",
    data="key.data",
    timing_cache=None,
    profiles=({"x": {"min": [1, 4], "opt": [2, 4], "max": [8, 4]}, "t": {"min": [1], "opt": [2], "max": [8]}},),
    flags=Flags(sparse=True, optimization_level=5),
    targets=("8.9",),
)


def test_the_tensorrt_provider_is_told_shapes_sparsity_and_level(tmp_path):
    options = provider_options(REQUEST, tmp_path)
    assert options["trt_profile_min_shapes"] == "x:1x4,t:1"
    assert options["trt_profile_opt_shapes"] == "x:2x4,t:2"
    assert (options["trt_sparsity_enable"], options["trt_builder_optimization_level"]) == ("1", "5")
    assert all(isinstance(value, str) for value in options.values())


def test_the_tensorrt_provider_has_one_profile():
    with pytest.raises(RefusalError, match="has one profile, and 2 are asked for"):
        builders.OnnxRuntimeTensorRt().compile(replace(REQUEST, profiles=REQUEST.profiles * 2), print)


def context(tmp_path, *operators) -> Path:
    x, y = (helper.make_tensor_value_info(port, TensorProto.FLOAT, [1]) for port in "xy")
    nodes = [
        helper.make_node(operator, ["x"], ["y"], domain="com.microsoft", ep_cache_context="sub/e.engine")
        for operator in operators
    ]
    (tmp_path / "e.engine").write_bytes(b"engine")
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y])), tmp_path / "context.onnx")
    return tmp_path / "context.onnx"


def test_the_engine_of_a_context_graph_is_named_by_its_key(tmp_path):
    model = onnx.load_from_string(builders._renamed(context(tmp_path, "EPContext"), "key.data"))
    assert [attribute.s for attribute in model.graph.node[0].attribute] == [b"key.data"]
    assert (tmp_path / "key.data").read_bytes() == b"engine"


def test_a_graph_that_tensorrt_did_not_take_whole_is_refused(tmp_path):
    with pytest.raises(RefusalError, match="took 1 parts of the graph and left the rest to others: Relu"):
        builders._renamed(context(tmp_path, "EPContext", "Relu"), "key.data")
    with pytest.raises(RefusalError, match="wrote no EP-context graph"):
        builders._renamed(tmp_path / "absent.onnx", "key.data")
