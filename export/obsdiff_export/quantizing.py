"""Linears in eight bits: Q/DQ in the graph, and the same arithmetic in torch.

    n, k      a linear's output and input width

In the graph a quantised linear is

    x -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- weight as codes
                                                 |
                                                Add <- bias    [ -> QuantizeLinear -> DequantizeLinear ]

which is how TensorRT and ONNX Runtime are told. The codes keep the weight's name, so that everything that looks for a
weight finds it; `<name>::scale` is beside it. Linears that read the same tensor with the same scale share its Q/DQ.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from obsdiff_export.formats import Format
from obsdiff_export.linears import TRANSPOSED
from obsdiff_runtime.errors import ExportError

LEAST_OPSET: Final = 19
"""The first with float8, and with scales that are not float32."""

_NUMPY: Final[dict[ir.DataType, Any]] = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
}


@dataclass(frozen=True, kw_only=True)
class LinearScales:
    """The scales of one linear, float32 tensors on the CPU, each a number that the graph's dtype has.

    Attributes:
        weight: (n,) or ().
        input: ().
        output: (), of what the linear gives, bias included; None: its output is not quantised.
    """

    weight: Tensor
    input: Tensor
    output: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Which linears compute in eight bits, and how.

    Attributes:
        format: of weights and activations.
        linears: module name -> its scales. The module's weight is already rounded by them.
    """

    format: Format
    linears: Mapping[str, LinearScales] = field(default_factory=dict)


@contextmanager
def imitated(module: nn.Module, quantization: Quantization | None) -> Iterator[None]:
    """Inside, the linears round their inputs (and outputs) as the graph does; their weights are rounded already."""
    handles = []
    try:
        for name, scales in quantization.linears.items() if quantization is not None else ():
            handles += _hooks(module.get_submodule(name), scales, quantization.format)  # type: ignore[union-attr]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(linear: nn.Module, scales: LinearScales, format: Format) -> list[Any]:
    device = next(linear.parameters()).device
    entering = scales.input.to(device)
    hooks: list[Any] = [
        linear.register_forward_pre_hook(lambda _, args: (format.rounded(args[0], entering), *args[1:]))
    ]
    if scales.output is not None:
        leaving = scales.output.to(device)
        hooks.append(linear.register_forward_hook(lambda _, __, output: format.rounded(output, leaving)))
    return hooks


def insert(model: ir.Model, quantization: Quantization) -> None:
    """Puts Q/DQ at the linears; changes the model, and nothing of it but them.

    Args:
        model: of opset `LEAST_OPSET` or later, changed in place; its weights have their module's names, `::T` where
            they lie transposed.
        quantization: what to quantise.

    Raises:
        ExportError: a linear is not in the graph, or something other than a MatMul or Gemm reads its weight.
    """
    graft = _Graft(model.graph, quantization.format)
    for name, scales in quantization.linears.items():
        graft.linear(name, scales)


