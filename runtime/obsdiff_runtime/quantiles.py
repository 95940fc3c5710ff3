"""Quantiles and how sure they are, from order statistics: no distribution is assumed.

Of n independent values, the number that lies below the quantile q is binomial with n and q, however the values are
distributed. So the a-th and the b-th smallest enclose the quantile with the probability that this number is at least a
and less than b (David and Nagaraja 2003, Order Statistics, section 7.1).

Runs of one round are not independent: a round in which the machine was busy is slow throughout. So the interval counts
rounds, not runs, as if the runs of a round were all the same; where they differ it is wider than it had to be.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

CONFIDENCE: Final = 0.95

_ROUNDING: Final = 1e-12


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Where a quantile lies with 95 % confidence; an end is None where too few rounds were run to say."""

    low: float | None
    high: float | None


def interval(values: Sequence[float], share: float, *, rounds: int | None = None) -> Interval:
    """Of the quantile below which `share` of the values lie.

    Args:
        values: as many from each round.
        share: 0.5 for the median.
        rounds: in which they were measured; one each if None.

    Raises:
        ValueError: the rounds do not divide the values.
    """
    rounds = len(values) if rounds is None else rounds
    if rounds < 1 or len(values) % rounds:
        raise ValueError(f"{len(values)} values are not as many from each of {rounds} rounds")
    each, ordered = len(values) // rounds, sorted(values)
    low, high = _ranks(rounds, share)
    return Interval(
        low=None if low is None else ordered[low * each],
        high=None if high is None else ordered[(high + 1) * each - 1],
    )


def rounds_needed(share: float) -> int:
    """Fewest rounds from which the interval of this quantile has both ends."""
    tail = (1 - CONFIDENCE) / 2
    return math.ceil(math.log(tail) / math.log(max(share, 1 - share)) - _ROUNDING)


@functools.cache
def _ranks(count: int, share: float) -> tuple[int | None, int | None]:
    """Indices of the ends among the sorted values; each is on the wrong side with a probability of at most 2.5 %."""
    tail = (1 - CONFIDENCE) / 2 + _ROUNDING
    low = high = None
    below = 0.0
    for index in range(count):
        below += _binomial(count, index, share)  # the quantile is below value number `index`, from 0
        if below > tail:
            break
        low = index
    above = 0.0
    for index in reversed(range(count)):
        above += _binomial(count, index + 1, share)
        if above > tail:
            break
        high = index
    return low, high


def _binomial(count: int, hits: int, share: float) -> float:
    choose = math.lgamma(count + 1) - math.lgamma(hits + 1) - math.lgamma(count - hits + 1)
    return math.exp(choose + hits * math.log(share) + (count - hits) * math.log1p(-share))
