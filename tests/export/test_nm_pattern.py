import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from obsdiff_export.pattern import PatternReport, check
from obsdiff_runtime.errors import ConfigError, ExportError

KINDS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
LAYOUTS = ("matmul", "gemm", "transpose", "cast", "left", "dequantize", "conv")


def two_of_four(n_out: int, k: int, seed: int = 0) -> np.ndarray:
    """(n_out, k): in every 4 inputs 2 at random places are zero, one of them as -0."""
    rng = np.random.default_rng(seed)
    weight = rng.uniform(1, 2, (n_out, k // 4, 4)).astype(np.float32)
    order = rng.random(weight.shape).argsort(axis=-1)
    weight[order == 0] = 0.0
    weight[order == 1] = -0.0
    return weight.reshape(n_out, k)


def holds_by_loop(weight: np.ndarray, n: int, m: int) -> bool:
    """The definition: (n_out, k), every m consecutive inputs hold n zeros."""
    n_out, k = weight.shape
    if k % m:
        return False
    return all(
        sum(1 for value in weight[row, start : start + m] if value == 0) >= n
        for row in range(n_out)
        for start in range(0, k, m)
    )


def tensor_of(array: np.ndarray, name: str, dtype: str) -> TensorProto:
    if dtype == "bfloat16":
        bits = (np.ascontiguousarray(array, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return helper.make_tensor(name, TensorProto.BFLOAT16, array.shape, bits.tobytes(), raw=True)
    return numpy_helper.from_array(np.ascontiguousarray(array).astype(dtype), name)


def save(folder: Path, weight: np.ndarray, layout: str, dtype: str = "float32", *, external: bool = True) -> Path:
    """A graph of one linear over weight (n_out, k), written the way `layout` says; a convolution's is of one pixel."""
    kind = KINDS[dtype]
    x, y = [helper.make_tensor_value_info(name, kind, None) for name in "xy"]
    nodes, stored, extra = [], weight, []
    if layout == "matmul":
        stored = weight.T
        nodes = [helper.make_node("MatMul", ["x", "w::T"], ["y"], name="linear")]
    elif layout == "gemm":
        nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], name="linear", transB=1)]
    elif layout == "left":
        nodes = [helper.make_node("MatMul", ["w", "x"], ["y"], name="linear")]
    elif layout == "conv":
        stored = weight[:, :, None, None]
        nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="linear")]
    elif layout == "transpose":
        turn = helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0])
        nodes = [turn, helper.make_node("MatMul", ["x", "t"], ["y"], name="linear")]
    elif layout == "cast":
        turn = helper.make_node("Transpose", ["w"], ["t"])
        cast = helper.make_node("Cast", ["t"], ["c"], to=kind)
        nodes = [turn, cast, helper.make_node("MatMul", ["x", "c"], ["y"], name="linear")]
    elif layout == "dequantize":
        stored = np.rint(weight * 60).astype(np.int8).T
        extra = [numpy_helper.from_array(np.array(0.1, np.float32), "scale")]
        undo = helper.make_node("DequantizeLinear", ["w", "scale"], ["d"])
        nodes = [undo, helper.make_node("MatMul", ["x", "d"], ["y"], name="linear")]
    name = "w::T" if layout == "matmul" else "w"
    tensor = tensor_of(stored, name, "int8" if layout == "dequantize" else dtype)
    graph = helper.make_graph(nodes, "g", [x], [y], [tensor, *extra])
    path = folder / "model.onnx"
    onnx.save(
        helper.make_model(graph), path, save_as_external_data=external, location="model.onnx.data", size_threshold=0
    )
    return path


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pattern_along_the_reduction_is_found_in_every_layout_and_dtype(tmp_path, layout, dtype, external):
    path = save(tmp_path, two_of_four(24, 32), layout, dtype, external=external)
    assert check(path, 2, 4, ["w"]) == [
        PatternReport(
            name="w",
            node="linear",
            k=32,
            n_out=24,
            holds=True,
            zeros=0.5,
            reason="",
            pattern="2:4",
            dtype="int8" if layout == "dequantize" else dtype,
            reads="x",
        )
    ]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pattern_along_the_wrong_axis_is_not_taken_for_one(tmp_path, layout, dtype):
    path = save(tmp_path, two_of_four(32, 24).T.copy(), layout, dtype)  # (24, 32), 2:4 along the outputs
    report = check(path, 2, 4)[0]
    assert (report.holds, report.k, report.n_out) == (False, 32, 24)
    assert "weights are zero at output" in report.reason


