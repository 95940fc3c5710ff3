"""What the parts of the GPU benchmark write: a row for each case, as soon as it is known."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

Value = str | int | float


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a part is told.

    Attributes:
        device: "cuda" or "cpu".
        seconds: for the whole part; it stops between two cases.
        tiny: toy shapes, to try the benchmark itself.
        quick: fewer cases.
    """

    device: str
    seconds: float
    tiny: bool = False
    quick: bool = False


@dataclass(kw_only=True)
class Row:
    """One case.

    Attributes:
        case: what was run.
        figures: what was measured; the unit ends the name.
        note: in words.
        error: why there is no figure, or not every one.
    """

    part: str
    case: dict[str, Value]
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""
    error: str = ""


class Sheet:
    """The rows of one part, in a file of JSON lines: one that is stopped leaves those it has."""

    def __init__(self, path: Path, part: str, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._path, self._part, self._now = path, part, now
        self._end = now() + seconds

    def left(self) -> float:
        """Seconds of the part's time, negative where it is over."""
        return self._end - self._now()

    @contextmanager
    def case(self, **case: Value) -> Iterator[Row]:
        """A row to be filled. What is raised meanwhile is its error, and the part goes on."""
        row = Row(part=self._part, case=case)
        try:
            yield row
        except Exception as error:  # any: the next case may well run
            row.error = first_line(error)
        self._write(row)

    def refused(self, error: Exception, **case: Value) -> None:
        """A row for what cannot be tried at all."""
        self._write(Row(part=self._part, case=case, error=first_line(error)))

    def not_reached(self, count: int) -> None:
        """Notes that cases were left out; nothing for none."""
        if count:
            self._write(Row(part=self._part, case={"not reached": count}, error=f"{count} cases: the time was up"))

    def _write(self, row: Row) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")


def read(path: Path) -> list[Row]:
    """The rows of a file; none where it is absent. A last line that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(Row(**json.loads(line)))
        except ValueError:
            break
    return rows


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def flat(case: Mapping[str, Value]) -> str:
    """A case in a cell: "model sd3, tokens 4096"."""
    return ", ".join(f"{name} {value}" for name, value in case.items())
