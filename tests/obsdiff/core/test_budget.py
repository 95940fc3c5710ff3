"""The knapsack against brute force, and what it does at the edges."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obsdiff.core.budget import Option, choose, interpolate, most

OPTIONS = st.builds(Option, saving=st.integers(0, 40), error=st.integers(0, 1000).map(lambda value: value / 8))
ITEMS = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), min_size=1, max_size=5)
"""Errors are eighths, so that sums are exact in any order."""


def total(items: list[list[Option]], chosen: list[int]) -> tuple[int, float]:
    taken = [options[index] for options, index in zip(items, chosen, strict=True)]
    return sum(option.saving for option in taken), sum(option.error for option in taken)


def brute(items: list[list[Option]], budget: int) -> float:
    choices = (total(items, list(chosen)) for chosen in product(*(range(len(options)) for options in items)))
    return min((error for saving, error in choices if saving >= budget), default=float("inf"))


@settings(deadline=None)
@given(ITEMS, st.data())
def test_the_choice_is_brute_forces_wherever_the_axis_is_exact(items: list[list[Option]], data: st.DataObject) -> None:
    budget = data.draw(st.integers(-3, most(items)))
    saving, error = total(items, choose(items, budget))
    assert saving >= budget
    assert error == brute(items, budget)


@settings(deadline=None)
@given(ITEMS, st.data())
def test_a_coarse_axis_still_meets_the_budget_and_is_off_by_its_steps_alone(
    items: list[list[Option]], data: st.DataObject
) -> None:
    budget, cells = data.draw(st.integers(1, max(most(items), 1))), 7
    if budget > most(items):
        return
    saving, error = total(items, choose(items, budget, cells=cells))
    assert saving >= budget
    assert error <= brute(items, budget + len(items) * -(-budget // cells))


def test_a_large_unit_of_cost_costs_no_precision() -> None:
    items = [[Option(saving=0, error=0), Option(saving=10**12, error=3)] for _ in range(20)]
    items[7][1] = Option(saving=10**12, error=1)
    chosen = choose(items, 10**12)
    assert [index for index, option in enumerate(chosen) if option] == [7]


def test_a_cheap_pair_beats_the_one_that_is_best_by_ratio() -> None:
    nothing = Option(saving=0, error=0)
    items = [
        [nothing, Option(saving=60, error=6)],
        [nothing, Option(saving=50, error=5.5)],
        [nothing, Option(saving=50, error=5.5)],
    ]
    assert choose(items, 100) == [0, 1, 1]


def test_more_than_everything_is_refused_with_what_there_is() -> None:
    items = [[Option(saving=0, error=0), Option(saving=5, error=1)]] * 2
    assert choose(items, 10) == [1, 1]
    with pytest.raises(ValueError, match="at most 10 is possible"):
        choose(items, 11)


def test_nothing_asked_for_takes_the_least_error_of_each_item() -> None:
    items = [[Option(saving=3, error=2), Option(saving=0, error=1)], [Option(saving=1, error=-1.0)]]
    assert choose(items, 0) == [1, 0]


SHARES = st.dictionaries(st.integers(1, 15).map(lambda part: part / 16), st.floats(0, 10), min_size=1, max_size=4)


@given(SHARES, st.lists(st.floats(0, 0.99), min_size=2, max_size=2))
def test_an_interpolated_error_never_falls_with_the_share(measured: dict[float, float], two: list[float]) -> None:
    low, high = (interpolate(measured, share) for share in sorted(two))
    assert low <= high * (1 + 1e-9)


def test_measured_points_are_met_and_what_is_straight_on_the_axis_is_found() -> None:
    curve = {share: 1e-3 * (share / (1 - share)) ** 1.3 for share in (0.125, 0.375, 0.5, 0.875)}
    known = {share: curve[share] for share in (0.375, 0.875)}
    assert interpolate(known, 0) == 0
    for share, error in curve.items():
        assert interpolate(known, share) == pytest.approx(error, rel=1e-12)
