"""What a person at the terminal sees: progress with the time left, on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from obsdiff_runtime.progress import Progress, silent


@contextmanager
def progress_on_stderr(*, quiet: bool = False) -> Iterator[Progress]:
    """A progress callback: bars on a terminal, a line per finished stage where stderr goes to a file or a pipe."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield bars
    else:
        yield _Lines()


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, int] = {}

        def show(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, note=note)
            progress.update(tasks[stage], completed=done, total=total, note="" if done >= total else note)  # type: ignore[arg-type]

        yield show


class _Lines:
    def __init__(self) -> None:
        self._started: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        started = self._started.setdefault(stage, time.monotonic())
        if done >= total and started >= 0:
            self._started[stage] = -1.0
            print(f"{stage}: {total} of {total} in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
