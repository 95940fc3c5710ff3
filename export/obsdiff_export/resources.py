"""Is there room for a run? Asked before the work."""

import shutil
from pathlib import Path

import psutil

from obsdiff_runtime.errors import ResourceError


def require_disk(folder: Path, needed_bytes: int) -> None:
    """Raises ResourceError where the disk that will hold `folder` has less than `needed_bytes` free."""
    free = free_bytes(folder)
    if free < needed_bytes:
        raise ResourceError(
            f"{folder}: needs about {gigabytes(needed_bytes)}, {gigabytes(free)} are free; "
            "free some, or choose another disk with -o"
        )


def existing_folder(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def free_bytes(folder: Path) -> int:
    """What is free on the disk that holds `folder`, or will."""
    return shutil.disk_usage(existing_folder(folder)).free


def require_memory(needed_bytes: int, *, advice: str) -> None:
    """Raises ResourceError, which ends in `advice`, where less than `needed_bytes` of memory is available."""
    available = psutil.virtual_memory().available
    if available < needed_bytes:
        raise ResourceError(
            f"needs about {gigabytes(needed_bytes)} of memory, {gigabytes(available)} are available; {advice}"
        )


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
