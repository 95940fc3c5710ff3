"""Where Q/DQ stands in a graph, what is stored, and that torch imitates it."""

import copy
import functools
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from obsdiff_export.component import Component
from obsdiff_export.formats import FORMATS, Format, stored_scale
from obsdiff_export.onnx import OnnxModel, export
from obsdiff_export.parity import compare
from obsdiff_export.pattern import check
from obsdiff_export.quantizing import LinearScales, Quantization, imitated
from obsdiff_runtime.errors import ConfigError, ExportError

QUANTIZED = ("up", "gate", "down")
STORED = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


def quantized(toy: Component, format: Format, dtype: torch.dtype, *, outputs: bool = False):
    """The toy in 2:4, one row of zeros, three linears rounded by their largest magnitudes; its scales."""
    module = copy.deepcopy(toy.module)
    scales = {}
    for name in QUANTIZED:
        linear = module.get_submodule(name)
        weight = linear.weight.data
        weight.view(-1, 4)[:, 1:3] = 0
        weight[3] = 0
        largest = weight.abs().amax(1) if format.per_output else weight.abs().amax()
        scale = stored_scale(largest / format.largest, dtype)
        weight.copy_(format.rounded(weight, scale[:, None] if format.per_output else scale))
        scales[name] = LinearScales(
            weight=scale,
            input=stored_scale(torch.tensor(4.0 / format.largest), dtype),
            output=stored_scale(torch.tensor(3.0 / format.largest), dtype) if outputs else None,
        )
    return replace(toy, module=module), Quantization(format=format, linears=scales)


def graph_of(model: OnnxModel):
    graph = onnx.load(str(model.path)).graph
    return graph, {tensor.name: tensor for tensor in graph.initializer}


@pytest.fixture(scope="module")
def made(toy, tmp_path_factory):
    """made(format, dtype, outputs=False): component, quantization and export; each is made once."""

    @functools.cache
    def make(name: str, dtype: torch.dtype, outputs: bool = False):
        component, quantization = quantized(toy, FORMATS[name], dtype, outputs=outputs)
        model = export(component, tmp_path_factory.mktemp(name), dtype=dtype, quantization=quantization)
        return component, quantization, model

    return make


@pytest.fixture(params=FORMATS.values(), ids=lambda each: each.name)
def format(request) -> Format:
    return request.param


def test_every_quantised_linear_has_its_codes_and_nothing_else_is_touched(made, exports, format):
    _, _, model = made(format.name, torch.float32)
    plain = exports.float32
    assert (model.precision, model.dtype, plain.precision) == (format.name, "float32", "float32")
    graph, stored = graph_of(model)
    producers = {output: node for node in graph.node for output in node.output}
    for name in QUANTIZED:
        reader = next(
            node for node in graph.node if node.op_type == "MatMul" and f"{name}.weight" in str(node.input[1])
        )
        entering, weight = (producers[value] for value in reader.input)
        assert (entering.op_type, producers[entering.input[0]].op_type) == ("DequantizeLinear", "QuantizeLinear")
        assert (weight.op_type, weight.input[0]) == ("DequantizeLinear", f"{name}.weight::T")
        assert stored[f"{name}.weight::T"].data_type == STORED[format.name]
    before, _ = graph_of(plain)
    added = {"QuantizeLinear", "DequantizeLinear"}
    assert [node.op_type for node in graph.node if node.op_type not in added] == [node.op_type for node in before.node]
    assert stored["embed.weight"].data_type == TensorProto.FLOAT


def test_linears_that_read_one_tensor_share_its_rounding(made, format):
    graph, _ = graph_of(made(format.name, torch.float32)[2])
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 2  # up and gate; down
    assert sum(node.op_type == "DequantizeLinear" for node in graph.node) == 2 + 3


def test_the_codes_and_scales_in_the_graph_are_the_weights_of_the_module(made, format):
    component, _, model = made(format.name, torch.bfloat16)
    _, stored = graph_of(model)
    for name in QUANTIZED:
        codes = numpy_helper.to_array(stored[f"{name}.weight::T"]).astype(np.float64)
        scale = numpy_helper.to_array(stored[f"{name}.weight::scale"]).astype(np.float64)
        weight = component.module.get_submodule(name).weight.detach().double().numpy()
        assert np.allclose((codes * scale).T, weight, rtol=1e-7, atol=0)


