"""The process that builds one engine: `python -m obsdiff_export.builders.worker request.json`.

Writes the plan and an answer; every message of the builder goes to stdout. A crash leaves no answer: the caller tells.
"""

import importlib
import sys
from pathlib import Path
from time import perf_counter

from obsdiff_export.builders.request import Answer, Builder, RefusalError, Request


def main(path: str) -> None:
    request = Request.load(Path(path))
    started = perf_counter()
    try:
        plan = _builder(request.builder).compile(request, log)
    except RefusalError as refusal:
        answer = Answer(failure=refusal.failure, message=str(refusal), seconds=perf_counter() - started)
    except MemoryError as error:
        answer = Answer(failure="memory", message=str(error), seconds=perf_counter() - started)
    else:
        Path(request.plan).write_bytes(plan)
        answer = Answer(failure="", message="", seconds=perf_counter() - started)
    answer.save(Path(request.answer))


def log(severity: str, message: str) -> None:
    """A line of the log: the caller sends stdout there."""
    sys.stdout.write(f"[{severity}] {message}\n")


def _builder(place: str) -> Builder:
    """The class at "module:Class", made; other builders' packages stay out of the process."""
    module, _, name = place.partition(":")
    found: Builder = getattr(importlib.import_module(module), name)()
    return found


if __name__ == "__main__":
    main(sys.argv[1])
