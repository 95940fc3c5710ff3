"""Which shapes an engine takes, and which of its profiles serves a request."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Range:
    """Shapes of one input under one profile; tactics were timed at `opt`."""

    min: Shape
    opt: Shape
    max: Shape

    def holds(self, shape: Shape) -> bool:
        return len(shape) == len(self.min) and not any(self.excess(axis, shape) for axis in range(len(shape)))

    def excess(self, axis: int, shape: Shape) -> float:
        """How far outside the range a size is, as a logarithm of a ratio; 0 inside."""
        size, low, high = shape[axis], self.min[axis], self.max[axis]
        if low <= size <= high:
            return 0.0
        return abs(math.log(max(size, 0.5) / max(low if size < low else high, 0.5)))


Profile = Mapping[str, Range]


def choose(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int | None:
    """The profile that holds these shapes and was timed nearest to them; None where none does."""
    fitting = [index for index, profile in enumerate(profiles) if _holds(profile, shapes)]
    return min(fitting, key=lambda index: (_distance(profiles[index], shapes), index), default=None)


def explain(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> str:
    """Why no profile holds these shapes: what is outside the nearest, and what that one takes."""
    ranks = {name: len(profiles[0][name].min) for name in shapes}
    for name, shape in shapes.items():
        if len(shape) != ranks[name]:
            return f"{name} should have {ranks[name]} axes, not {len(shape)}: {shape}"
    nearest = min(range(len(profiles)), key=lambda index: (_excess(profiles[index], shapes), index))
    outside = [
        f"axis {axis} of {name} is {size}, it takes {_span(limits.min[axis], limits.max[axis])}"
        for name, shape in shapes.items()
        for axis, size in enumerate(shape)
        if (limits := profiles[nearest][name]).excess(axis, shape)
    ]
    which = "the engine's profile" if len(profiles) == 1 else f"the nearest of {len(profiles)} profiles is {nearest}"
    return f"{which}: {'; '.join(outside)}. It holds {describe(profiles[nearest])}"


def describe(profile: Profile) -> str:
    """A profile in words: "sample (1..4, 16, 64..128, 64..128), timestep (1..4)"."""
    return ", ".join(
        f"{name} ({', '.join(_span(low, high) for low, high in zip(limits.min, limits.max, strict=True))})"
        for name, limits in profile.items()
    )


def _holds(profile: Profile, shapes: Mapping[str, Shape]) -> bool:
    return all(profile[name].holds(shape) for name, shape in shapes.items())


def _distance(profile: Profile, shapes: Mapping[str, Shape]) -> float:
    """From the shapes that tactics were timed at: sum of the logarithms of the ratios."""
    return sum(
        abs(math.log(max(size, 1) / max(best, 1)))
        for name, shape in shapes.items()
        for size, best in zip(shape, profile[name].opt, strict=True)
    )


def _excess(profile: Profile, shapes: Mapping[str, Shape]) -> float:
    return sum(profile[name].excess(axis, shape) for name, shape in shapes.items() for axis in range(len(shape)))


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}..{high}"
