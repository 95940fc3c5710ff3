"""The process that builds one engine: `python -m obsdiff_export.builders.worker request.json`.

Writes the plan and an answer; every message of the builder goes to stdout. A crash leaves no answer: the caller tells.
The caller holds the other end of stdin: when it is gone, this process ends too.
"""

import errno
import importlib
import os
import sys
import threading
from pathlib import Path
from time import perf_counter

from obsdiff_export.builders.request import DISK_FULL, Answer, Builder, RefusalError, Request

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(path: str) -> None:
    request = Request.load(Path(path))
    try:
        _answer(request).save(Path(request.answer))
        sys.stdout.flush()
    except OSError as error:
        if error.errno in _FULL:
            os._exit(DISK_FULL)  # no answer and no log line can be written
        raise


def log(severity: str, message: str) -> None:
    """A line of the log: the caller sends stdout there."""
    try:
        sys.stdout.write(f"[{severity}] {message}\n")
    except OSError as error:
        if error.errno in _FULL:
            os._exit(DISK_FULL)
        raise


def _answer(request: Request) -> Answer:
    """Builds, and writes the plan."""
    notes: list[str] = []

    def told(severity: str, message: str) -> None:
        if severity == "NOTE":
            notes.append(message)
        log(severity, message)

    started = perf_counter()
    try:
        plan = _builder(request.builder).compile(request, told)
        Path(request.plan).write_bytes(plan)
    except RefusalError as refusal:
        return Answer(failure=refusal.failure, message=str(refusal), seconds=perf_counter() - started)
    except MemoryError as error:
        return Answer(failure="memory", message=str(error), seconds=perf_counter() - started)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        return Answer(failure="disk", message=str(error), seconds=perf_counter() - started)
    return Answer(failure="", message="", seconds=perf_counter() - started, notes=tuple(notes))


def _builder(place: str) -> Builder:
    """The class at "module:Class", made; other builders' packages stay out of the process."""
    module, _, name = place.partition(":")
    found: Builder = getattr(importlib.import_module(module), name)()
    return found


def _end_with_the_caller() -> None:
    """Reads stdin to its end, which comes when the caller is gone, killed or not."""
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    main(sys.argv[1])
