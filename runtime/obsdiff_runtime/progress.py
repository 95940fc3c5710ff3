"""How long work tells where it stands: the library calls, whoever shows it listens."""

import sys
import time
from typing import Protocol


class Progress(Protocol):
    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` pieces of `stage` are finished; `note` names the one at hand."""
        ...


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Shows nothing."""


class Lines:
    """A line on stderr for each stage that is finished."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        started = self._started.setdefault(stage, time.monotonic())
        if done >= total and started >= 0:
            self._started[stage] = -1.0
            print(f"{stage}: {total} of {total} in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
