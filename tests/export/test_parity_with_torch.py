import sys
from dataclasses import replace

import onnx
import pytest
import torch
from onnx import numpy_helper

from obsdiff_export.onnx import export
from obsdiff_export.parity import TOLERANCES, compare
from obsdiff_runtime.errors import ExportError, MissingPackageError


def test_float32_agrees_with_torch_at_three_shapes(toy, exports):
    parity = compare(toy, exports.float32)
    assert (
        parity.max_relative_error <= 1e-5
    )  # a hundredth of float32's rounding over three linears; the contract is 1e-4
    assert [shapes["tokens"] for shapes in parity.shapes] == [(2, 5, 16), (3, 7, 16), (1, 9, 16)]
    assert set(parity.per_output) == {"out", "shift"}
    assert parity.measured == "float32"


def test_float16_agrees_within_its_rounding(toy, exports):
    parity = compare(toy, exports.float16)
    assert 0 < parity.max_relative_error <= TOLERANCES["float16"]
    assert parity.measured == "float16"


def test_bfloat16_is_checked_for_validity_and_measured_in_float32(toy, exports):
    parity = compare(toy, exports.bfloat16)
    assert parity.measured == "float32"
    assert parity.max_relative_error <= 1e-5


def test_a_wrong_weight_is_an_error_that_names_component_output_error_and_tolerance(toy, exports, tmp_path):
    model = onnx.load(exports.float32.path)
    for tensor in model.graph.initializer:
        if tensor.name == "down.weight::T":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1.01, tensor.name))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(ExportError, match=r"toy: output out .* differs from torch by .*, allowed is 0\.0001"):
        compare(toy, replace(exports.float32, path=path))


def test_a_graph_that_fixed_a_size_is_an_error_that_names_the_shapes(toy, tmp_path):
    fixed = replace(toy, dynamic_axes={"tokens": {1: "length"}})
    model = export(fixed, tmp_path, dtype=torch.float32)
    with pytest.raises(ExportError, match=r"cannot run .* at .*\(3, 7, 16\)"):
        compare(fixed, model)


def test_not_a_number_is_an_error(toy, exports):
    broken = replace(toy, more_inputs=({**toy.inputs, "tokens": torch.full((2, 5, 16), float("nan"))},))
    with pytest.raises(ExportError, match="differs from torch by inf"):
        compare(broken, exports.float32)


def test_without_onnxruntime_the_error_names_the_extra(toy, exports, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'obsdiff\[cpu\]'"):
        compare(toy, exports.float32)
