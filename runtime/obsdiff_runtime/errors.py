"""Everything a user can get wrong, or a machine can lack, and the exit code of each.

    ObsdiffError              1   failed
    ├── ConfigError           2   usage or configuration: a flag, a file, a pattern, a prompt
    │   └── ModelError        2   the model given is none, or of no known family
    ├── CalibrationError      1   statistics that cannot be used: empty, not finite, indefinite
    ├── ExportError           1   a graph that could not be made, or does not compute what torch computes
    ├── BuildError            1   an engine builder refused or crashed
    ├── BundleError           1   a bundle or checkpoint that is incomplete or altered
    ├── RunError              1   a component that ran and gave nothing usable
    ├── CancelledError        130 whoever asked for it wants it no more
    ├── QualityError          3   a quality gate was not met
    ├── ResourceError         4   not enough memory or disk
    ├── CompatibilityError    5   engine, schema or environment do not fit together
    │   └── MissingPackageError   an optional package is absent; names the extra
    └── SparsityProofError    6   sparsity was demanded and could not be shown

A message says what, where and what to do next. Anything else that is raised is a bug and shows its traceback, but for
what `failure` knows: an interruption, memory or a disk that is full, a file that cannot be read.
"""

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final


class ObsdiffError(Exception):
    exit_code: ClassVar[int] = 1


class ConfigError(ObsdiffError):
    exit_code = 2


class ModelError(ConfigError):
    pass


class CalibrationError(ObsdiffError):
    pass


class ExportError(ObsdiffError):
    pass


class BuildError(ObsdiffError):
    pass


class BundleError(ObsdiffError):
    pass


class RunError(ObsdiffError):
    pass


class CancelledError(ObsdiffError):
    exit_code = 130


class QualityError(ObsdiffError):
    exit_code = 3


class ResourceError(ObsdiffError):
    exit_code = 4


class CompatibilityError(ObsdiffError):
    exit_code = 5


class MissingPackageError(CompatibilityError):
    pass


class SparsityProofError(ObsdiffError):
    exit_code = 6


INTERRUPTED: Final = 130
MOST: Final = 100_000
"""More steps, tokens, images or threads than that nobody means."""

SMALLER: Final = "lower --height, --width or the number of images"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What a command says as it ends: an exit code and one sentence."""

    exit_code: int
    sentence: str


def failure(error: BaseException, *, smaller: str = SMALLER, again: str = "") -> Failure | None:
    """What a user is told of an error; None of a bug.

    Args:
        error: what was raised.
        smaller: how to need less memory.
        again: how to go on after an interruption, put behind the sentence.
    """
    if isinstance(error, ObsdiffError):
        full = _is_full(error)
        code = ResourceError.exit_code if full else error.exit_code
        return Failure(exit_code=code, sentence=f"{error}{again}" if full else str(error))
    if isinstance(error, KeyboardInterrupt):
        return Failure(exit_code=INTERRUPTED, sentence=f"interrupted{again}")
    if _is_out_of_memory(error):
        where = " on the GPU" if "CUDA" in str(error) else ""
        return Failure(exit_code=ResourceError.exit_code, sentence=f"out of memory{where}; {smaller}{again}")
    if _is_full(error):
        return Failure(exit_code=ResourceError.exit_code, sentence=f"the disk is full: {error}{again}")
    if isinstance(error, BrokenPipeError):
        return Failure(exit_code=ObsdiffError.exit_code, sentence="what read the output has ended")
    if isinstance(error, OSError) and error.errno is not None:
        return Failure(exit_code=ObsdiffError.exit_code, sentence=f"{error.filename or 'disk'}: {error.strerror}")
    return None


def require_count(name: str, value: int) -> None:
    """Raises ConfigError unless there can be so many of what is called so: 1 to MOST."""
    if value < 1:
        raise ConfigError(f"{name} should be at least 1, not {value}")
    if value > MOST:
        raise ConfigError(f"{name} should be at most {MOST}, not {value}")


def require_file(flag: str, path: Path) -> None:
    """Raises ConfigError unless a file can be written at `path`: to be called before the work whose result it holds."""
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: is a folder; name a file")
    above = next(each for each in path.absolute().parents if each.exists())
    if not above.is_dir():
        raise ConfigError(f"{flag} {path}: {above} is a file; choose another folder")
    if not os.access(path if path.exists() else above, os.W_OK):
        raise ConfigError(f"{flag} {path}: may not be written")


def first_line(error: BaseException) -> str:
    """What a library's error says in one line without its full stop; its class where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's error, or torch's: of a GPU a class of its own, of the host a RuntimeError that says so."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    said = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or said


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk, a quota or a limit on file sizes is behind it; safetensors tells of it in words only."""
    if error is None:
        return False
    number = error.errno if isinstance(error, OSError) else None
    said = re.search(r"\(os error (\d+)\)", str(error))
    codes = {number, int(said[1]) if said else None}
    return bool(codes & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}) or _is_full(error.__cause__)
