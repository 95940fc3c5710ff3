"""Weights forced into an N:M pattern without calibration, in a graph: good for timing, of no use for pictures.

k        the axis along which every m consecutive weights lose the n smallest
bits     stored elements as unsigned integers: without the sign they order like the magnitudes, in float32, float16
         and bfloat16 alike, so that no format is converted
"""

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from obsdiff_export.linears import TRANSPOSED, WEIGHT, Shape, Weight, weights_in
from obsdiff_runtime.errors import ConfigError, ExportError

_Array = np.ndarray[Any, np.dtype[Any]]

_FLOATS: Final[dict[int, tuple[type[np.unsignedinteger[Any]], int]]] = {
    TensorProto.FLOAT: (np.uint32, 0x7FFFFFFF),
    TensorProto.FLOAT16: (np.uint16, 0x7FFF),
    TensorProto.BFLOAT16: (np.uint16, 0x7FFF),
}
"""Element type -> its bits, and those that are its magnitude."""

_TYPES: Final = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_CHUNK: Final = 1 << 22
_OPSETS: Final = {"float32": 20, "float16": 20, "bfloat16": 22}
_IR_VERSION: Final = 10


def force(model: Path, folder: Path, n: int, m: int, *, linears: Collection[str] | None = None) -> tuple[str, ...]:
    """Copies a graph and sets the n smallest of every m weights along k to zero.

    Args:
        model: the graph; its data lies beside it.
        folder: the copy is written here under the same names; made where it is absent.
        n: this many go,
        m: of this many neighbours along k.
        linears: whose weights; None: those of every linear in the graph.

    Returns:
        the linears that hold the pattern now; those whose k is no multiple of m are left as they are.

    Raises:
        ConfigError: n:m is no pattern, or `folder` is the model's own.
        ExportError: the graph cannot be read, has no such linear, or weights of a type that is not known here.
    """
    if not 0 < n < m:
        raise ConfigError(f"{n}:{m} is no pattern: N of every M are zero, and N is 1 to M-1")
    if folder.resolve() == model.parent.resolve():
        raise ConfigError(f"{folder}: forcing a pattern would overwrite the graph; choose another folder")
    try:
        graph = onnx.load(str(model), load_external_data=False)
    except Exception as error:
        raise ExportError(f"{model}: cannot be read as an ONNX graph: {error}") from error
    found = weights_in(graph.graph.initializer)
    absent = [name for name in linears or () if name not in found]
    if absent:
        raise ExportError(
            f"{model}: has no weight of {absent[0]}" + (f" and {len(absent) - 1} more" * (len(absent) > 1))
        )
    forced = tuple(name for name in (found if linears is None else linears) if found[name].k % m == 0)
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    _copy_data(tensors.values(), model.parent, folder)
    for name in forced:
        _force_tensor(tensors[found[name].initializer], found[name], folder, n, m)
    onnx.save(graph, str(folder / model.name))
    return forced


def write_linear(
    folder: Path, shape: Shape, dtype: str, *, pattern: tuple[int, int] | None = None, seed: int = 0
) -> Path:
    """A graph of one product x (m, k) -> y (m, n) with random weights.

    Args:
        folder: made where it is absent.
        shape: of it, fixed.
        dtype: "float32", "float16" or "bfloat16".
        pattern: (n, m) that the weights hold; None: dense.
        seed: of the weights.

    Raises:
        ConfigError: another dtype, or k is no multiple of the pattern's m.
    """
    if dtype not in _TYPES:
        raise ConfigError(f"a linear in {dtype} cannot be written; known are {', '.join(_TYPES)}")
    if pattern is not None and shape.k % pattern[1]:
        raise ConfigError(f"{shape.k} inputs are no multiple of {pattern[1]}")
    kind = _TYPES[dtype]
    name = f"linear{WEIGHT}{TRANSPOSED}"
    weight = np.random.default_rng(seed).standard_normal((shape.n, shape.k), dtype=np.float32) / np.sqrt(shape.k)
    bits = _as_bits(weight.astype(np.float32), dtype)
    if pattern is not None:
        zero_smallest(bits, _FLOATS[kind][1], *pattern)
    stored = helper.make_tensor(name, kind, (shape.k, shape.n), np.ascontiguousarray(bits.T).tobytes(), raw=True)
    x = helper.make_tensor_value_info("x", kind, (shape.m, shape.k))
    y = helper.make_tensor_value_info("y", kind, (shape.m, shape.n))
    node = helper.make_node("MatMul", ["x", name], ["y"], name="linear")
    graph = helper.make_graph([node], "linear", [x], [y], [stored])
    opset = helper.make_opsetid("", _OPSETS[dtype])
    model = helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx.data").unlink(missing_ok=True)  # onnx would append to it
    onnx.save(
        model, str(folder / "model.onnx"), save_as_external_data=True, location="model.onnx.data", size_threshold=1024
    )
    return folder / "model.onnx"


