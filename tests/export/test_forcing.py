"""Forced patterns against their definition in float64, and single linears against numpy."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, numpy_helper

from obsdiff_export.forcing import force, write_linear, zero_smallest
from obsdiff_export.linears import Shape, grouped, weights_of
from obsdiff_export.pattern import check
from obsdiff_runtime.backends.ort import open_graph
from obsdiff_runtime.errors import ConfigError, ExportError

DTYPES = ["float32", "float16", "bfloat16"]


def weight_in(path: Path, name: str) -> np.ndarray:
    """(n, k) in float64, of any type and layout."""
    model = onnx.load(path)
    (tensor,) = [each for each in model.graph.initializer if each.name.removesuffix("::T") == f"{name}.weight"]
    if tensor.data_type == TensorProto.BFLOAT16:
        bits = np.frombuffer(tensor.raw_data, np.uint16).astype(np.uint32) << 16
        array = bits.view(np.float32).reshape(tuple(tensor.dims))
    else:
        array = numpy_helper.to_array(tensor)
    return (array.T if tensor.name.endswith("::T") else array).astype(np.float64)


def smallest_zeroed(weight: np.ndarray, n: int, m: int) -> np.ndarray:
    """The definition, group by group; of equal magnitudes the first go."""
    pruned = weight.copy()
    for row in pruned:
        for start in range(0, len(row), m):
            order = sorted(range(m), key=lambda i: (abs(row[start + i]), i))
            for index in order[:n]:
                row[start + index] = 0
    return pruned


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_of_every_four_go_in_every_format(tmp_path: Path, dtype: str) -> None:
    dense = write_linear(tmp_path / "dense", Shape(3, 32, 24), dtype)
    before = weight_in(dense, "linear")
    assert force(dense, tmp_path / "forced", 2, 4) == ("linear",)
    assert np.array_equal(weight_in(tmp_path / "forced" / "model.onnx", "linear"), smallest_zeroed(before, 2, 4))
    assert np.array_equal(weight_in(dense, "linear"), before)
    assert check(tmp_path / "forced" / "model.onnx", 2, 4, ["linear"])[0].zeros == 0.5


@given(
    weight=arrays.arrays(np.float32, (3, 16), elements=st.floats(-4, 4, width=16)),
    pattern=st.sampled_from([(1, 2), (2, 4), (4, 8), (3, 4)]),
    turned=st.booleans(),
)
def test_bits_order_like_magnitudes_in_either_memory_order(
    weight: np.ndarray, pattern: tuple[int, int], turned: bool
) -> None:
    expected = smallest_zeroed(weight.astype(np.float64), *pattern)
    stored = np.ascontiguousarray(weight.T).T if turned else weight.copy()
    zero_smallest(stored.view(np.uint32) if not turned else stored.T.view(np.uint32).T, 0x7FFFFFFF, *pattern)
    assert np.array_equal(stored.astype(np.float64), expected)


def test_an_exported_network_is_forced_by_its_linears_names(exports, tmp_path: Path) -> None:
    for model in (exports.float32, exports.float16, exports.bfloat16):
        folder = tmp_path / model.dtype
        assert set(force(model.path, folder, 2, 4, linears=["up", "down"])) == {"up", "down"}
        reports = {report.name: report for report in check(folder / "model.onnx", 2, 4)}
        assert reports["up.weight"].holds
        assert reports["down.weight"].holds
        assert not reports["gate.weight"].holds
        for name in ("gate", "embed"):
            assert np.array_equal(weight_in(folder / "model.onnx", name), weight_in(model.path, name))


def test_a_width_that_four_does_not_divide_is_left(tmp_path: Path) -> None:
    dense = write_linear(tmp_path / "dense", Shape(3, 30, 8), "float32")
    assert force(dense, tmp_path / "forced", 2, 4) == ()
    assert np.array_equal(weight_in(tmp_path / "forced" / "model.onnx", "linear"), weight_in(dense, "linear"))


def test_a_linear_written_again_is_the_same_bytes(tmp_path: Path) -> None:
    for _ in range(2):
        write_linear(tmp_path / "again", Shape(3, 64, 64), "float16")
    write_linear(tmp_path / "once", Shape(3, 64, 64), "float16")
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


def test_what_cannot_be_forced_is_an_error(tmp_path: Path) -> None:
    dense = write_linear(tmp_path / "dense", Shape(3, 32, 16), "float32")
    with pytest.raises(ConfigError, match="no pattern"):
        force(dense, tmp_path / "forced", 4, 4)
    with pytest.raises(ConfigError, match="would overwrite"):
        force(dense, tmp_path / "dense", 2, 4)
    with pytest.raises(ExportError, match="has no weight of other"):
        force(dense, tmp_path / "forced", 2, 4, linears=["other"])
    with pytest.raises(ExportError, match="cannot be read as an ONNX graph"):
        force(tmp_path / "none.onnx", tmp_path / "forced", 2, 4)
    (tmp_path / "dense" / "model.onnx.data").unlink()
    with pytest.raises(ExportError, match="weights are not there"):
        force(dense, tmp_path / "forced", 2, 4)


def test_a_written_linear_multiplies(tmp_path: Path) -> None:
    path = write_linear(tmp_path, Shape(5, 16, 12), "float32", pattern=(2, 4))
    x = np.random.default_rng(0).standard_normal((5, 16), dtype=np.float32)
    found = open_graph(path).run({"x": x})["y"]
    np.testing.assert_allclose(found, x.astype(np.float64) @ weight_in(path, "linear").T, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_rounded_as_torch_rounds(tmp_path: Path) -> None:
    wide = weight_in(write_linear(tmp_path / "wide", Shape(1, 64, 32), "float32", seed=3), "linear")
    narrow = weight_in(write_linear(tmp_path / "narrow", Shape(1, 64, 32), "bfloat16", seed=3), "linear")
    assert np.array_equal(narrow, torch.tensor(wide).to(torch.float32).to(torch.bfloat16).double().numpy())


@pytest.mark.parametrize(("shape", "dtype"), [(Shape(1, 8, 8), "int8"), (Shape(1, 6, 8), "float32")])
def test_a_linear_that_cannot_be_written_is_an_error(tmp_path: Path, shape: Shape, dtype: str) -> None:
    with pytest.raises(ConfigError):
        write_linear(tmp_path, shape, dtype, pattern=(2, 4))


def test_widths_are_read_in_either_layout(exports) -> None:
    found = {name: (weight.k, weight.n) for name, weight in weights_of(exports.float32.path).items()}
    assert found == {"embed": (8, 16), "up": (16, 32), "gate": (16, 32), "down": (32, 16)}


def test_shapes_are_grouped_by_what_they_cost_together() -> None:
    small, large = Shape(2, 4, 4), Shape(2, 8, 8)
    assert list(grouped({"a": large, "b": small, "c": small}).items()) == [(large, ("a",)), (small, ("b", "c"))]
    many = {f"s{i}": small for i in range(9)}
    assert next(iter(grouped({"a": large} | many))) == small


@pytest.mark.parametrize("external", [True, False])
def test_a_convolution_of_one_pixel_is_forced_along_its_channels(tmp_path: Path, external: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 12, 1, 1)).astype(np.float32)
    x, y = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    node = onnx.helper.make_node("Conv", ["x", "up.weight"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight, "up.weight")])
    (tmp_path / "dense").mkdir()
    path = tmp_path / "dense" / "model.onnx"
    onnx.save(onnx.helper.make_model(graph), path, save_as_external_data=external, location="w", size_threshold=0)
    assert force(path, tmp_path / "forced", 2, 4) == ("up",)
    (forced,) = onnx.load(tmp_path / "forced" / "model.onnx").graph.initializer
    expected = smallest_zeroed(weight[:, :, 0, 0].astype(np.float64), 2, 4)
    assert np.array_equal(numpy_helper.to_array(forced)[:, :, 0, 0].astype(np.float64), expected)
