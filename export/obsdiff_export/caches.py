"""Engines and timings kept for the next build, in a folder that all bundles share.

    engines/<key>/      entry.json: what lies here, with sha256; plan, log, layers.json, data
    timings/<name>      what a builder measured on one GPU: sha256, then the builder's own bytes
    logs/<key>.log      of the last build of an engine that failed

An engine's key is a hash of all that went into it, so an entry is never out of date: it is whole, or damaged, and a
damaged one is taken out and built again. Everything is written beside and renamed. Of two processes that store the same
engine one wins, and both have it; of two that store timings the later one wins, which costs time and nothing else.
"""

import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from obsdiff_export.content import sha256_of
from obsdiff_runtime.bundle import sha256
from obsdiff_runtime.errors import ConfigError

VARIABLE: Final = "OBSDIFF_CACHE"
_SCHEMA: Final = 1
_ENTRY: Final = "entry.json"
_PART: Final = ".storing-"
_STALE_SECONDS: Final = 24 * 3600
_DIGEST_CHARS: Final = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An engine in the cache: its files by role ("plan", "log", ...), checked, and what is known of its build."""

    files: Mapping[str, Path]
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Cache:
    """The folder; made when something is first stored."""

    root: Path

    def find(self, key: str) -> Entry | None:
        """The engine of that key; None where there is none, or a damaged one, which is taken out."""
        folder = self.root / "engines" / key
        if not folder.exists():
            return None
        try:
            return _checked(folder, key)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _log.warning("%s: a damaged engine in the cache is built again: %s", folder, error)
            _discard(folder)
            return None

    def store(self, key: str, files: Mapping[str, Path], *, seconds: float, notes: tuple[str, ...]) -> None:
        """Keeps an engine. A cache that cannot be written to is told of in the log; the engine itself is not at risk.

        Args:
            key: of the engine.
            files: role -> file; linked where that is possible, else copied.
            seconds: that the build took.
            notes: as told of the build.
        """
        engines = self.root / "engines"
        try:
            engines.mkdir(parents=True, exist_ok=True)
            _sweep(engines)
            with tempfile.TemporaryDirectory(prefix=_PART, dir=engines, ignore_cleanup_errors=True) as part:
                folder = Path(part) / key
                folder.mkdir()
                for role, path in files.items():
                    place(path, folder / role)
                about = {
                    "schema": _SCHEMA,
                    "key": key,
                    "seconds": seconds,
                    "notes": list(notes),
                    "files": {role: sha256(folder / role) for role in files},
                }
                (folder / _ENTRY).write_text(json.dumps(about, indent=2, sort_keys=True), encoding="utf-8")
                _publish(folder, engines / key)
        except OSError as error:
            _log.warning("%s: the engine %s was built and not kept: %s", self.root, key, error)

    def timings(self, name: str) -> bytes | None:
        """What a builder measured in earlier builds; None where there is nothing, or something damaged."""
        path = self._timings(name)
        try:
            stored = path.read_bytes()
        except OSError:
            return None
        digest, payload = stored[:_DIGEST_CHARS], stored[_DIGEST_CHARS:]
        if digest.decode("ascii", errors="replace") != sha256_of(payload):
            _log.warning("%s: damaged timings are measured again", path)
            path.unlink(missing_ok=True)
            return None
        return payload

    def store_timings(self, name: str, payload: bytes) -> None:
        path = self._timings(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=_PART, dir=path.parent, ignore_cleanup_errors=True) as part:
                new = Path(part) / "timings"
                new.write_bytes(sha256_of(payload).encode("ascii") + payload)
                new.replace(path)
        except OSError as error:
            _log.warning("%s: the builder's timings were not kept: %s", path, error)

    def log(self, key: str) -> Path:
        """Where the log of a build that failed is kept: a bundle that is being written is gone then."""
        return self.root / "logs" / f"{key}.log"

    def _timings(self, name: str) -> Path:
        return self.root / "timings" / re.sub(r"[^\w.]+", "-", name)


def default_folder() -> Path:
    """$OBSDIFF_CACHE, else `obsdiff` in the user's cache directory ($XDG_CACHE_HOME, ~/.cache)."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "obsdiff"


def open_cache(folder: Path | str | None = None) -> Cache:
    """The cache in that folder, `default_folder()` if None.

    Raises:
        ConfigError: there is a file of that name.
    """
    root = Path(folder).expanduser() if folder is not None else default_folder()
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root}: the engine cache must be a folder; name another with --cache-dir or {VARIABLE}")
    return Cache(root)


def place(source: Path, target: Path) -> None:
    """Links a file, or copies it where links cannot be made; what was at `target` is replaced at once or not at all."""
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        try:
            os.link(source, beside)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def _checked(folder: Path, key: str) -> Entry:
    about: dict[str, Any] = json.loads((folder / _ENTRY).read_text(encoding="utf-8"))
    if about["schema"] != _SCHEMA or about["key"] != key:
        raise ValueError(f"it says that it is engine {about['key']!r} of schema {about['schema']!r}")
    files = {}
    for role, digest in about["files"].items():
        path = folder / role
        if Path(role).name != role or sha256(path) != digest:
            raise ValueError(f"{role} is not what was stored")
        files[role] = path
    if "plan" not in files or "log" not in files:
        raise ValueError("it has no plan or no log")
    return Entry(files=files, seconds=float(about["seconds"]), notes=tuple(map(str, about["notes"])))


def _publish(folder: Path, target: Path) -> None:
    """Renames; where another process was first, its entry stays."""
    try:
        folder.rename(target)
    except OSError:
        if not (target / _ENTRY).exists():
            raise


def _discard(folder: Path) -> None:
    """Takes a folder out at once, then deletes it; where that is not allowed, storing fails too, and says so."""
    try:
        aside = Path(tempfile.mkdtemp(prefix=_PART, dir=folder.parent))
        folder.rename(aside / folder.name)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        _log.warning("%s: cannot be removed: %s", folder, error)


def _sweep(engines: Path) -> None:
    """Deletes what processes left that were killed while storing."""
    for left in engines.glob(f"{_PART}*"):
        try:
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        except FileNotFoundError:  # another process was faster
            continue
