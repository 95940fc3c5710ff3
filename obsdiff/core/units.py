"""Choosing and removing whole units: FFN neurons, and heads that one or two streams share.

    W       weight of a consumer, (out, in)
    H       its damped gram, (in, in)
    unit    unit u of a group that begins at column s holds the columns s + u * width .. s + (u + 1) * width - 1

Two streams (the image's and the text's output projection of a joint attention) lose the same units. Each ranks its
units by its own loss, and the ranks are fused: sum over streams of 1 / (60 + rank), the highest goes first (Cormack et
al. 2009; arXiv 2510.06751, section 3). Of one stream this is its own order.

A consumer may read several groups side by side, as the last projection of a block whose attention and feed-forward run
in parallel reads [heads | neurons]. Then the groups take turns, so that each choice knows what has gone from the other,
and what stays of both is fitted together, with one gram.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor

from obsdiff.core.linalg import Factor
from obsdiff.core.refit import refit
from obsdiff_runtime.errors import CalibrationError

FUSION: Final = 60
"""The constant of reciprocal rank fusion."""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """The units of one group, of which some go.

    Attributes:
        units: how many there are.
        width: columns of each in every stream that reads them.
        number: how many go, fewer than there are.
        starts: per stream its first column of theirs; None where it reads none of them.
    """

    units: int
    width: int
    number: int
    starts: tuple[int | None, ...]

    def columns(self, units: Tensor, stream: int) -> Tensor:
        """The columns of these units in a stream, (len(units) * width,), int64; none where it reads none of them."""
        start = self.starts[stream]
        return units.new_empty(0) if start is None else columns_of(units, self.width, start)


def remove(
    weights: Sequence[Tensor], factors: Sequence[Factor], removals: Sequence[Removal]
) -> tuple[list[Tensor], list[Tensor]]:
    """Removes the units whose loss is least, compensates, and looks again, until as many are gone as shall go.

    The loss of a unit is sum_k |W_k|^2 / L_kk^2 with L L^T the unit's block of H^-1: that of the paper's code. Heads
    go one at a time, neurons in the batches of `batches`. At the end the kept columns are refitted to the original
    weights, which is where the updates lead without their rounding.

    Args:
        weights: per stream (out, in), any float dtype; `out` and `in` may differ.
        factors: per stream the factorised gram of its input.
        removals: one or more groups; columns that belong to none of them stay.

    Returns:
        per group the kept units, (kept,), int64, sorted; per stream (out, in), float64, zero in the removed columns.

    Raises:
        CalibrationError: a gram is not positive definite.
    """
    streams = [_Stream(weight, factor) for weight, factor in zip(weights, factors, strict=True)]
    device = streams[0].weight.device
    live = [torch.ones(removal.units, dtype=torch.bool, device=device) for removal in removals]
    for index, size in turns(removals):
        removal = removals[index]
        losses = [stream.losses(removal, start) for stream, start in _readers(streams, removal)]
        gone = lowest([loss.masked_fill(~live[index], torch.inf) for loss in losses], size)
        live[index][gone] = False
        for stream, start in _readers(streams, removal):
            stream.drop(columns_of(gone, removal.width, start))

    results = []
    for place, (weight, factor) in enumerate(zip(weights, factors, strict=True)):
        columns = left(live, removals, place, weight.shape[1]).nonzero().flatten()
        original = weight.double().masked_fill(factor.dead, 0)
        result = torch.zeros_like(original)
        result[:, columns] = refit(original, factor.gram, columns)
        results.append(result)
    return [each.nonzero().flatten() for each in live], results


def left(live: Sequence[Tensor], removals: Sequence[Removal], stream: int, width: int) -> Tensor:
    """Which columns of a stream stay, (width,), bool.

    Args:
        live: per group which units stay, (units,), bool.
        removals: the groups.
        stream: which.
        width: columns of the stream.
    """
    keep = torch.ones(width, dtype=torch.bool, device=live[0].device)
    for units, removal in zip(live, removals, strict=True):
        keep[removal.columns((~units).nonzero().flatten(), stream)] = False
    return keep


def turns(removals: Sequence[Removal]) -> list[tuple[int, int]]:
    """In which order the groups lose how many units: (index of the group, units), so that all get on at one pace."""
    steps: list[tuple[float, int, int]] = []  # share that is gone afterwards, group, units
    for index, removal in enumerate(removals):
        sizes = list(batches(removal.number, removal.width))
        gone = accumulate(sizes)
        steps += [(done / removal.number, index, size) for done, size in zip(gone, sizes, strict=True)]
    return [(index, size) for _, index, size in sorted(steps)]


def _readers(streams: "Sequence[_Stream]", removal: Removal) -> "list[tuple[_Stream, int]]":
    return [(stream, start) for stream, start in zip(streams, removal.starts, strict=True) if start is not None]


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


def columns_of(units: Tensor, width: int, start: int = 0) -> Tensor:
    """The columns of units, (len(units) * width,), int64, in the order of the units; the first unit's from `start`."""
    return (start + units[:, None] * width + torch.arange(width, device=units.device)).flatten()


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

    def __init__(self, weight: Tensor, factor: Factor) -> None:
        self.weight = weight.double().masked_fill(factor.dead, 0)
        self._inverse = factor.inverse()

    def losses(self, removal: Removal, start: int) -> Tensor:
        """The loss of each unit of a group that begins at column `start`, (units,); meaningless for those that are
        gone."""
        units, width = removal.units, removal.width
        own = slice(start, start + units * width)
        square = self._inverse[own, own].reshape(units, width, units, width)
        blocks = square.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        lower, failed = torch.linalg.cholesky_ex(blocks)  # (units, width, width)
        if bool(failed.any()):
            raise CalibrationError("the inverse gram lost its definiteness while units were removed; raise --damp")
        energy = self.weight[:, own].square().sum(dim=0).view(units, width)
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
