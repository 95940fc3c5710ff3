"""How torch operations become ONNX where the exporter's own answer is wrong, missing, or invalid in bfloat16."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op

_WIDTHS = {ir.DataType.BFLOAT16: 1, ir.DataType.FLOAT16: 1, ir.DataType.FLOAT: 2, ir.DataType.DOUBLE: 3}


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The table for torch.onnx.export's custom_translation_table."""
    aten = torch.ops.aten
    return {
        aten.squeeze.dim: squeeze,
        aten.cat.default: concatenate,
        aten.concat.default: concatenate,
        aten.einsum.default: einsum,
        aten.to.dtype: cast,
        aten.to.device: move,
        operator.floordiv: floor_divide,
    }


def squeeze(x: Any, dim: int) -> Any:
    """Identity where the axis is not 1 long, as in torch; the exporter would squeeze regardless."""
    if x.shape is None or len(x.shape) == 0 or x.shape[dim] != 1:
        return op.Identity(x)
    return op.Squeeze(x, op.Constant(value_ints=[dim]))


def concatenate(tensors: Sequence[Any], dim: int = 0) -> Any:
    """Casts to the widest of the float types first, as torch does; ONNX takes one type only."""
    present = [x for x in tensors if x is not None and x.shape != (0,)]
    widest = _widest([x.dtype for x in present])
    same = [x if widest is None or x.dtype == widest else op.Cast(x, to=int(widest)) for x in present]
    return op.Identity(same[0]) if len(same) == 1 else op.Concat(*same, axis=dim)


def einsum(equation: str, tensors: Sequence[Any], path: Any = None) -> Any:
    """A Transpose where that is all it does: Einsum has no bfloat16."""
    source, _, target = equation.replace(" ", "").partition("->")
    if len(tensors) == 1 and target and sorted(source) == sorted(target) and len(set(source)) == len(source):
        return op.Transpose(tensors[0], perm=[source.index(axis) for axis in target])
    return op.Einsum(*tensors, equation=equation)


def cast(x: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: Any = None) -> Any:
    return op.Identity(x) if x.dtype == dtype else op.Cast(x, to=int(dtype))


def move(
    x: Any, device: str, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: Any = None
) -> Any:
    return cast(x, dtype)


def floor_divide(a: Any, b: Any) -> Any:
    """Of sizes, rounding down as Python does; ONNX's Div rounds towards zero, and captured sizes do become negative."""
    return op.Div(op.Sub(a, op.Mod(a, b)), b)


def _widest(dtypes: Sequence[ir.DataType | None]) -> ir.DataType | None:
    """The float type that holds all of them; None where they are equal, or not all floats of a known type."""
    known = [dtype for dtype in dtypes if dtype in _WIDTHS]
    if len(set(dtypes)) == 1 or len(known) != len(dtypes):
        return None
    widest = max(known, key=lambda dtype: _WIDTHS[dtype])
    half = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    return ir.DataType.FLOAT if half <= set(known) and widest in half else widest
