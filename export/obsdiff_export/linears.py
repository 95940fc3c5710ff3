"""Linears as matrix products: which shapes a network runs, and how often.

    m    tokens: rows of the activation, over all images of a call
    k    inputs, the axis that is summed over
    n    outputs

Weights are found by the names that `onnx.export` gives them: `<linear>.weight`, laid out (n, k), and
`<linear>.weight::T`, laid out (k, n); of a convolution of one pixel (n, k, 1, 1).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx

from obsdiff_runtime.errors import ExportError

WEIGHT: Final = ".weight"
TRANSPOSED: Final = "::T"


@dataclass(frozen=True, order=True)
class Shape:
    """A product (m, k) x (k, n)."""

    m: int
    k: int
    n: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.m * self.k * self.n

    def __str__(self) -> str:
        return f"{self.m} x {self.k} x {self.n}"


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A linear's weight in a graph: its widths, and the axis of the stored tensor that is summed over."""

    initializer: str
    k: int
    n: int
    axis: int


def grouped(shapes: Mapping[str, Shape]) -> dict[Shape, tuple[str, ...]]:
    """The linears of each distinct shape, the shapes that cost most together first.

    Args:
        shapes: linear -> what it runs.
    """
    found: dict[Shape, list[str]] = {}
    for name, shape in shapes.items():
        found.setdefault(shape, []).append(name)
    order = sorted(found, key=lambda shape: (-shape.macs * len(found[shape]), shape))
    return {shape: tuple(found[shape]) for shape in order}


def weights_of(path: Path) -> dict[str, Weight]:
    """Linear -> its weight, of every matrix in a graph that bears a linear's name; the weights are not read.

    Weights of one pixel count as matrices.

    Raises:
        ExportError: the file is absent or no graph.
    """
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:
        raise ExportError(f"{path}: cannot be read as an ONNX graph: {error}") from error
    return weights_in(graph.initializer)


def weights_in(initializers: Iterable[onnx.TensorProto]) -> dict[str, Weight]:
    """`weights_of` initializers."""
    found = {}
    for tensor in initializers:
        turned = tensor.name.endswith(TRANSPOSED)
        name = tensor.name.removesuffix(TRANSPOSED)
        if len(tensor.dims) < 2 or any(side != 1 for side in tensor.dims[2:]) or not name.endswith(WEIGHT):
            continue
        axis = 0 if turned else 1
        found[name.removesuffix(WEIGHT)] = Weight(
            initializer=tensor.name, k=tensor.dims[axis], n=tensor.dims[1 - axis], axis=axis
        )
    return found
