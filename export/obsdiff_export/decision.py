"""When an engine with the sparse flag, or of a cut model, counts as faster: numbers in, a sentence out."""

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
        outcome: of the engine with the flag against the one without it; of a model whose weights are not 2:4 against
            the dense one.
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
    what = f"{comparison.speedup:.2f}x with the sparse flag against the same weights without it"
    outcome, found = _judged(comparison, what, noise, floor)
    if outcome == "not measured":
        return not_measured(found, floor=floor)
    which = "with" if outcome == "faster" else "without"
    why = f"{found}: the engine {which} the flag is shipped"
    return Decision(
        outcome=outcome, sparse=outcome == "faster", comparison=comparison, noise=noise, floor=floor, why=why
    )


def against_dense(comparison: Comparison, *, noise: float | None, floor: float = LEAST) -> Decision:
    """What the engine of a model whose weights are not 2:4 gains; it is shipped in any case, without the flag.

    Args:
        comparison: of it against the dense model's.
        noise: from `between_builds`.
        floor: the smallest gain that counts, as a fraction.
    """
    outcome, found = _judged(comparison, f"{comparison.speedup:.2f}x against the dense model", noise, floor)
    if outcome == "not measured":
        return not_measured(found, sparse=False, floor=floor)
    why = f"{found}; no weight is 2:4, and the sparse flag would change nothing"
    return Decision(outcome=outcome, sparse=False, comparison=comparison, noise=noise, floor=floor, why=why)


def _judged(comparison: Comparison, what: str, noise: float | None, floor: float) -> tuple[Outcome, str]:
    """Faster or slower if timing is sure of it and it is more than builds differ by; and that in words."""
    low, high, gain = comparison.low, comparison.high, comparison.speedup - 1
    if low is None or high is None:
        return "not measured", f"{comparison.rounds} rounds are too few to tell a difference from noise"
    interval = f"95 % in {low:.2f} .. {high:.2f}"
    builds = "between builds unknown" if noise is None else f"builds differ by {noise:.1%}"
    least = max(floor, noise or 0)
    if low > 1 and gain > least:
        return "faster", f"{what} ({interval}; {builds})"
    if high < 1 and -gain > least:
        return "slower", f"{what} ({interval}; {builds})"
    if low <= 1 <= high:
        return "no different", f"{what}, no difference beyond noise ({interval})"
    small = f"which is within the {least:.0%} that counts as noise between builds"
    return "no different", f"{what} ({interval}), {small} ({builds})"


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
