"""Which shapes an engine takes: smallest, best and largest, from the sizes that will be served."""

import re
from collections.abc import Mapping, Sequence
from typing import Final

from obsdiff_export.ports import Port
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.references import TOKENS
from obsdiff_runtime.shapes import Profile, Range

Size = int | tuple[int, int, int]
"""One size, or smallest, best (the one tactics are timed at: choose the served size) and largest."""

_TIMES: Final = re.compile(r"(.+)_x([0-9]+)")

Sizes = Mapping[str, Size]
"""Symbol of a dynamic axis ("batch", "height") -> its size; "height_x4" is four times "height"."""


def profile_for(inputs: Sequence[Port], sizes: Sizes) -> Profile:
    """The shapes of every input, by name.

    Args:
        inputs: the graph's.
        sizes: may name more symbols than these inputs have, so that one table serves all components.

    Raises:
        ConfigError: a symbol has no size, or a size is not 1 <= min <= opt <= max; that of references may begin at 0.
    """
    ranges = {symbol: _range(symbol, size) for symbol, size in sizes.items()}
    return {port.name: _limits(port, ranges) for port in inputs}


def profiles_for(inputs: Sequence[Port], tables: Sequence[Sizes]) -> tuple[Profile, ...]:
    """One profile per table; tables that are equal for these inputs give one."""
    profiles: list[Profile] = []
    for table in tables:
        profile = profile_for(inputs, table)
        if profile not in profiles:
            profiles.append(profile)
    return tuple(profiles)


def _limits(port: Port, ranges: Mapping[str, tuple[int, int, int]]) -> Range:
    axes = []
    for size in port.shape:
        symbol, times = _symbol(size) if isinstance(size, str) else ("", 1)
        if symbol and symbol not in ranges:
            known = ", ".join(sorted(ranges)) or "none"
            raise ConfigError(f"no size is given for '{size}' of input {port.name}; sizes given: {known}")
        axes.append(tuple(times * side for side in ranges[symbol]) if symbol else (size, size, size))
    low, best, high = zip(*axes, strict=True) if axes else ((), (), ())
    return Range(min=low, opt=best, max=high)


def _symbol(text: str) -> tuple[str, int]:
    """("height", 4) of "height_x4"."""
    found = _TIMES.fullmatch(text)
    return (text, 1) if found is None else (found[1], int(found[2]))


def _range(symbol: str, size: Size) -> tuple[int, int, int]:
    low, best, high = (size, size, size) if isinstance(size, int) else size
    least = 0 if symbol == TOKENS else 1
    if not least <= low <= best <= high:
        raise ConfigError(f"sizes of '{symbol}' must be {least} <= min <= opt <= max, not {low}, {best}, {high}")
    return low, best, high
