"""Result folders that are whole or absent, written beside and then renamed; and what is copied into them."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from obsdiff_runtime.errors import ConfigError

MANIFEST = "obsdiff.json"

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".ckpt", ".h5", ".msgpack", ".onnx", ".pb", ".gguf", ".xml"}


def partial_of(path: Path) -> Path:
    """Where the folder is written before it is finished."""
    return path.with_name(f"{path.name}.partial")


def check_free(path: Path, *, force: bool) -> None:
    """Raises ConfigError unless a result may be written to this folder: to be called before any work.

    With `force`, an earlier result of obsdiff or an empty folder may be replaced, and nothing else.
    """
    if path.name in ("", ".."):
        raise ConfigError(f"{path}: name the folder to create")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ConfigError(f"{path}: {above} is a file; choose another folder")
    if not path.exists() and not path.is_symlink():
        return
    if not force:
        raise ConfigError(f"{path} exists; choose another folder or replace it with --force")
    if not path.is_dir() or path.is_symlink():
        raise ConfigError(f"{path} is no plain folder; --force replaces results of obsdiff only")
    written_by_us = any(any(path.glob(f"{place}{MANIFEST}")) for place in ("", "*/", "*/*/bundle/"))
    if not written_by_us and any(path.iterdir()):
        raise ConfigError(f"{path} was not written by obsdiff, so --force leaves it alone; choose another folder")


@contextmanager
def new_folder(path: Path, *, force: bool = False, keep_partial: bool = False) -> Iterator[Path]:
    """A folder to write into, beside `path`, that becomes `path` when the block ends without an error.

    After an error, or Ctrl-C, nothing is at `path` that was not there before.

    Args:
        path: of the finished folder; folders above it are created.
        force: replace an earlier result, at the end.
        keep_partial: go on in what an earlier, failed attempt left at `partial_of(path)`, and leave it there again
            after an error; otherwise both are deleted.

    Raises:
        ConfigError: `path` is taken; raised before anything is written.
    """
    path = path.absolute()
    check_free(path, force=force)
    partial = partial_of(path)
    if partial.exists() and not keep_partial:
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    except BaseException:
        if not keep_partial:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    for weights in partial.rglob("*.safetensors"):
        if weights.stat().st_nlink == 1 and not weights.is_symlink():  # else others' files, too
            let_read(weights)
    _replace(path, partial)


def let_read(path: Path) -> None:
    """Gives a file the permissions that any new one has: safetensors writes files for their owner's eyes alone."""
    mask = os.umask(0)  # to ask is to set
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _replace(path: Path, partial: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    previous = path.with_name(f"{path.name}.previous")
    if previous.exists():
        shutil.rmtree(previous)
    path.rename(previous)
    try:
        partial.rename(path)
    except BaseException:
        previous.rename(path)
        raise
    shutil.rmtree(previous)


def component_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """A component's weights as plain safetensors, and its other files; variants and other formats are left out."""
    files = [path for path in folder.iterdir() if path.is_file() and not is_variant(path)]
    weights = [path for path in files if path.suffix == ".safetensors"]
    return weights, [path for path in files if path.suffix not in _WEIGHT_SUFFIXES]


def copy_all(files: Sequence[Path], target: Path) -> None:
    """Copies files into a new folder."""
    target.mkdir()
    for path in files:
        copy(path, target / path.name)


def is_variant(path: Path) -> bool:
    """Of "model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors" and their index files."""
    stem = path.name.removesuffix(".json").removesuffix(".index").removesuffix(".safetensors")
    return (".safetensors" in path.name or ".bin" in path.name) and "." in stem


def copy(source: Path, target: Path) -> None:
    """Copies; links instead where the source is a blob of the Hub's cache, which is never written to."""
    if source.is_symlink() and source.resolve().parent.name == "blobs":
        try:
            os.link(source.resolve(), target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(source, target)
