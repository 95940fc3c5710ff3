"""The folder that an engine is built in, beside its place: gone when the build ends, however it ends."""

import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil

SCRATCH: Final = "building"
"""Begins the folder's name, behind a dot; host and process that build in it follow."""

_STALE_SECONDS: Final = 24 * 3600
_OWNER: Final = re.compile(rf"\.{SCRATCH}-(?P<host>.+)-(?P<process>\d+)-[^-]+")


@contextmanager
def workshop(folder: Path) -> Iterator[Path]:
    """A folder to build in, inside `folder`, which is made; where nothing comes of it, what was made is gone again.

    What earlier processes left that were killed is deleted; that of other processes at work stays.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=f"{_mine()}-", dir=folder, ignore_cleanup_errors=True) as scratch:
            yield Path(scratch)
    finally:
        for path in made:
            try:
                path.rmdir()
            except OSError:  # it holds something
                break


def _mine() -> str:
    return f".{SCRATCH}-{socket.gethostname()}-{os.getpid()}"


def _sweep(folder: Path) -> None:
    for left in folder.glob(f".{SCRATCH}-*"):
        if not _in_use(left):
            shutil.rmtree(left, ignore_errors=True)


def _in_use(scratch: Path) -> bool:
    """Whether its process lives; of another host's, such as a container that is gone, whether it wrote today."""
    owner = _OWNER.fullmatch(scratch.name)
    if owner is None:
        return False
    if owner["host"] == socket.gethostname():
        return bool(psutil.pid_exists(int(owner["process"])))
    try:
        latest = max(path.stat().st_mtime for path in (scratch, *scratch.iterdir()))
    except FileNotFoundError:  # it ends just now
        return False
    return time.time() - latest < _STALE_SECONDS
