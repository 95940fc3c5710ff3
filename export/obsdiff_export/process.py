"""The process that one engine is built in, and what its end means."""

import logging
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Final

from obsdiff_export import children
from obsdiff_export.builders.request import DISK_FULL, Answer, Builder, Request
from obsdiff_runtime.errors import BuildError, CompatibilityError, ObsdiffError, ResourceError

_log = logging.getLogger(__name__)
_TAIL_LINES: Final = 8
_STARVED: Final = re.compile(r"std::bad_alloc|^MemoryError\b|Cannot allocate memory", re.MULTILINE)
"""Last words of a process that had no memory left to answer with."""
_NO_ROOM_BYTES: Final = 1 << 20
"""With less than this free, a process that died without an answer is taken to have died of it."""


class _DiskFullError(ResourceError):
    """Nothing is kept of such a build, not even its log."""


def run(request: Request, builder: Builder, log: Path) -> Answer:
    """Builds in a process of its own; everything that it says goes to `log_in` the request's folder.

    Args:
        request: what is to be built.
        builder: that it names.
        log: where the log is kept of a build that fails.

    Raises:
        BuildError: the builder refused the graph, crashed, or gave no plan.
        CompatibilityError: it cannot serve what was asked.
        ResourceError: memory or disk were not enough.
    """
    scratch = Path(request.answer).parent
    request.save(scratch / "request.json")
    command = children.command("obsdiff_export.builders.worker", str(scratch / "request.json"))
    with log_in(scratch).open("wb") as sink:
        code = _wait(command, sink.fileno(), children.environment(builder.environment))
    try:
        return _answer(request, builder, log, code)
    except (BuildError, ResourceError) as error:
        if not isinstance(error, _DiskFullError):
            _keep(log_in(scratch), log)
        raise


def log_in(scratch: Path) -> Path:
    """Where the log of a build is written."""
    return scratch / "log"


def _answer(request: Request, builder: Builder, log: Path, code: int) -> Answer:
    try:
        answer = Answer.load(Path(request.answer)) if Path(request.answer).exists() else None
    except ValueError as error:
        raise BuildError(f"{_what(request, builder)}: its answer cannot be read: {error}. Log: {log}") from error
    if code != 0 or answer is None or answer.failure:
        raise _failure(request, builder, log, code, answer)
    plan = Path(request.plan)
    if not plan.is_file() or not plan.stat().st_size:
        raise BuildError(f"{_what(request, builder)}: it says that it built one, but the plan is empty. Log: {log}")
    return answer


def _keep(written: Path, log: Path) -> None:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(written, log)
    except OSError as error:  # what is to be told is the build's failure
        _log.warning("%s: the log of the build was not kept: %s", log, error)


def _wait(command: list[str], sink: int, variables: dict[str, str]) -> int:
    """The exit code; the process ends with this one, because it reads a pipe that we hold."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=sink, stderr=subprocess.STDOUT, env=variables
    ) as process:
        try:
            return process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise


def _failure(request: Request, builder: Builder, log: Path, code: int, answer: Answer | None) -> ObsdiffError:
    """What to raise for a build that gave no plan."""
    what = _what(request, builder)
    failure = answer.failure if answer is not None else ""
    told = answer.message if answer is not None else ""
    free = shutil.disk_usage(Path(request.answer).parent).free
    if failure == "incompatible":
        return CompatibilityError(f"{what}: {told}")
    if failure == "disk" or code == DISK_FULL or (answer is None and free < _NO_ROOM_BYTES):
        room = f"{free:,} bytes are free at {Path(request.answer).parent.parent}"
        return _DiskFullError(f"{what}: the disk, or a quota on it, is full ({room}); make room and repeat")
    said = log_in(Path(request.answer).parent).read_text(encoding="utf-8", errors="replace").splitlines()
    last = "\n".join(said[-_TAIL_LINES:])
    if failure == "memory" or code == -signal.SIGKILL or (answer is None and _STARVED.search(last)):
        return ResourceError(
            f"{what}: it ran out of memory (or was killed); build for fewer targets, for smaller sizes or batches, "
            f"or where more memory is free. Log: {log}"
        )
    if failure:
        return BuildError(f"{what}: {told}. Log: {log}")
    how = f"was ended by signal {_name(-code)}" if code < 0 else f"ended with exit code {code}"
    if code == 0:
        how = "ended without an answer"
    return BuildError(f"{what}: its process {how}. The last lines of {log}:\n{last}")


def _what(request: Request, builder: Builder) -> str:
    return f"{builder.name} {builder.version()} built no engine from {request.onnx}"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
