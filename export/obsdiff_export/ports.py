"""Inputs and outputs of a graph: what can be said of it without torch."""

from dataclasses import dataclass
from pathlib import Path

import onnx

from obsdiff_runtime.errors import ExportError


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output of a graph; `shape` names the axes that may change, `dtype` is ONNX's name ("float16")."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def read_ports(path: Path) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Inputs and outputs of a graph on disk; its weights are not read.

    Raises:
        ExportError: the file is absent, empty or no graph.
    """
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:
        raise ExportError(f"{path}: cannot be read as an ONNX graph: {error}") from error
    if not graph.output:
        raise ExportError(f"{path}: is no graph: it has no outputs; is the file whole?")
    weights = {tensor.name for tensor in graph.initializer}
    inputs = tuple(_port(value) for value in graph.input if value.name not in weights)
    return inputs, tuple(_port(value) for value in graph.output)


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    shape = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
    return Port(name=value.name, dtype=onnx.TensorProto.DataType.Name(tensor.elem_type).lower(), shape=shape)
