"""Which shapes an engine takes, and which of its profiles serves a request: numbers only.

A profile bounds every input: no axis smaller than `min`, none larger than `max`. Its kernels were timed at `opt`. An
axis that may change has a symbol ("height") where the graph names it; inputs that share a symbol share its size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from obsdiff_runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Range:
    """Smallest, best and largest shape of one input."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


Profile = Mapping[str, Range]
"""Input name -> the shapes that it may have."""

Shapes = Mapping[str, Sequence[int]]
"""Input name -> its shape in one request."""

Symbols = Mapping[str, Sequence[int | str]]
"""Input name -> its axes as the graph names them: ("batch", 16, "height", "width")."""

_NO_SYMBOLS: Final[Symbols] = {}
_NO_UNITS: Final[Mapping[str, int]] = {}


@dataclass(frozen=True)
class _Axis:
    """One size of a request beside what a profile takes of it."""

    name: str
    size: int
    low: int
    best: int
    high: int

    @property
    def outside(self) -> float:
        """How far from the range, as the logarithm of a ratio; 0 inside."""
        return abs(_log(self.size) - _log(min(max(self.size, self.low), self.high)))

    @property
    def from_best(self) -> float:
        return abs(_log(self.size) - _log(self.best))


def choose(profiles: Sequence[Profile], shapes: Shapes) -> int | None:
    """Index of the profile that serves these shapes, None where none does.

    Of several, the one whose best shape is nearest: its kernels were timed closest to what is asked.

    Raises:
        ConfigError: the inputs are others, or have another number of axes.
    """
    fitting = []
    for index, profile in enumerate(profiles):
        axes = _axes(profile, shapes, _NO_SYMBOLS)
        if not any(axis.outside for axis in axes):
            fitting.append((sum(axis.from_best for axis in axes), index))
    return min(fitting)[1] if fitting else None


def nearest(profiles: Sequence[Profile], shapes: Shapes) -> int:
    """Index of the profile that would have to grow least; ties go to the one whose best shape is nearer.

    Raises:
        ConfigError: there is no profile, or the inputs are others.
    """
    if not profiles:
        raise ConfigError("the engine has no profiles; build it again")

    def distance(index: int) -> tuple[float, float, int]:
        axes = _axes(profiles[index], shapes, _NO_SYMBOLS)
        return sum(axis.outside for axis in axes), sum(axis.from_best for axis in axes), index

    return min(range(len(profiles)), key=distance)


def serving(
    profiles: Sequence[Profile],
    shapes: Shapes,
    symbols: Symbols = _NO_SYMBOLS,
    units: Mapping[str, int] = _NO_UNITS,
) -> int:
    """Index of the profile that serves these shapes.

    Args:
        profiles: of one engine.
        shapes: of every input.
        symbols: the graph's names of the axes, for the message.
        units: symbol -> what one of it is in the user's unit: {"height": 8} tells a latent height in pixels.

    Raises:
        ConfigError: no profile serves them; says what is outside, and what the nearest takes.
    """
    found = choose(profiles, shapes)
    if found is None:
        raise ConfigError(refusal(profiles, shapes, symbols, units))
    return found


def refusal(
    profiles: Sequence[Profile],
    shapes: Shapes,
    symbols: Symbols = _NO_SYMBOLS,
    units: Mapping[str, int] = _NO_UNITS,
) -> str:
    """What is outside of the nearest profile, in words; see `serving`."""
    index = nearest(profiles, shapes)
    outside = {axis.name: axis for axis in _axes(profiles[index], shapes, symbols) if axis.outside}
    asked = ", ".join(f"{name} {axis.size * units.get(name, 1)}" for name, axis in outside.items())
    taken = ", ".join(f"{name} {_span(axis, units.get(name, 1))}" for name, axis in outside.items())
    which = "its profile" if len(profiles) == 1 else f"the nearest of its {len(profiles)} profiles (number {index + 1})"
    return f"the engine does not take {asked}: {which} takes {taken}"


def words(profile: Profile, symbols: Symbols = _NO_SYMBOLS, units: Mapping[str, int] = _NO_UNITS) -> str:
    """A profile in words: "batch 1 to 8 (timed at 2), height 512"; only axes that the graph names, where it does."""
    best = {name: limits.opt for name, limits in profile.items()}
    axes = {axis.name: axis for axis in _axes(profile, best, symbols)}
    named = {str(size) for shape in symbols.values() for size in shape if isinstance(size, str)}
    parts = []
    for axis in axes.values():
        if symbols and axis.name not in named:
            continue
        unit = units.get(axis.name, 1)
        timed = "" if axis.low == axis.high else f" (timed at {axis.best * unit})"
        parts.append(f"{axis.name} {_span(axis, unit)}{timed}")
    return ", ".join(parts) or "fixed shapes"


def _axes(profile: Profile, shapes: Shapes, symbols: Symbols) -> list[_Axis]:
    if set(profile) != set(shapes):
        raise ConfigError(
            f"the engine takes {', '.join(sorted(profile))}, not {', '.join(sorted(shapes)) or 'nothing'}"
        )
    axes = []
    for name, limits in profile.items():
        if len(shapes[name]) != len(limits.min):
            raise ConfigError(f"{name} has {len(shapes[name])} axes, the engine takes {len(limits.min)}")
        named = symbols.get(name, ())
        for index, size in enumerate(shapes[name]):
            symbol = named[index] if index < len(named) else index
            label = symbol if isinstance(symbol, str) else f"axis {index} of {name}"
            axes.append(_Axis(label, int(size), limits.min[index], limits.opt[index], limits.max[index]))
    return axes


def _span(axis: _Axis, unit: int) -> str:
    low, high = axis.low * unit, axis.high * unit
    return str(low) if low == high else f"{low} to {high}"


def _log(size: int) -> float:
    return math.log(max(size, 1)) if size >= 1 else -1.0
