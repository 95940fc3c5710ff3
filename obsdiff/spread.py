"""Mean and spread of figures over runs."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One figure over several runs; `std` divides by runs - 1."""

    runs: int
    mean: float
    std: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least two finite values."""
        return cls(
            runs=len(values),
            mean=statistics.fmean(values),
            std=statistics.stdev(values),
            least=min(values),
            most=max(values),
        )


def spread_of(runs: Sequence[Mapping[str, float | None]]) -> dict[str, Spread]:
    """Of every figure that is finite in all of two runs or more."""
    found = {}
    for name in runs[0]:
        values = [value for run in runs if (value := run.get(name)) is not None and math.isfinite(value)]
        if len(values) == len(runs):
            found[name] = Spread.of(values)
    return found
