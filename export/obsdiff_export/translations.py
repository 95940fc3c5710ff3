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
        aten.split_with_sizes.default: split,
        aten.rms_norm.default: rms_norm,
        aten.outer.default: outer,
        aten.clip.default: clip,
        aten.rsub.Scalar: subtract_from,
        aten.meshgrid.indexing: meshgrid,
        aten.detach_.default: detach,
        aten.__and__.Tensor: both,
        aten.add_.Tensor: add,
        aten.min.other: least,
        aten.movedim.int: move_axis,
        aten._upsample_nearest_exact2d.vec: enlarge,
        aten.to.dtype: cast,
        aten.to.dtype_layout: lay_out,
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


def split(x: Any, sizes: Sequence[Any], dim: int = 0) -> tuple[Any, ...]:
    """As a slice for each part: a size may be computed, and a sequence of tensors is no type that builders know."""
    axes, start = op.Constant(value_ints=[dim]), op.Constant(value_ints=[0])
    parts = []
    for size in sizes:
        end = op.Add(start, _list_of(size))
        parts.append(op.Slice(x, start, end, axes))
        start = end
    return tuple(parts)


def _list_of(size: Any) -> Any:
    """Of one entry; a size is known, or computed."""
    return op.Constant(value_ints=[size]) if isinstance(size, int) else op.Reshape(size, op.Constant(value_ints=[1]))


def rms_norm(x: Any, normalized_shape: Sequence[Any], weight: Any = None, eps: float | None = None) -> Any:
    """In float32 at least, as torch computes it; the exporter knows no translation."""
    narrow = x.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
    wide = ir.DataType.FLOAT if narrow else x.dtype
    least = torch.finfo(torch.float32).eps if eps is None else eps
    axes = op.Constant(value_ints=list(range(-len(normalized_shape), 0)))
    values = _to(x, wide)
    energy = op.ReduceMean(op.Mul(values, values), axes)
    found = op.Div(values, op.Sqrt(op.Add(energy, _number(least, wide))))
    if weight is not None:
        found = op.Mul(found, _to(weight, wide))
    return op.Cast(found, to=int(x.dtype)) if narrow else found


def _to(x: Any, dtype: ir.DataType) -> Any:
    return x if x.dtype == dtype else op.Cast(x, to=int(dtype))


def _number(value: float, dtype: ir.DataType) -> Any:
    return op.Constant(value=ir.tensor(value, dtype=dtype))


def outer(column: Any, row: Any) -> Any:
    """As a product of a column and a row."""
    return op.Mul(op.Unsqueeze(column, op.Constant(value_ints=[1])), op.Unsqueeze(row, op.Constant(value_ints=[0])))


def clip(x: Any, least: float | None = None, most: float | None = None) -> Any:
    dtype = x.dtype
    for bound, limit in ((least, op.Max), (most, op.Min)):
        x = x if bound is None else limit(x, _number(bound, dtype))
    return x


def subtract_from(x: Any, number: float, alpha: float = 1) -> Any:
    """number - alpha * x."""
    return op.Sub(_number(number, x.dtype), x if alpha == 1 else op.Mul(x, _number(alpha, x.dtype)))


def meshgrid(axes: Sequence[Any], indexing: str) -> tuple[Any, ...]:
    """Each axis over the whole grid: its first dimension is the first axis's ("ij"), or the second one's ("xy")."""
    places = list(range(len(axes)))
    if indexing == "xy":
        places[:2] = reversed(places[:2])
    shape = op.Concat(*(op.Shape(axes[place]) for place in places), axis=0)
    found = []
    for axis, place in zip(axes, places, strict=True):
        others = [other for other in range(len(axes)) if other != place]
        found.append(op.Expand(op.Unsqueeze(axis, op.Constant(value_ints=others)) if others else axis, shape))
    return tuple(found)


def detach(x: Any) -> Any:
    """Of a constant, which capture detaches in place."""
    return op.Identity(x)


def both(x: Any, y: Any) -> Any:
    """Of truth values; bits of numbers are opset 18's BitwiseAnd."""
    return op.And(x, y) if x.dtype == ir.DataType.BOOL else op.BitwiseAnd(x, y)


def add(x: Any, y: Any, alpha: float = 1) -> Any:
    """Of a tensor that nobody else reads: into another one, in its type."""
    added = _number(y, x.dtype) if isinstance(y, int | float) else _to(y, x.dtype)
    return op.Add(x, added if alpha == 1 else op.Mul(added, _number(alpha, x.dtype)))


def least(x: Any, y: Any) -> Any:
    """Of integers of one type, as T5's buckets of distances are, or of floats."""
    widest = _widest([x.dtype, y.dtype])
    return op.Min(x, y) if widest is None else op.Min(_to(x, widest), _to(y, widest))


def move_axis(x: Any, source: int, destination: int) -> Any:
    order = list(range(len(x.shape)))
    order.insert(destination % len(order), order.pop(source))
    return op.Transpose(x, perm=order)


def enlarge(x: Any, sizes: Sequence[Any] | None, factors: Sequence[float] | None) -> Any:
    """To the nearest pixel of where a pixel's middle falls."""
    how = {"mode": "nearest", "coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_ceil"}
    if factors is not None:
        return op.Resize(x, None, op.Constant(value_floats=[1.0, 1.0, *factors]), None, **how)
    sides = op.Concat(op.Shape(x, start=0, end=2), *(_list_of(size) for size in sizes or ()), axis=0)
    return op.Resize(x, None, None, sides, **how)


def cast(x: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: Any = None) -> Any:
    return op.Identity(x) if x.dtype == dtype else op.Cast(x, to=int(dtype))


def move(
    x: Any, device: str, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: Any = None
) -> Any:
    return cast(x, dtype)


def lay_out(x: Any, dtype: int | None = None, layout: Any = None, device: str | None = None) -> Any:
    return op.Identity(x) if dtype is None else cast(x, dtype)


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
