"""Which N:M patterns weights hold, whatever they were meant to hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from obsdiff_export.pattern import stored_weights
from obsdiff_runtime.progress import Progress, silent

WIDTHS: Final = (2, 4, 8, 16)
"""The M of the patterns that are looked for."""

_CHUNK: Final = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What one weight holds.

    Attributes:
        name: the weight's, as in the module.
        node: the MatMul, Gemm or Conv that reads it, "" where there is no graph.
        k, n_out: widths; the patterns run along k.
        dtype: of the stored weights, as numpy calls it.
        zeros: share of the weights that are zero; None for a type that is not known here.
        patterns: the N:M that hold, N the most zeros that every M have; none that another one
            implies, but 2:4 always.
    """

    name: str
    node: str
    k: int
    n_out: int
    dtype: str
    zeros: float | None
    patterns: tuple[str, ...]


def survey(model_path: Path, progress: Progress = silent) -> list[Survey]:
    """One entry for each constant weight of a product, in graph order.

    Raises:
        ExportError: the graph or its weights cannot be read.
    """
    total = sum(1 for _ in stored_weights(model_path))
    entries = []
    for index, weight in enumerate(stored_weights(model_path)):
        progress("weights", index, total, weight.name)
        zeros, patterns = (None, ()) if weight.bits is None else holding(weight.bits, weight.mask)
        entries.append(
            Survey(
                name=weight.name,
                node=weight.node,
                k=weight.k,
                n_out=weight.n_out,
                dtype=weight.dtype,
                zeros=zeros,
                patterns=patterns,
            )
        )
    progress("weights", total, total)
    return entries


def holding(bits: np.ndarray[Any, np.dtype[Any]], mask: int) -> tuple[float, tuple[str, ...]]:
    """Share of zeros, and the patterns that hold along the rows.

    Args:
        bits: (n_out, k), elements as unsigned integers, in either memory order.
        mask: the bits that are zero for a zero.
    """
    n_out, k = bits.shape
    widths = [m for m in WIDTHS if k and k % m == 0]
    fewest = {m: m for m in widths}
    total, rows = 0, max(1, _CHUNK // max(1, k))
    for start in range(0, n_out, rows):
        zero = (bits[start : start + rows] & bits.dtype.type(mask)) == 0  # (rows, k)
        total += int(np.count_nonzero(zero))
        groups = zero.astype(np.uint8)
        for m in widths:
            groups = groups[:, 0::2] + groups[:, 1::2]  # (rows, k / m): zeros in every m
            fewest[m] = min(fewest[m], int(groups.min()))
    return total / max(1, bits.size), _told(fewest if n_out else {})


def _told(fewest: dict[int, int]) -> tuple[str, ...]:
    """The patterns worth telling: those that no other implies, and 2:4, which kernels exist for."""
    if fewest and all(n == m for m, n in fewest.items()):
        return ("all zero",)
    told: list[tuple[int, int]] = []
    for m, n in fewest.items():
        implied = any(n * smaller <= known * m for known, smaller in told)
        if n and (not implied or (n, m) == (2, 4)):
            told.append((n, m))
    return tuple(f"{n}:{m}" for n, m in told)