def zero_smallest(bits: _Array, magnitude: int, n: int, m: int) -> None:
    """Sets the n smallest of every m neighbours in each row to zero, in place; of equal ones the first.

    Args:
        bits: (n_out, k), unsigned; k a multiple of m; in either memory order.
        magnitude: the bits that are not the sign.
        n: this many go,
        m: of this many neighbours.
    """
    n_out, k = bits.shape
    rows = max(1, _CHUNK // k)
    for start in range(0, n_out, rows):
        block = np.ascontiguousarray(bits[start : start + rows]).reshape(-1, k // m, m)  # (rows, k / m, m)
        order = np.argsort(block & block.dtype.type(magnitude), axis=-1, kind="stable")
        np.put_along_axis(block, order[..., :n], 0, axis=-1)
        bits[start : start + rows] = block.reshape(-1, k)


def _as_bits(weight: _Array, dtype: str) -> _Array:
    """(n, k) float32 -> the elements of that type as bits; to bfloat16 by rounding to nearest, halves to even."""
    if dtype != "bfloat16":
        narrow: _Array = weight.astype(dtype)
        return narrow.view(_FLOATS[_TYPES[dtype]][0])
    wide = weight.view(np.uint32)
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


def _copy_data(tensors: Collection[TensorProto], source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    places = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    for place in sorted(places):
        if Path(place).name != place or not (source / place).is_file():
            raise ExportError(f"{source / place}: the graph's weights are not there; export it again")
        shutil.copyfile(source / place, folder / place)


def _force_tensor(tensor: TensorProto, weight: Weight, folder: Path, n: int, m: int) -> None:
    known = _FLOATS.get(tensor.data_type)
    if known is None:
        kind = TensorProto.DataType.Name(tensor.data_type)
        raise ExportError(f"{tensor.name}: weights in {kind} cannot be forced; known are {', '.join(_TYPES)}")
    dtype, magnitude = np.dtype(known[0]), known[1]
    shape = tuple(tensor.dims)
    flat = shape[:2]
    if tensor.data_location == TensorProto.EXTERNAL:
        place = {entry.key: entry.value for entry in tensor.external_data}
        path, offset = folder / place["location"], int(place.get("offset", 0))
        if path.stat().st_size < offset + dtype.itemsize * int(np.prod(shape)):
            raise ExportError(f"{path}: is too short for {tensor.name}; export it again")
        stored: _Array = np.memmap(path, dtype=dtype, mode="r+", offset=offset, shape=flat)
        zero_smallest(stored.T if weight.axis == 0 else stored, magnitude, n, m)
        return
    if not tensor.raw_data:
        array = np.ascontiguousarray(onnx.numpy_helper.to_array(tensor)).view(dtype)
        tensor.CopyFrom(helper.make_tensor(tensor.name, tensor.data_type, shape, array.tobytes(), raw=True))
    inline = np.frombuffer(tensor.raw_data, dtype=dtype).reshape(flat).copy()
    zero_smallest(inline.T if weight.axis == 0 else inline, magnitude, n, m)
    tensor.raw_data = inline.tobytes()
