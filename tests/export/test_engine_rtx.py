"""Real builds by TensorRT-RTX: profiles, flags, and what it refuses."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from obsdiff_export.build import BUILDERS, Engine, build
from obsdiff_export.builders.request import Flags
from obsdiff_export.gpu import compute_capability
from obsdiff_export.ports import read_ports
from obsdiff_export.profiles import profiles_for
from obsdiff_export.proof.receipt import load
from obsdiff_runtime.errors import BuildError, CompatibilityError
from obsdiff_runtime.shapes import choose

RTX = BUILDERS["tensorrt_rtx"]
pytestmark = pytest.mark.skipif(bool(RTX.missing()), reason=f"TensorRT-RTX: {RTX.missing()}")
without_gpu = pytest.mark.skipif(compute_capability() is not None, reason="what it refuses without a GPU")

SIZES = [{"batch": (1, 2, 4), "tokens": tokens} for tokens in (16, 64, (16, 64, 128))]


@pytest.fixture
def graph(tmp_path: Path):
    """Two linears on `batch` x `tokens` x 64, in float16; `change` may alter the model before it is written."""

    def make(change=None) -> Path:
        random = np.random.default_rng(0)
        x, y = (helper.make_tensor_value_info(port, TensorProto.FLOAT16, ["batch", "tokens", 64]) for port in "xy")
        weights = [
            numpy_helper.from_array(random.standard_normal((64, 64)).astype(np.float16), f"fc{i}.weight::T")
            for i in (1, 2)
        ]
        nodes = [
            helper.make_node("MatMul", ["x", "fc1.weight::T"], ["h"], name="fc1"),
            helper.make_node("Relu", ["h"], ["r"], name="act"),
            helper.make_node("MatMul", ["r", "fc2.weight::T"], ["y"], name="fc2"),
        ]
        opset = helper.make_opsetid("", 20)
        model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], weights), opset_imports=[opset])
        model.ir_version = 10
        if change is not None:
            change(model.graph)
        (tmp_path / "transformer").mkdir(exist_ok=True)
        onnx.save(model, tmp_path / "transformer" / "model.onnx")
        return tmp_path / "transformer" / "model.onnx"

    return make


def make(path: Path, **options) -> Engine:
    options = {"profiles": profiles_for(read_ports(path)[0], SIZES[:1]), "targets": ["8.6"], **options}
    return build(path, path.parent.parent / "engines", builder=RTX, **options)


def test_one_engine_holds_several_profiles(graph):
    profiles = profiles_for(read_ports(graph())[0], SIZES)
    engine = make(graph(), profiles=profiles)
    assert len(engine.profiles) == len(load(engine.receipt_path).profiles) == 3
    assert engine.bytes > make(graph()).bytes  # kernels for each, weights once
    assert choose(engine.profiles, {"x": (2, 64, 64)}) == 1
    assert choose(engine.profiles, {"x": (2, 32, 64)}) == 2


def test_weight_streaming_and_levels_are_other_engines(graph):
    flags = [Flags(), Flags(weight_streaming=True), Flags(optimization_level=1)]
    assert len({make(graph(), flags=each).key for each in flags}) == 3


@without_gpu
@pytest.mark.parametrize("refit", ["yes", "stripped"])
def test_refit_without_a_gpu_is_refused_before_any_work(graph, refit):
    with pytest.raises(CompatibilityError, match=r"on a machine with a GPU only, .*without --refit, or there with"):
        make(graph(), flags=Flags(refit=refit))
    assert not (graph().parent.parent / "engines").exists()


_PROBE = """
import tensorrt_rtx as trt
from obsdiff_export.builders.polygraph import build_plan, common_options
from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
common = CreateConfigRTX(**common_options(trt, request))
def configure(builder, network):
    config = common(builder, network)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    for flag in FLAGS:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if MARKED:
        assert network.mark_weights_refittable("fc1.weight::T")
    return config
return build_plan(trt, request, log, configure)
"""


@without_gpu
def test_what_is_refused_could_not_be_built_and_what_could_be_built_refits_nothing(graph, scripted, tmp_path):
    """Why: the day that one of these changes, `--refit` can be offered without a GPU."""

    def probe(flags: list[str], marked: bool) -> Engine:
        script = _PROBE.replace("FLAGS", repr(flags)).replace("MARKED", repr(marked))
        builder = scripted(script)
        builder.environment = {**builder.environment, **RTX.environment}
        profiles = profiles_for(read_ports(graph())[0], SIZES[:1])
        name = f"{len(flags)}{marked}"
        return build(graph(), tmp_path / name, builder=builder, profiles=profiles)

    whole = probe([], False).bytes
    assert probe(["REFIT_INDIVIDUAL", "STRIP_PLAN"], False).bytes >= whole  # it stripped no weight
    with pytest.raises(BuildError, match="CUDA_SUCCESS"):
        probe(["REFIT_INDIVIDUAL", "STRIP_PLAN"], True)


def test_an_operator_that_is_unknown_is_named_with_its_node(graph):
    def change(body):
        body.node[1].op_type = "Frobnicate"

    with pytest.raises(BuildError) as caught:
        make(graph(change))
    told = str(caught.value)
    assert "its parser refused node act (Frobnicate): it knows neither an operator nor a plugin of that name" in told
    assert "Traceback" not in told
    assert ".cpp" not in told


def test_shapes_that_do_not_fit_are_told_with_their_node(graph):
    def change(body):
        body.initializer[1].CopyFrom(numpy_helper.from_array(np.zeros((32, 64), np.float16), "fc2.weight::T"))

    with pytest.raises(BuildError) as caught:
        make(graph(change))
    told = str(caught.value)
    assert "node fc2 (MatMul)" in told
    assert "= 64 and second to last dimension of input1 = 32 but must match" in told
    assert "\n" not in told.partition(". Log:")[0]
    assert "cudaError" not in told


def _float8(body) -> None:
    """Both operands of the first linear through float8."""
    scale = numpy_helper.from_array(np.float16(0.1), "scale")
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    body.initializer.extend([scale, zero])
    pairs = []
    for name in ("x", "fc1.weight::T"):
        pairs += [
            helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}.q"]),
            helper.make_node("DequantizeLinear", [f"{name}.q", "scale", "zero"], [f"{name}.dq"]),
        ]
    nodes = [*pairs, *body.node]
    nodes[4].input[:] = ["x.dq", "fc1.weight::T.dq"]
    del body.node[:]
    body.node.extend(nodes)


def test_float8_is_built_for_ada_and_refused_for_ampere(graph):
    assert make(graph(_float8), targets=["8.9"]).bytes > 0
    with pytest.raises(CompatibilityError, match=r"number format that 8\.6 lacks .*float8 8\.9"):
        make(graph(_float8), targets=["8.6"])
