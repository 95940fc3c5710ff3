"""When an engine with the sparse flag counts as faster: numbers in, a sentence out."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from obsdiff_runtime.timing import LEAST, Comparison

Outcome = Literal["faster", "no different", "slower", "not measured"]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether to serve with the sparse flag.

    Attributes:
        outcome: of the engine with the flag against the one without it.
        sparse: ship the one with it. Where nothing was measured that is what was asked for.
        comparison: what decided; None where nothing was measured.
        noise: how much builds of the same differ, as a fraction; None where it was not measured.
        floor: the smallest gain that counts, as a fraction.
        why: all this in a sentence.
    """

    outcome: Outcome
    sparse: bool
    comparison: Comparison | None
    noise: float | None
    floor: float
    why: str


def decide(comparison: Comparison, *, noise: float | None, floor: float = LEAST) -> Decision:
    """The engine with the flag is faster if timing is sure of it and the gain is more than builds differ by.

    Args:
        comparison: of the engine with the flag ("faster than 1" is for it) against the one without.
        noise: from `between_builds`.
        floor: the smallest gain that counts, as a fraction.
    """
    low, high, gain = comparison.low, comparison.high, comparison.speedup - 1
    if low is None or high is None:
        return not_measured(f"{comparison.rounds} rounds are too few to tell a difference from noise", floor=floor)
    found = f"{comparison.speedup:.2f}x with the sparse flag against the same weights without it"
    interval = f"95 % in {low:.2f} .. {high:.2f}"
    builds = "between builds unknown" if noise is None else f"builds differ by {noise:.1%}"
    least = max(floor, noise or 0)
    outcome: Outcome = "no different"
    if low > 1 and gain > least:
        outcome, why = "faster", f"{found} ({interval}; {builds}): the engine with the flag is shipped"
    elif high < 1 and -gain > least:
        outcome, why = "slower", f"{found} ({interval}; {builds}): the engine without the flag is shipped"
    elif low <= 1 <= high:
        why = f"{found}, no difference beyond noise ({interval}): the engine without the flag is shipped"
    else:
        why = f"{found} ({interval}), which is within the {least:.0%} that counts as noise between builds"
        why = f"{why} ({builds}): the engine without the flag is shipped"
    return Decision(
        outcome=outcome, sparse=outcome == "faster", comparison=comparison, noise=noise, floor=floor, why=why
    )


def not_measured(reason: str, *, sparse: bool = True, floor: float = LEAST) -> Decision:
    """Nothing is known; the engine that was asked for is shipped, or the only one there is."""
    which = "with" if sparse else "without"
    why = f"not measured: {reason}; the engine {which} the sparse flag is shipped"
    return Decision(outcome="not measured", sparse=sparse, comparison=None, noise=None, floor=floor, why=why)


def between_builds(passes: Sequence[Mapping[str, Sequence[float]]]) -> float | None:
    """How much builds of the same differ: largest less smallest, as a fraction of the median; None for one build.

    Of the ratio of "dense" to "pruned" where both were timed: neither holds sparse kernels, so that what changes from
    pass to pass is the builds, and a GPU that warms up cancels. Else of "pruned" alone.

    Args:
        passes: seconds by variant, one mapping for each build.
    """
    medians = [{name: statistics.median(seconds) for name, seconds in found.items()} for found in passes]
    values = [found["dense"] / found["pruned"] for found in medians if {"dense", "pruned"} <= found.keys()]
    if len(values) < 2:
        values = [found["pruned"] for found in medians if "pruned" in found]
    return spread(values)


def spread(values: Sequence[float]) -> float | None:
    """Largest less smallest, as a fraction of the median; None for fewer than two."""
    return (max(values) - min(values)) / statistics.median(values) if len(values) > 1 else None
