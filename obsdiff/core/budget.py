"""Which option to take of each item, so that together they save enough at least error: a multiple-choice knapsack.

item     something of which exactly one option is taken (a group of units; a set of linears)
option   a saving (multiply-accumulates, or time in units of `whole`), and the error that it costs
cell     one step of the axis of savings on which the dynamic programme runs
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import torch

CELLS: Final = 8192
"""Steps of the axis of savings, at most."""

ROUNDING: Final = 1e-9
"""Of the largest saving: a remainder below this is rounding."""

MOST_PARTS: Final = 5e4
"""Of the largest saving: a common divisor smaller than one of so many parts is not believed in. Euclid's steps lose as
many times float64's 1e-16, so that the largest saving's number of parts is known to its cube times that: 0.01."""

FINEST: Final = 2.0**-40
"""Of the largest saving: the unit of savings that have no common divisor."""

FAINTEST: Final = 1e-12
"""Errors below this count as this: the logarithm needs one, and float32 sees none smaller."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to treat an item.

    Attributes:
        saving: whole units of cost, at least 0.
        error: what it costs in quality; finite.
    """

    saving: int
    error: float


def most(items: Sequence[Sequence[Option]]) -> int:
    """The largest saving that there is."""
    return sum(max(option.saving for option in options) for options in items)


def whole(savings: Sequence[float]) -> list[int]:
    """Real savings as whole numbers, in a unit that all share.

    Where there is a common divisor, as in a table by which time goes like multiply-accumulates, they count in it, so
    that `choose` sees what it would see of those. Else they count in FINEST of the largest, rounded down.

    Args:
        savings: finite; what is below 0 saves nothing.
    """
    values = [max(saving, 0.0) for saving in savings]
    largest = max(values, default=0.0)
    if largest * FINEST == 0:  # nothing, or less than any unit could count
        return [0] * len(values)
    divisor = 0.0
    for index, value in enumerate(values):
        divisor = _common_divisor(value, divisor, largest * ROUNDING)
        if divisor:  # what Euclid's steps rounded is taken out again, so that it does not add up
            divisor = (top := max(values[: index + 1])) / max(round(top / divisor), 1)
    if divisor > largest / MOST_PARTS and all(abs(math.remainder(value, divisor)) < divisor / 1e3 for value in values):
        return [round(value / divisor) for value in values]
    return [math.floor(value / (largest * FINEST)) for value in values]


def _common_divisor(a: float, b: float, zero: float) -> float:
    """Euclid's, with remainders to the nearest multiple; what is below `zero` counts as none."""
    while b > zero:
        a, b = b, abs(math.remainder(a, b))
    return a


def choose(items: Sequence[Sequence[Option]], budget: int, *, cells: int = CELLS) -> list[int]:
    """The choice of least total error among those that save at least `budget`.

    f_i(j), the least error with which items i and later save j, is min over options of error + f_{i+1}(max(j - saving,
    0)). Errors may fall or rise with the saving, convex or not. The axis counts in the savings' greatest common divisor
    where the budget then fits into `cells`: the result is the best one. Otherwise it counts in the least multiple of
    the divisor with which it fits, and every saving is rounded down to it: the budget is still met, and the error is at
    most that of the best choice which saves len(items) * budget / cells more. Savings and budget of another unit give
    the same choice.

    Args:
        items: the options of each, at least one.
        budget: in the savings' unit; 0 or less asks for nothing.
        cells: steps of the axis, at most.

    Returns:
        per item the index of its option; of equally good ones the first.

    Raises:
        ValueError: the budget is more than `most` of these items.
    """
    if budget > most(items):
        raise ValueError(f"a saving of {budget} was asked for, and at most {most(items)} is possible")
    unit = math.gcd(*(option.saving for options in items for option in options)) or 1
    needed = max(-(-budget // unit), 0)
    if needed > cells:
        unit *= -(-needed // cells)
        needed = -(-budget // unit)
    savings = [[option.saving // unit for option in options] for options in items]
    if sum(map(max, savings)) < needed:  # only rounding stands between this and the budget
        return [max(range(len(options)), key=lambda index: options[index].saving) for options in items]
    return _walk(_table(items, savings, needed), savings, needed)


def _table(items: Sequence[Sequence[Option]], savings: Sequence[Sequence[int]], needed: int) -> list[torch.Tensor]:
    """Per item the best option at every saving that is still needed, (needed + 1,), int64."""
    axis = torch.arange(needed + 1)
    least = torch.full((needed + 1,), torch.inf, dtype=torch.float64)
    least[0] = 0
    table: list[torch.Tensor] = []
    for options, cells in zip(reversed(items), reversed(savings), strict=True):
        best, taken = torch.full_like(least, torch.inf), torch.zeros_like(axis)
        for index, (option, saving) in enumerate(zip(options, cells, strict=True)):
            error = least[(axis - saving).clamp_min(0)] + option.error
            better = error < best
            best, taken = torch.where(better, error, best), torch.where(better, index, taken)
        least = best
        table.append(taken)
    return table[::-1]


def _walk(table: Sequence[torch.Tensor], savings: Sequence[Sequence[int]], needed: int) -> list[int]:
    chosen = []
    for taken, cells in zip(table, savings, strict=True):
        chosen.append(int(taken[needed]))
        needed = max(needed - cells[chosen[-1]], 0)
    return chosen


def interpolate(measured: Mapping[float, float], share: float) -> float:
    """The error at a share that was not measured.

    A straight line in log error over log(share / (1 - share)) between its two nearest measured neighbours, and on
    beyond the outermost: on this axis the measured curves of feed-forwards are straight within a fifth from 1/8 to 7/8.

    Args:
        measured: share in (0, 1) -> error, at least one.
        share: in [0, 1).

    Returns:
        0 at share 0; at a measured share what was measured, or more where less was removed at a higher error: an error
        never falls with the share.
    """
    if share == 0:
        return 0.0
    shares = sorted(measured)
    errors = list(accumulate((max(measured[place], FAINTEST) for place in shares), max))
    if share in measured or len(shares) == 1:
        return errors[shares.index(share)] if share in measured else errors[0]
    right = min(max(bisect.bisect(shares, share), 1), len(shares) - 1)
    low, high = _logit(shares[right - 1]), _logit(shares[right])
    part = (_logit(share) - low) / (high - low)
    return math.exp(math.log(errors[right - 1]) * (1 - part) + math.log(errors[right]) * part)


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
