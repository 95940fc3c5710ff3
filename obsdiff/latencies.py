"""What removing units saves in time, by a latency table: the costs of `--allocation latency:FILE`.

The table says how long a linear takes at a width; a group that loses units makes its producers and consumers narrower,
and saves the difference; a linear that two groups make narrower counts for each as if it were alone. Attention itself
is not in the table, nor in the multiply-accumulates it stands in for.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from obsdiff.groups import Group, LinearSpec
from obsdiff_export.latency_table import Axis, LatencyTable, load
from obsdiff_runtime.errors import ConfigError

PREFIX: Final = "latency:"
_DIGITS: Final = 12


def is_latency(allocation: str) -> bool:
    """Whether an allocation is by a table."""
    return allocation.startswith(PREFIX)


def named(asked: str) -> str:
    """The allocation of a recipe for what a user asked for, "latency:FILE": with the start of the file's sha256.

    Raises:
        ConfigError: there is no such table, or it is an estimate.
    """
    path = Path(asked.removeprefix(PREFIX))
    table = load(path)
    if table.what == "estimate":
        raise ConfigError(
            f"--allocation {asked}: {path} is an estimate from published peaks for a {table.device}, which says little "
            f"more than MACs do; measure it there (obsdiff whatif MODEL -o {path}; without torch, obsdiff-engines time "
            f"{path} -o measured.json), or use --allocation measured"
        )
    return f"{PREFIX}{path}#{_digest(path)}"


def table_of(allocation: str) -> LatencyTable:
    """The table of a recipe's allocation.

    Raises:
        ConfigError: the file is gone, or is not the one that the recipe was made with.
    """
    place, _, digest = allocation.removeprefix(PREFIX).rpartition("#")
    table = load(Path(place))
    if _digest(Path(place)) != digest:
        raise ConfigError(
            f"{place}: has changed since the recipe named it (sha256 {digest}...); start anew, without --resume"
        )
    return table


class Times:
    """Milliseconds that removals save in one call of as many images as the table is for."""

    def __init__(self, table: LatencyTable, linears: Sequence[LinearSpec], positions: Mapping[str, int]) -> None:
        """`linears` before anything is cut; `positions` of one image."""
        self._table, self._positions = table, positions
        self._linears = {linear.name: linear for linear in linears}

    def require(self, groups: Sequence[Group]) -> None:
        """Raises ConfigError where the table lacks a linear of these groups at its full and at a narrower width."""
        for group in groups:
            for linear, axis, _ in self._changes(group, 0):
                m, k, n = self._size(linear)
                try:
                    self._table.require_widths(m, k, n, along=axis)
                except ConfigError as error:
                    raise ConfigError(f"--allocation latency: {linear.name}: {error}") from None

    def saved_ms(self, groups: Sequence[Group], removed: Mapping[str, int]) -> float:
        """What goes with the units of these groups; less than 0 where the table has narrower products take longer.

        Args:
            groups: any.
            removed: group name -> units that go.

        Raises:
            ConfigError: the table lacks a shape; names it.
        """
        return sum(
            self._saved(linear, axis, lost)
            for group in groups
            for linear, axis, lost in self._changes(group, removed.get(group.name, 0))
        )

    def _saved(self, linear: LinearSpec, axis: Axis, lost: int) -> float:
        m, k, n = self._size(linear)
        narrow = (m, k - lost, n) if axis == "k" else (m, k, n - lost)
        return self._table.ms(m, k, n, along=axis) - self._table.ms(*narrow, along=axis)

    def _changes(self, group: Group, removed: int) -> list[tuple[LinearSpec, Axis, int]]:
        """The linears of a group, the axis that each loses from, and how much."""
        found: list[tuple[LinearSpec, Axis, int]] = []
        for producer in group.producers:
            if producer.name in self._linears:
                found.append((self._linears[producer.name], "n", removed * group.height(producer) * producer.parts))
        found += [(self._linears[name], "k", removed * group.width) for name in group.readers]
        return found

    def _size(self, linear: LinearSpec) -> tuple[int, int, int]:
        return self._table.rows * self._positions[linear.name], linear.in_features, linear.out_features


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:_DIGITS]