@pytest.mark.parametrize(("dtype", "outputs"), [(torch.float32, False), (torch.float16, True)])
def test_torch_imitates_the_graph(made, format, dtype, outputs):
    component, quantization, model = made(format.name, dtype, outputs)
    alike = compare(component, model, quantization=quantization).max_relative_error
    unlike = compare(component, model, tolerance=1.0).max_relative_error
    assert alike < (1e-5 if dtype == torch.float32 else 1e-2)  # float32 differs in the order of sums only
    assert unlike > 1e-3  # the linears do round


def test_torch_computes_as_before_outside(toy, format):
    component, quantization = quantized(toy, format, torch.float32)
    with torch.no_grad():
        before = component.module(**component.inputs)[0]
        with imitated(component.module, quantization):
            inside = component.module(**component.inputs)[0]
        assert not torch.equal(inside, before)
        assert torch.equal(component.module(**component.inputs)[0], before)


def test_outputs_are_rounded_behind_the_bias(made, format):
    graph, _ = graph_of(made(format.name, torch.float16, True)[2])
    producers = {output: node for node in graph.node for output in node.output}
    for name, wanted in (("up", "Add"), ("gate", "Add"), ("down", "MatMul")):  # down has no bias
        rounding = next(node for node in graph.node if node.name == f"{name}.output::Q")
        assert producers[rounding.input[0]].op_type == wanted


def test_zeros_survive_and_are_found_under_the_weights_name(made, format):
    component, _, model = made(format.name, torch.bfloat16)
    reports = {report.name: report for report in check(model.path, 2, 4, QUANTIZED)}
    assert all(reports[f"{name}.weight"].holds for name in QUANTIZED)
    _, stored = graph_of(model)
    for name in QUANTIZED:
        weight = component.module.get_submodule(name).weight.detach().numpy().T
        codes = numpy_helper.to_array(stored[f"{name}.weight::T"]).astype(np.float32)
        assert not codes[weight == 0].any()


def test_the_same_module_gives_the_same_bytes(made, tmp_path):
    component, quantization, model = made("fp8", torch.float32)
    again = export(component, tmp_path, dtype=torch.float32, quantization=quantization)
    for file in ("model.onnx", "model.onnx.data"):
        assert (model.path.parent / file).read_bytes() == (again.path.parent / file).read_bytes()


def test_int8_codes_are_those_of_onnxruntimes_own_quantizer(made):
    from onnxruntime.quantization.quant_utils import quantize_nparray

    component, _, model = made("int8", torch.float32)
    _, stored = graph_of(model)
    scale = numpy_helper.to_array(stored["up.weight::scale"])
    weight = component.module.up.weight.detach().numpy()
    for output in range(len(scale)):
        wanted = quantize_nparray(TensorProto.INT8, weight[output], scale[output], np.int8(0))
        assert np.array_equal(numpy_helper.to_array(stored["up.weight::T"])[:, output], wanted)


def test_a_linear_on_rows_is_quantised_as_gemm(toy, tmp_path):
    format = FORMATS["int8"]
    component, quantization = quantized(toy, format, torch.float32)
    name, weight = "embed", component.module.embed.weight.data
    scale = stored_scale(weight.abs().amax(1) if format.per_output else weight.abs().amax(), torch.float32)
    scale = stored_scale(scale / format.largest, torch.float32)
    weight.copy_(format.rounded(weight, scale[:, None] if format.per_output else scale))
    rows = LinearScales(weight=scale, input=stored_scale(torch.tensor(1 / format.largest), torch.float32))
    quantization = Quantization(format=format, linears={name: rows})
    model = export(component, tmp_path, dtype=torch.float32, quantization=quantization)
    assert compare(component, model, quantization=quantization).max_relative_error < 1e-5
    _, stored = graph_of(model)
    assert stored["embed.weight"].data_type == STORED[format.name]


def test_a_linear_that_is_not_in_the_graph_is_an_error(toy, tmp_path):
    scales = LinearScales(weight=torch.tensor(1.0), input=torch.tensor(1.0))
    quantization = Quantization(format=FORMATS["fp8"], linears={"sideways": scales})
    with pytest.raises(ExportError, match="sideways is to be quantised, and the graph has no weight"):
        export(toy, tmp_path, dtype=torch.float32, quantization=quantization)


def test_an_opset_without_float8_is_refused(toy, tmp_path, format):
    component, quantization = quantized(toy, format, torch.float32)
    with pytest.raises(ConfigError, match="opset 18 has no 8-bit graphs; take 19 or later"):
        export(component, tmp_path, dtype=torch.float32, opset=18, quantization=quantization)
