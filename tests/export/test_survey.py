import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from obsdiff_export.survey import WIDTHS, holding, survey
from obsdiff_runtime.errors import ExportError


def bits_of(zero: np.ndarray) -> np.ndarray:
    """float16 bits; zeros are +0 and -0 in turn."""
    signed = np.where(np.indices(zero.shape).sum(axis=0) % 2, 0x8000, 0)
    return np.where(zero, signed, 0x3C00).astype(np.uint16)


@pytest.mark.parametrize(
    ("row", "patterns"),
    [
        ("0101010101010101", ("1:2", "2:4")),
        ("0011110000111100", ("2:4",)),
        ("0000111100001111", ("4:8",)),
        ("0111011101110111", ("1:4",)),
        ("0001000100010001", ("1:2", "3:4")),
        ("1111111100000000", ("8:16",)),
        ("0000000000000000", ("all zero",)),
        ("1111111111111111", ()),
    ],
)
def test_the_patterns_that_hold_are_told_but_not_what_they_imply(row, patterns):
    zero = np.array([[char == "0" for char in row]] * 3)
    assert holding(bits_of(zero), 0x7FFF) == (float(zero.mean()), patterns)


def test_a_width_that_four_does_not_divide_holds_no_pattern_of_four():
    assert holding(bits_of(np.array([[True, False] * 3])), 0x7FFF) == (0.5, ("1:2",))


@given(
    n_out=st.integers(1, 4),
    k=st.sampled_from([1, 2, 4, 6, 8, 16, 24, 32]),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
    turned=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_is_told_implies_what_holds_by_definition_and_no_more(n_out, k, share, seed, turned):
    zero = np.random.default_rng(seed).random((n_out, k)) < share
    bits = bits_of(zero)
    zeros, told = holding(np.asfortranarray(bits) if turned else bits, 0x7FFF)
    assert zeros == pytest.approx(float(zero.mean()))
    for m in (width for width in WIDTHS if k % width == 0):
        fewest = int(zero.reshape(n_out, k // m, m).sum(axis=-1).min())
        implied = 0
        for pattern in told:
            n, width = (m, m) if pattern == "all zero" else map(int, pattern.split(":"))
            implied = max(implied, n * m // width if m % width == 0 else 0)
            assert m != width or fewest >= n
        assert implied == fewest or (implied < fewest and any(m % int(p.split(":")[1]) for p in told))


def test_every_weight_of_a_graph_is_surveyed(tmp_path):
    weight = np.ones((4, 4, 8), np.float16)
    weight[:, 1:3] = 0
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in "xy")
    nodes = [
        helper.make_node("MatMul", ["x", "w::T"], ["h"], name="first"),
        helper.make_node("MatMul", ["h", "u::T"], ["y"], name="second"),
    ]
    tensors = [
        numpy_helper.from_array(weight.reshape(16, 8), "w::T"),
        helper.make_tensor("u::T", TensorProto.COMPLEX64, [8, 8], [0.0] * 64),
    ]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y], tensors)), tmp_path / "model.onnx")
    told = []
    first, second = survey(tmp_path / "model.onnx", progress=lambda *args: told.append(args))
    assert (first.name, first.node, first.k, first.n_out, first.dtype) == ("w", "first", 16, 8, "float16")
    assert (first.zeros, first.patterns) == (0.5, ("1:2", "2:4"))
    assert (second.name, second.dtype, second.zeros, second.patterns) == ("u", "complex64", None, ())
    assert told == [("weights", 0, 2, "w"), ("weights", 1, 2, "u"), ("weights", 2, 2)]


def test_what_is_no_graph_is_an_error(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff\xffnonsense")
    with pytest.raises(ExportError, match="cannot be read as a graph"):
        survey(tmp_path / "model.onnx")
