"""A graph of one matrix product, in each number format, and what it should give."""

from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

ROWS: Final = 16
SIZE: Final = 64
FORMATS: Final = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "int8": TensorProto.INT8,
    "fp8": TensorProto.FLOAT8E4M3FN,
}
TOLERANCE: Final = 0.1
"""Largest error over the largest entry: fp8 keeps four bits of each factor; the other formats are far below."""

_SCALE: Final = {"int8": 1 / 32, "fp8": 1.0}


def product(form: str) -> bytes:
    """x (ROWS, SIZE) float32 -> y (ROWS, SIZE) float32, with the product between in `form`; int8 and fp8 by Q/DQ."""
    kind = FORMATS[form]
    weight = helper.make_tensor("w", TensorProto.FLOAT, (SIZE, SIZE), factors()[1].ravel())
    if form in _SCALE:
        nodes, constants = _quantized(kind, _SCALE[form])
    else:
        values = numpy_helper.to_array(weight).ravel()
        constants = [helper.make_tensor("w", kind, (SIZE, SIZE), values)]
        nodes = [
            helper.make_node("Cast", ["x"], ["xf"], to=kind),
            helper.make_node("MatMul", ["xf", "w"], ["yf"], name="product"),
            helper.make_node("Cast", ["yf"], ["y"], to=TensorProto.FLOAT),
        ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (ROWS, SIZE))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, (ROWS, SIZE))
    graph = helper.make_graph(nodes, "product", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def factors() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """x (ROWS, SIZE) and the weight (SIZE, SIZE)."""
    generator = np.random.default_rng(0)
    return (
        generator.standard_normal((ROWS, SIZE)).astype(np.float32),
        generator.standard_normal((SIZE, SIZE)).astype(np.float32),
    )


def error(got: NDArray[np.float32]) -> float:
    """Of a result (ROWS, SIZE), relative to its largest entry.

    Raises:
        ArithmeticError: it is no product of the factors.
    """
    x, weight = (factor.astype(np.float64) for factor in factors())
    expected = x @ weight
    relative = float(np.abs(got - expected).max() / np.abs(expected).max())
    if not relative <= TOLERANCE:
        raise ArithmeticError(f"the product is off by {relative:.1e} of its largest entry")
    return relative


def _quantized(kind: int, scale: float) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Quantised input and weight, per tensor."""
    weight = np.clip(np.rint(factors()[1] / scale), -127, 127) if kind == TensorProto.INT8 else factors()[1]
    constants = [
        helper.make_tensor("w", kind, (SIZE, SIZE), weight.ravel()),
        helper.make_tensor("scale", TensorProto.FLOAT, (), [scale]),
        helper.make_tensor("zero", kind, (), [0]),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["y"], name="product"),
    ]
    return nodes, constants
