"""Which shapes an engine takes: smallest, best and largest, from the sizes that will be served."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from obsdiff_export.ports import Port
from obsdiff_runtime.errors import ConfigError

Size = int | tuple[int, int, int]
"""One size, or smallest, best (the one tactics are timed at: choose the served size) and largest."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Shapes of one input."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


def profile_for(inputs: Sequence[Port], sizes: Mapping[str, Size]) -> dict[str, Profile]:
    """The shapes of every input, by name.

    Args:
        inputs: the graph's.
        sizes: symbol of a dynamic axis ("batch", "height") -> its size, or (min, opt, max). May name more symbols than
            these inputs have, so that one table serves all components.

    Raises:
        ConfigError: a symbol has no size, or a size is not 1 <= min <= opt <= max.
    """
    ranges = {symbol: _range(symbol, size) for symbol, size in sizes.items()}
    return {port.name: _profile(port, ranges) for port in inputs}


def _profile(port: Port, ranges: Mapping[str, tuple[int, int, int]]) -> Profile:
    axes = []
    for size in port.shape:
        if isinstance(size, str) and size not in ranges:
            known = ", ".join(sorted(ranges)) or "none"
            raise ConfigError(f"no size is given for '{size}' of input {port.name}; sizes given: {known}")
        axes.append(ranges[size] if isinstance(size, str) else (size, size, size))
    low, best, high = zip(*axes, strict=True) if axes else ((), (), ())
    return Profile(min=low, opt=best, max=high)


def _range(symbol: str, size: Size) -> tuple[int, int, int]:
    low, best, high = (size, size, size) if isinstance(size, int) else size
    if not 1 <= low <= best <= high:
        raise ConfigError(f"sizes of '{symbol}' must be 1 <= min <= opt <= max, not {low}, {best}, {high}")
    return low, best, high
