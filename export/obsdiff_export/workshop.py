"""The folder that an engine is built in, beside its place: gone when the build ends, however it ends."""

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil

SCRATCH: Final = "building"
"""Begins the folder's name, behind a dot; host and process that build in it follow."""

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
        owner = _OWNER.fullmatch(left.name)
        if owner is not None and (owner["host"] != socket.gethostname() or psutil.pid_exists(int(owner["process"]))):
            continue
        shutil.rmtree(left, ignore_errors=True)