@given(
    n_out=st.integers(1, 5),
    k=st.integers(1, 16),
    pattern=st.sampled_from([(1, 2), (2, 4), (4, 8), (1, 4), (3, 4)]),
    zeros=st.floats(0, 1),
    layout=st.sampled_from(["matmul", "gemm", "transpose"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_the_verdict_is_that_of_the_definition(tmp_path_factory, n_out, k, pattern, zeros, layout, seed):
    rng = np.random.default_rng(seed)
    weight = np.where(rng.random((n_out, k)) < zeros, 0, 1).astype(np.float32)
    report = check(save(tmp_path_factory.mktemp("g"), weight, layout), *pattern)[0]
    assert report.holds == holds_by_loop(weight, *pattern)
    assert report.zeros == pytest.approx(float((weight == 0).mean()))


@pytest.mark.parametrize(("weight", "groups"), [((8, 32, 3, 3), 1), ((8, 16, 1, 1), 2)])
def test_a_conv_that_reads_neighbours_or_some_channels_is_no_product(tmp_path, weight, groups):
    x, y = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=groups)
    graph = helper.make_graph([node], "g", [x], [y], [tensor_of(np.zeros(weight), "w", "float32")])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    assert check(tmp_path / "model.onnx", 2, 4) == []


def test_the_broken_group_is_named(tmp_path):
    weight = two_of_four(24, 32)
    weight[7, 12:16] = 1
    report = check(save(tmp_path, weight, "matmul"), 2, 4)[0]
    assert report.reason == "only 0 of 4 weights are zero at output 7, inputs from 12"


def test_a_width_that_m_does_not_divide_does_not_hold(tmp_path):
    report = check(save(tmp_path, np.zeros((8, 30), np.float32), "gemm"), 2, 4)[0]
    assert (report.holds, report.reason) == (False, "its 30 inputs are not divisible by 4")


def test_an_expected_linear_that_does_not_hold_is_an_error_that_names_it(tmp_path):
    path = save(tmp_path, np.ones((8, 32), np.float32), "matmul")
    with pytest.raises(ExportError, match=r"1 weights should be 2:4 in the graph and are not: w: only 0 of 4"):
        check(path, 2, 4, ["w"])


def test_an_expected_linear_that_is_not_in_the_graph_is_an_error(tmp_path):
    path = save(tmp_path, two_of_four(8, 32), "matmul")
    with pytest.raises(ExportError, match=r"blocks\.0\.to_q: no MatMul, Gemm or Conv of one pixel reads it"):
        check(path, 2, 4, ["w", "blocks.0.to_q"])


def test_linears_may_be_named_by_their_module(exports):
    names = ["up", "gate", "down", "embed"]
    with pytest.raises(ExportError, match=r"4 weights should be 2:4 .* up\.weight: only"):
        check(exports.float16.path, 2, 4, names)
    assert {report.name for report in check(exports.float16.path, 2, 4)} == {f"{name}.weight" for name in names}


def test_a_data_file_that_is_too_short_is_an_error(tmp_path):
    path = save(tmp_path, two_of_four(24, 32), "matmul")
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ExportError, match="too short"):
        check(path, 2, 4)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4)])
def test_what_is_no_pattern_is_refused(tmp_path, n, m):
    with pytest.raises(ConfigError, match="no pattern"):
        check(tmp_path / "model.onnx", n, m)


@pytest.mark.parametrize("dtype", ["float32", "float16"])  # polygraphy is wrong in bfloat16
@pytest.mark.parametrize("layout", ["matmul", "gemm", "transpose"])
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # its sys.float_info.max
def test_polygraphy_finds_the_same(tmp_path, capfd, layout, dtype, broken):
    sparse = pytest.importorskip("polygraphy.tools.sparse")
    from polygraphy.logger import G_LOGGER

    weight = two_of_four(8, 16)
    weight[3, 4:8] = 1 if broken else 0
    path = save(tmp_path, weight, layout, dtype, external=False)
    with G_LOGGER.verbosity(G_LOGGER.INFO):
        sparse.SparsityPruner(onnx.load(path)).check()
    said = "".join(capfd.readouterr())
    assert ("Found sparse tensor: w" in said, "Found non-sparse tensor: w" in said) == (not broken, broken)
    assert check(path, 2, 4)[0].holds is not broken


@pytest.mark.parametrize("layout", ["matmul", "gemm"])
def test_ten_million_weights_take_less_than_three_seconds(tmp_path, layout):
    path = save(tmp_path, two_of_four(2048, 5120), layout, "float16")
    started = time.process_time()
    assert check(path, 2, 4)[0].holds
    assert time.process_time() - started < 3  # polygraphy's loop: about 40
