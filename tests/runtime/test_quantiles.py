"""Intervals of quantiles against simulations of what they promise, and against exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest

from obsdiff_runtime.quantiles import Interval, interval, rounds_needed

RUNS = 4000


def misses(share: float, draws: np.ndarray, truth: float, rounds: int) -> tuple[float, float]:
    """How often the truth lies below the low end, and above the high one; draws: (RUNS, values)."""
    below = above = 0
    for values in draws:
        found = interval(list(values), share, rounds=rounds)
        below += found.low is not None and truth < found.low
        above += found.high is not None and truth > found.high
    return below / len(draws), above / len(draws)


@pytest.mark.parametrize(("share", "count"), [(0.5, 10), (0.5, 101), (0.9, 60), (0.99, 400)])
def test_each_end_is_wrong_in_at_most_a_fortieth_of_simulated_benchmarks(share: float, count: int) -> None:
    random = np.random.default_rng(0)
    draws = np.exp(random.standard_normal((RUNS, count)))  # log-normal: as skewed as latencies are
    truth = float(np.quantile(np.exp(random.standard_normal(4_000_000)), share))
    # Of 4000 benchmarks each miss has a standard error of 0.0025: 0.035 is four of them above 0.025.
    assert max(misses(share, draws, truth, rounds=count)) < 0.035


def test_runs_of_a_round_that_are_alike_do_not_make_the_interval_narrower() -> None:
    random = np.random.default_rng(1)
    rounds, runs = 40, 25
    slow = np.repeat(random.standard_normal((RUNS, rounds)), runs, axis=1)  # one shift for each round
    draws = slow + 0.3 * random.standard_normal(slow.shape)
    counted = misses(0.5, draws, truth=0.0, rounds=rounds)
    pooled = misses(0.5, draws, truth=0.0, rounds=rounds * runs)
    assert sum(counted) < 0.06
    assert sum(pooled) > 0.3  # what counting runs as if they were independent would do


def test_repeated_values_say_no_more_than_one_of_each() -> None:
    values = [float(value) for value in np.random.default_rng(2).permutation(41)]
    assert interval(np.repeat(values, 7).tolist(), 0.5, rounds=41) == interval(values, 0.5)


def test_the_ends_are_those_of_the_exact_binomial() -> None:
    for count, share in ((6, Fraction(1, 2)), (37, Fraction(9, 10)), (400, Fraction(99, 100))):
        mass = [math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(count + 1)]
        low = max(a for a in range(count) if sum(mass[: a + 1]) <= Fraction(1, 40))
        high = min(b for b in range(count) if sum(mass[b + 1 :]) <= Fraction(1, 40))
        assert interval(list(range(count)), float(share)) == Interval(low=low, high=high)


@pytest.mark.parametrize(("share", "needed"), [(0.5, 6), (0.9, 36), (0.95, 72), (0.99, 368)])
def test_too_few_rounds_leave_an_end_open_and_enough_do_not(share: float, needed: int) -> None:
    assert rounds_needed(share) == needed
    assert interval(list(range(needed - 1)), share).high is None
    assert None not in (interval(list(range(needed)), share).low, interval(list(range(needed)), share).high)


def test_a_slow_tail_still_has_a_floor_where_its_ceiling_is_unknown() -> None:
    assert interval([3.0, 1.0, 2.0], 0.99) == Interval(low=2.0, high=None)


def test_rounds_that_do_not_divide_the_values_are_a_bug() -> None:
    for values, rounds in (([1.0] * 10, 4), ([], 0)):
        with pytest.raises(ValueError, match="not as many from each"):
            interval(values, 0.5, rounds=rounds)
