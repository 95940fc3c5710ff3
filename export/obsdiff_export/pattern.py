"""The N:M check in the graph as it was exported, on the weights as they are stored.

    k      width of the reduction: the axis along which every m consecutive weights must hold n zeros
    n_out  the other axis

Every MatMul and Gemm with a constant 2-D operand is looked at, through Transpose, Cast, Identity and Q/DQ, and every
Conv whose weight is constant and of one pixel over all channels, (n_out, k, 1, 1): it is a product too. Weights are
compared as bits, so float16, bfloat16, float8 and int8 need no conversion and -0.0 is a zero. The data file is mapped.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto

from obsdiff_runtime.errors import ConfigError, ExportError

_Array = np.ndarray[Any, np.dtype[Any]]

_SUFFIX: Final = "::T"
_CHUNK: Final = 1 << 24
_PASSED: Final = ("Cast", "Identity", "QuantizeLinear", "DequantizeLinear")
_BITS: Final[dict[int, tuple[type[np.unsignedinteger[Any]], int]]] = {
    TensorProto.FLOAT: (np.uint32, 0x7FFFFFFF),
    TensorProto.FLOAT16: (np.uint16, 0x7FFF),
    TensorProto.BFLOAT16: (np.uint16, 0x7FFF),
    TensorProto.FLOAT8E4M3FN: (np.uint8, 0x7F),
    TensorProto.FLOAT8E5M2: (np.uint8, 0x7F),
    TensorProto.INT8: (np.uint8, 0xFF),
}
"""Element type -> its bits as an unsigned integer, and those that are zero for a zero (all but the sign of a float)."""


@dataclass(frozen=True, kw_only=True)
class PatternReport:
    """What one weight's operand looks like.

    Attributes:
        name: the weight's, as in the module.
        node: the MatMul, Gemm or Conv that reads it.
        k, n_out: widths.
        holds: whether every m consecutive weights along k hold at least n zeros.
        zeros: share of the weights that are zero.
        reason: why it does not hold, "" where it does.
        pattern: that was looked for.
        dtype: of the stored weights, as numpy calls it ("float16"); "" where it is not known.
        reads: the tensor that is multiplied with the weight, before casts and Q/DQ: linears that read one tensor may
            be merged by a builder. "" where it is not known.
    """

    name: str
    node: str
    k: int
    n_out: int
    holds: bool
    zeros: float
    reason: str
    pattern: str = "2:4"
    dtype: str = ""
    reads: str = ""


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A constant operand of a product as it lies in the file.

    Attributes:
        name, node, dtype, reads: as in PatternReport.
        k, n_out: widths.
        bits: (n_out, k), the stored elements as unsigned integers, mapped where they are external; None for a type that
            is not known here.
        mask: the bits that are zero for a zero.
    """

    name: str
    node: str
    dtype: str
    reads: str
    k: int
    n_out: int
    bits: _Array | None
    mask: int


@dataclass(frozen=True)
class _Operand:
    tensor: TensorProto
    node: str
    axis: int
    reads: str


def check(model_path: Path, n: int, m: int, expected: Collection[str] = ()) -> list[PatternReport]:
    """One report per constant weight of a product, in graph order.

    Args:
        model_path: the graph, its data beside it.
        n: this many zeros at least.
        m: in this many consecutive weights along the reduction.
        expected: weights, or modules that own a `weight`, that must hold the pattern.

    Raises:
        ConfigError: n:m is no pattern.
        ExportError: the graph cannot be read, or an expected weight is not in it or does not hold the pattern.
    """
    if not 0 < n < m:
        raise ConfigError(f"{n}:{m} is no pattern: N of every M are zero, and N is 1 to M-1")
    reports = [_report(weight, n, m) for weight in stored_weights(model_path)]
    _require(model_path, reports, f"{n}:{m}", expected)
    return reports


def stored_weights(model_path: Path) -> Iterator[StoredWeight]:
    """Every constant operand of a product, in graph order; mapped as it is asked for.

    Raises:
        ExportError: the graph or its weights cannot be read.
    """
    try:
        model = onnx.load(str(model_path), load_external_data=False)
        for operand in _operands(model.graph):
            yield _stored(operand, model_path.parent)
    except Exception as error:  # protobuf's own among them
        raise ExportError(f"{model_path}: cannot be read as a graph with its weights: {error}") from error


def _require(path: Path, reports: list[PatternReport], pattern: str, expected: Collection[str]) -> None:
    found: dict[str, list[PatternReport]] = {}
    for report in reports:
        found.setdefault(report.name, []).append(report)
    broken = []
    for name in expected:
        named = found.get(name, []) or found.get(f"{name}.weight", [])
        if not named:
            broken.append(f"{name}: no MatMul, Gemm or Conv of one pixel reads it")
        broken += [f"{report.name}: {report.reason}" for report in named if not report.holds]
    if broken:
        shown = "; ".join(broken[:3]) + (f"; and {len(broken) - 3} more" if len(broken) > 3 else "")
        raise ExportError(f"{path}: {len(broken)} weights should be {pattern} in the graph and are not: {shown}")