class _Graft:
    """Adds the nodes; remembers the Q/DQ of activations that several linears read."""

    def __init__(self, graph: ir.Graph, format: Format) -> None:
        self._graph = graph
        self._format = format
        self._type = ir.DataType[format.onnx]
        self._read: dict[tuple[str, float], ir.Value] = {}

    def linear(self, name: str, scales: LinearScales) -> None:
        weight = self._weight(name)
        readers = [(node, place) for node, place in weight.uses()]
        if any(node.op_type not in ("MatMul", "Gemm") or place != 1 for node, place in readers) or not readers:
            raise ExportError(f"{weight.name}: only a MatMul or Gemm may read a quantised weight")
        outputs = 1 if str(weight.name).endswith(TRANSPOSED) else 0
        dtype = weight.dtype
        assert dtype is not None
        decoded = self._codes(weight, scales.weight, outputs, readers[0][0])
        for node, _ in readers:
            source = node.inputs[0]
            assert source is not None
            node.replace_input_with(0, self._rounded(source, scales.input, f"{name}.input", dtype, node))
            node.replace_input_with(1, decoded)
            if scales.output is not None:
                self._round_output(name, node, scales.output, dtype)

    def _weight(self, name: str) -> ir.Value:
        for candidate in (f"{name}.weight{TRANSPOSED}", f"{name}.weight"):
            value = self._graph.initializers.get(candidate)
            if value is not None and value.const_value is not None:
                return value
        raise ExportError(f"{name} is to be quantised, and the graph has no weight of that name")

    def _codes(self, weight: ir.Value, scale: Tensor, outputs: int, before: ir.Node) -> ir.Value:
        """Replaces the stored numbers by codes; returns the value that reads as the weight again."""
        original, dtype = weight.const_value, weight.dtype
        assert original is not None
        assert dtype is not None
        shape, name, format = ir.Shape(original.shape.numpy()), str(weight.name), self._format
        along = scale if scale.ndim == 0 else scale.view((-1, 1) if outputs == 0 else (1, -1))

        def codes() -> ir.TensorProtocol:
            values = torch.from_numpy(np.asarray(original.numpy(), dtype=np.float32))
            return _codes_tensor(format.encode(values, along), name)

        weight.const_value = ir.LazyTensor(codes, dtype=self._type, shape=shape, name=name, cache=False)
        weight.dtype = self._type
        base = name.removesuffix(TRANSPOSED).removesuffix(".weight")
        inputs = [weight, self._scale(scale, f"{base}.weight", dtype), self._nought(scale.shape, f"{base}.weight")]
        attributes = {} if scale.ndim == 0 else {"axis": outputs}
        return self._add(before, "DequantizeLinear", inputs, f"{name}::DQ", dtype, shape, attributes)

    def _rounded(self, value: ir.Value, scale: Tensor, label: str, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        key = (str(value.name), float(scale))
        if key not in self._read:
            stored = self._scale(scale, label, dtype)
            quantized = self._add(
                before, "QuantizeLinear", [value, stored, self._nought()], f"{label}::Q", self._type, value.shape
            )
            self._read[key] = self._add(
                before, "DequantizeLinear", [quantized, stored, self._nought()], f"{label}::DQ", dtype, value.shape
            )
        return self._read[key]

    def _round_output(self, name: str, node: ir.Node, scale: Tensor, dtype: ir.DataType) -> None:
        """Behind the bias where there is one: kernels add it before they round."""
        last = node
        uses = list(node.outputs[0].uses())
        if (
            len(uses) == 1
            and uses[0][0].op_type == "Add"
            and any(value is not None and value.name == f"{name}.bias" for value in uses[0][0].inputs)
        ):
            last = uses[0][0]
        value = last.outputs[0]
        readers = list(value.uses())
        if value.is_graph_output() or not readers:
            return
        follower = last
        stored = self._scale(scale, f"{name}.output", dtype)
        quantized = self._add(
            follower, "QuantizeLinear", [value, stored, self._nought()], f"{name}.output::Q", self._type, value.shape,
            after=True,
        )  # fmt: skip
        producer = quantized.producer()
        assert producer is not None
        decoded = self._add(
            producer,
            "DequantizeLinear",
            [quantized, stored, self._nought()],
            f"{name}.output::DQ",
            dtype,
            value.shape,
            after=True,
        )
        for reader, place in readers:
            reader.replace_input_with(place, decoded)

    def _scale(self, scale: Tensor, label: str, dtype: ir.DataType) -> ir.Value:
        name = f"{label}::scale"
        if name not in self._graph.initializers:
            self._constant(name, ir.tensor(scale.numpy().astype(_NUMPY[dtype]), name=name))
        return self._graph.initializers[name]

    def _nought(self, shape: Sequence[int] = (), label: str = "") -> ir.Value:
        """Zero in the format: it says which format a QuantizeLinear gives. A label has zeros of its own.

        ONNX Runtime rewrites those of weights where a CPU multiplies unsigned by signed integers, and only once each.
        """
        name = f"{label or self._format.name}::zero"
        if name not in self._graph.initializers:
            self._constant(name, _codes_tensor(torch.zeros(tuple(shape), dtype=self._format.dtype), name))
        return self._graph.initializers[name]

    def _constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value

    def _add(
        self,
        place: ir.Node,
        operator: str,
        inputs: list[ir.Value],
        name: str,
        dtype: ir.DataType,
        shape: ir.Shape | None,
        attributes: Mapping[str, int] | None = None,
        *,
        after: bool = False,
    ) -> ir.Value:
        output = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
        given = [ir.AttrInt64(key, value) for key, value in (attributes or {}).items()]
        node = ir.Node("", operator, inputs, given, outputs=[output], name=name)
        (self._graph.insert_after if after else self._graph.insert_before)(place, node)
        return output


def _codes_tensor(codes: Tensor, name: str) -> ir.TensorProtocol:
    if codes.dtype == torch.int8:
        return ir.Tensor(codes.numpy(), name=name)
    return ir.Tensor(codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn), name=name)
