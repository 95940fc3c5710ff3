"""A latency table: how long the matrix products of a network take, by shape; what `--allocation latency:FILE` reads.

    m, k, n    tokens, inputs and outputs of a linear; m over all images of a call
    width      k where a linear loses inputs, n where it loses outputs

Between two measured widths a time is a straight line; below the narrowest one nothing more is saved, because nobody
measured that.
"""

import bisect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from obsdiff_runtime.decoding import decode
from obsdiff_runtime.errors import BundleError, ConfigError

SCHEMA: Final = 1
KIND: Final = "obsdiff latency table"
DENSE: Final = "dense"
SPARSE: Final = "2:4"

What = Literal["measured", "estimate"]
Axis = Literal["k", "n"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One product.

    Attributes:
        kind: "linear".
        m, k, n: its shape.
        dtype: "float16", ...
        variant: "dense" or "2:4".
        ms: median.
        low_ms, high_ms: the middle half of the rounds lies between; both equal `ms` in an estimate.
        rounds: how often it was timed; 0 in an estimate.
    """

    m: int
    k: int
    n: int
    dtype: str
    variant: str
    ms: float
    low_ms: float
    high_ms: float
    rounds: int
    kind: str = "linear"


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Entries, and where they come from.

    Attributes:
        what: "measured" here, or an "estimate" from published peaks.
        device: the GPU's or CPU's name.
        backend: what ran the products: "TensorRT", "torch", "onnxruntime", "roofline".
        date: ISO 8601.
        versions: of what ran.
        model: that the shapes are of.
        call: what a call was: height and width in pixels, rows (images, twice with guidance), text_tokens.
        entries: the products.
    """

    what: What
    device: str
    backend: str
    date: str
    model: str
    call: Mapping[str, int]
    entries: tuple[Entry, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    kind: str = KIND
    schema: int = SCHEMA

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def rows(self) -> int:
        """Images of a call."""
        return self.call["rows"]

    def ms(self, m: int, k: int, n: int, *, along: Axis) -> float:
        """Milliseconds of a dense product whose width along `along` may lie between the measured ones.

        Raises:
            ConfigError: no product with this m and this other width was timed; names the shape.
        """
        fixed, width = (n, k) if along == "k" else (k, n)
        curve = self._curves[along].get((m, fixed))
        if not curve or width > curve[-1][0]:
            raise ConfigError(f"{self._missing(m, k, n)}; {self._remedy()}")
        widths = [place for place, _ in curve]
        right = bisect.bisect_left(widths, width)
        if widths[right] == width or right == 0:
            return curve[right][1]
        (low, fast), (high, slow) = curve[right - 1], curve[right]
        return fast + (slow - fast) * (width - low) / (high - low)

    def require_widths(self, m: int, k: int, n: int, *, along: Axis) -> None:
        """Raises ConfigError, which names the shape, where its full width or any narrower one is absent."""
        fixed, width = (n, k) if along == "k" else (k, n)
        widths = [place for place, _ in self._curves[along].get((m, fixed), ())]
        if width not in widths:
            raise ConfigError(f"{self._missing(m, k, n)}; {self._remedy()}")
        if widths[0] == width:
            axis = "inputs" if along == "k" else "outputs"
            raise ConfigError(f"the latency table has {m} x {k} x {n} at no smaller number of {axis}; {self._remedy()}")

    @cached_property
    def _curves(self) -> dict[Axis, dict[tuple[int, int], list[tuple[int, float]]]]:
        """By axis, then by (m, the other width): the measured widths, ascending, and their times."""
        found: dict[Axis, dict[tuple[int, int], list[tuple[int, float]]]] = {"k": {}, "n": {}}
        for entry in self.entries:
            if entry.variant == DENSE:
                found["k"].setdefault((entry.m, entry.n), []).append((entry.k, entry.ms))
                found["n"].setdefault((entry.m, entry.k), []).append((entry.n, entry.ms))
        return {axis: {key: sorted(curve) for key, curve in curves.items()} for axis, curves in found.items()}

    def _missing(self, m: int, k: int, n: int) -> str:
        call = self.call
        return (
            f"the latency table has no linear of {m} x {k} x {n} (tokens x inputs x outputs); it is of {self.model}, "
            f"{call['height']} x {call['width']} px, {call['rows']} images a call, {call['text_tokens']} text tokens"
        )

    def _remedy(self) -> str:
        return "make one for this model and size: obsdiff whatif MODEL --height H --width W -o table.json"


def load(path: Path) -> LatencyTable:
    """Reads and checks a table.

    Raises:
        ConfigError: absent, no latency table, of another schema, or with entries that cannot be: says which.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; obsdiff whatif MODEL -o {path} writes a latency table") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is no JSON: {error}") from None
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise ConfigError(f"{path}: is no latency table; obsdiff whatif MODEL -o {path} writes one")
    if data.get("schema") != SCHEMA:
        raise ConfigError(
            f"{path}: is a latency table of schema {data.get('schema')!r}, this obsdiff reads {SCHEMA}; "
            f"write it again: obsdiff whatif MODEL -o {path}"
        )
    try:
        table = decode(LatencyTable, data, source=str(path))
    except BundleError as error:
        raise ConfigError(str(error)) from None
    _check(table, path)
    return table


def _check(table: LatencyTable, path: Path) -> None:
    absent = [name for name in ("height", "width", "rows", "text_tokens") if table.call.get(name, -1) < 0]
    if absent or table.call["rows"] < 1:
        raise ConfigError(f"{path}: call.{(absent or ['rows'])[0]} is absent or no number that can be")
    if not table.entries:
        raise ConfigError(f"{path}: the table is empty; give `obsdiff whatif` more --minutes")
    seen = set()
    for index, entry in enumerate(table.entries):
        where = f"{path}: entries[{index}] ({entry.m} x {entry.k} x {entry.n}, {entry.variant})"
        if min(entry.m, entry.k, entry.n) < 1 or entry.variant not in (DENSE, SPARSE):
            raise ConfigError(f"{where}: no such product can be")
        if not 0 < entry.low_ms <= entry.ms <= entry.high_ms < float("inf"):
            raise ConfigError(f"{where}: times should be 0 < low_ms <= ms <= high_ms, and finite")
        key = (entry.m, entry.k, entry.n, entry.variant)
        if key in seen:
            raise ConfigError(f"{where}: is there twice")
        seen.add(key)
    if len({entry.dtype for entry in table.entries}) > 1:
        raise ConfigError(f"{path}: mixes precisions; write one table for each")