def _operands(graph: onnx.GraphProto) -> Iterator[_Operand]:
    """Constant operands of products, with the axis of the stored tensor that is reduced."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type == "Conv":
            traced = _trace(node.input[1], constants, producers)
            if traced is not None and not traced[1] and _reads_a_pixel(node, traced[0]):
                yield _Operand(traced[0], node.name or node.output[0], 1, _source(node.input[0], producers))
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        flags = {attribute.name: attribute.i for attribute in node.attribute}
        for side, reduced in ((0, 0 if flags.get("transA") else 1), (1, 1 if flags.get("transB") else 0)):
            traced = _trace(node.input[side], constants, producers)
            if traced is not None and len(traced[0].dims) == 2:
                tensor, turned = traced
                reads = _source(node.input[1 - side], producers)
                yield _Operand(tensor, node.name or node.output[0], reduced ^ turned, reads)


def _reads_a_pixel(node: onnx.NodeProto, weight: TensorProto) -> bool:
    """Whether a Conv is a product over all channels of each pixel."""
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    return len(weight.dims) > 2 and all(side == 1 for side in weight.dims[2:]) and groups == 1


def _source(name: str, producers: dict[str, onnx.NodeProto]) -> str:
    """The value behind casts and Q/DQ."""
    while (node := producers.get(name)) is not None and node.op_type in _PASSED:
        name = node.input[0]
    return name


def _trace(
    name: str, constants: dict[str, TensorProto], producers: dict[str, onnx.NodeProto]
) -> tuple[TensorProto, int] | None:
    """The constant behind a value and whether it was transposed (1) on the way; None where there is none."""
    turned = 0
    while name not in constants:
        node = producers.get(name)
        if node is None:
            return None
        if node.op_type == "Constant":
            tensor = node.attribute[0].t
            tensor.name = tensor.name or name
            return tensor, turned
        if node.op_type == "Transpose":
            perm = [list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"]
            turned ^= 0 if perm and perm[0] == sorted(perm[0]) else 1
        elif node.op_type not in _PASSED:
            return None
        name = node.input[0]
    return constants[name], turned


def _bits(tensor: TensorProto, folder: Path) -> _Array | None:
    """The stored elements as unsigned integers, mapped where they are external; None for a type that is not known."""
    known = _BITS.get(tensor.data_type)
    if known is None:
        return None
    dtype, shape = np.dtype(known[0]), tuple(tensor.dims)
    if tensor.data_location != TensorProto.EXTERNAL:
        if tensor.raw_data:
            return np.frombuffer(tensor.raw_data, dtype=dtype).reshape(shape)
        return np.ascontiguousarray(onnx.numpy_helper.to_array(tensor)).view(dtype).reshape(shape)
    place = {entry.key: entry.value for entry in tensor.external_data}
    path, offset = folder / place["location"], int(place.get("offset", 0))
    if path.stat().st_size < offset + dtype.itemsize * int(np.prod(shape)):
        raise ValueError(f"{path.name} is too short for {tensor.name}")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def _stored(operand: _Operand, folder: Path) -> StoredWeight:
    tensor, axis = operand.tensor, operand.axis
    bits = _bits(tensor, folder)
    return StoredWeight(
        name=tensor.name.removesuffix(_SUFFIX),
        node=operand.node,
        dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name,
        reads=operand.reads,
        k=tensor.dims[axis],
        n_out=tensor.dims[1 - axis],
        bits=None if bits is None else bits.T if axis == 0 else bits.reshape(tensor.dims[0], -1),
        mask=_BITS[tensor.data_type][1] if bits is not None else 0,
    )


def _report(weight: StoredWeight, n: int, m: int) -> PatternReport:
    zeros, fewest = 0.0, 0
    if weight.bits is None:
        reason = f"its element type {weight.dtype} is not known here"
    else:
        zeros, fewest, where = _count(weight.bits, weight.mask, m)
        if weight.k % m:
            reason = f"its {weight.k} inputs are not divisible by {m}"
        elif fewest < n:
            reason = f"only {fewest} of {m} weights are zero at output {where[0]}, inputs from {where[1]}"
        else:
            reason = ""
    return PatternReport(
        name=weight.name,
        node=weight.node,
        k=weight.k,
        n_out=weight.n_out,
        holds=not reason,
        zeros=zeros,
        reason=reason,
        pattern=f"{n}:{m}",
        dtype=weight.dtype,
        reads=weight.reads,
    )


def _count(bits: _Array, mask: int, m: int) -> tuple[float, int, tuple[int, int]]:
    """Share of zeros; fewest zeros in m neighbours; where that is: (output, first input).

    The last k % m columns belong to no group.

    Args:
        bits: (n_out, k), in either memory order.
        mask: the bits that are zero for a zero.
        m: the pattern's.
    """
    n_out, k = bits.shape
    whole = k - k % m
    total, fewest, where = 0, m, (0, 0)
    rows = max(1, _CHUNK // max(1, k))
    for start in range(0, n_out, rows):
        zero = (bits[start : start + rows] & bits.dtype.type(mask)) == 0  # (rows, k)
        total += int(np.count_nonzero(zero))
        groups = sum((zero[:, i:whole:m].astype(np.uint16) for i in range(m)), np.uint16(0))  # (rows, k / m)
        if whole and int(groups.min()) < fewest:
            fewest = int(groups.min())
            row, group = np.unravel_index(int(groups.argmin()), groups.shape)
            where = (start + int(row), int(group) * m)
    return total / max(1, bits.size), fewest, where
