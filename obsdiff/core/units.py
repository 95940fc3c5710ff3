"""Choosing and removing whole units: FFN neurons, and heads that one or two streams share.

    W       weight of a consumer, (out, in), in = units * width
    H       its damped gram, (in, in)
    unit    unit u holds the columns u * width .. (u + 1) * width - 1, in each stream

Two streams (the image's and the text's output projection of a joint attention) lose the same units. Each ranks its
units by its own loss, and the ranks are fused: sum over streams of 1 / (60 + rank), the highest goes first (Cormack et
al. 2009; arXiv 2510.06751, section 3). Of one stream this is its own order.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from obsdiff.core.linalg import Factor
from obsdiff.core.refit import refit
from obsdiff_runtime.errors import CalibrationError

FUSION: Final = 60
"""The constant of reciprocal rank fusion."""


def remove(
    weights: Sequence[Tensor], factors: Sequence[Factor], *, width: int, number: int
) -> tuple[Tensor, list[Tensor]]:
    """Removes the units whose loss is least, compensates, and looks again, until `number` are gone.

    The loss of a unit is sum_k |W_k|^2 / L_kk^2 with L L^T the unit's block of H^-1: that of the paper's code. Heads
    go one at a time, neurons in the batches of `batches`. At the end the kept columns are refitted to the original
    weights, which is where the updates lead without their rounding.

    Args:
        weights: per stream (out, in), any float dtype; `out` may differ.
        factors: per stream the factorised gram of its input.
        width: columns per unit.
        number: how many units go, fewer than there are.

    Returns:
        the kept units, (kept,), int64, sorted; per stream (out, in), float64, zero in the removed columns.

    Raises:
        CalibrationError: a gram is not positive definite.
    """
    streams = [_Stream(weight, factor, width) for weight, factor in zip(weights, factors, strict=True)]
    live = torch.ones(streams[0].weight.shape[1] // width, dtype=torch.bool, device=streams[0].weight.device)
    for size in batches(number, width):
        gone = lowest([stream.losses().masked_fill(~live, torch.inf) for stream in streams], size)
        live[gone] = False
        for stream in streams:
            stream.drop(columns_of(gone, width))

    kept = live.nonzero().flatten()
    columns = columns_of(kept, width)
    results = []
    for weight, factor in zip(weights, factors, strict=True):
        original = weight.double().masked_fill(factor.dead, 0)
        result = torch.zeros_like(original)
        result[:, columns] = refit(original, factor.gram, columns)
        results.append(result)
    return kept, results


def lowest(losses: Sequence[Tensor], number: int) -> Tensor:
    """The units that cost least, over one or more streams.

    Args:
        losses: per stream (units,).
        number: how many units.

    Returns:
        (number,), int64, sorted; of equal ones the first.
    """
    fused = torch.zeros_like(losses[0], dtype=torch.float64)
    for loss in losses:
        order = torch.sort(loss, stable=True).indices
        rank = torch.empty_like(order)
        rank[order] = torch.arange(1, len(order) + 1, device=order.device)
        fused += 1.0 / (FUSION + rank)
    return torch.sort(fused, descending=True, stable=True).indices[:number].sort().values


def columns_of(units: Tensor, width: int) -> Tensor:
    """The columns of units, (len(units) * width,), int64, in the order of the units."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def batches(number: int, width: int) -> Iterator[int]:
    """How many units go at each step.

    Heads (width > 1): one. Neurons: b_0 = (number - 512) // 2, then b <- (b - 512) // 2; a step takes
    min(left, max(b, 64), 1024), as the paper's code does.
    """
    if width > 1:
        yield from (1 for _ in range(number))
        return
    left, size = number, (number - 512) // 2
    while left > 0:
        step = min(left, max(size, 64), 1024)
        yield step
        left, size = left - step, (size - 512) // 2


class _Stream:
    """A consumer's weight and inverse gram while its units go."""

    def __init__(self, weight: Tensor, factor: Factor, width: int) -> None:
        self.weight = weight.double().masked_fill(factor.dead, 0)
        self._inverse = factor.inverse()
        self._width = width

    def losses(self) -> Tensor:
        """The loss of each unit, (units,); meaningless for those that are gone."""
        width = self._width
        units = len(self._inverse) // width
        blocks = self._inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        lower, failed = torch.linalg.cholesky_ex(blocks)  # (units, width, width)
        if bool(failed.any()):
            raise CalibrationError("the inverse gram lost its definiteness while units were removed; raise --damp")
        energy = self.weight.square().sum(dim=0).view(units, width)
        losses: Tensor = (energy / lower.diagonal(dim1=1, dim2=2).square()).sum(dim=1)
        return losses

    def drop(self, columns: Tensor) -> None:
        """Removes columns: the OBS update of the weight, the Schur complement of the inverse.

        Removed rows and columns of the inverse become those of the identity, so that sizes stay.
        """
        rows = self._inverse[columns]  # (c, in)
        update = torch.linalg.solve(rows[:, columns], rows)  # (c, in)
        self.weight -= self.weight[:, columns] @ update
        self.weight[:, columns] = 0
        self._inverse -= rows.mT @ update
        self._inverse[columns] = 0
        self._inverse[:, columns] = 0
        self._inverse[columns, columns] = 1
