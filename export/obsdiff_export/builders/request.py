"""What the process that builds is told, what it answers, and what every builder provides.

Nothing here imports torch or a vendor's package: the process that builds starts with this.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

Shapes = Mapping[str, Sequence[int]]
"""min, opt and max of one input."""

Log = Callable[[str, str], None]
"""Takes a severity ("ERROR", "WARNING", "INFO", "VERBOSE") and a message."""

Failure = Literal["refused", "incompatible", "memory"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One build.

    Attributes:
        builder: where its class is, "module:Class".
        onnx: file to read.
        plan, answer: files to write.
        profile: input name -> its shapes.
        sparse: ask for sparse tactics.
        targets: compute capabilities ("8.6"); empty for the GPU that is here.
    """

    builder: str
    onnx: str
    plan: str
    answer: str
    profile: Mapping[str, Shapes]
    sparse: bool
    targets: tuple[str, ...]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Request":
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**data, "targets": tuple(data["targets"])})


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How it ended: `failure` is "" where a plan was written, else what went wrong, told in `message`."""

    failure: Failure | Literal[""]
    message: str
    seconds: float

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Answer":
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class RefusalError(Exception):
    """Raised in the building process: the builder said no, and why."""

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(message)
        self.failure: Failure = failure


class Builder(Protocol):
    """What a builder provides. All but `compile` runs in the caller's process and imports no vendor package."""

    @property
    def name(self) -> str: ...

    @property
    def extra(self) -> str:
        """The extra of obsdiff that installs it."""
        ...

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables that the building process needs."""
        ...

    def missing(self) -> str:
        """Why it cannot build here, "" where it can."""
        ...

    def version(self) -> str:
        """Version of the installed package."""
        ...

    def targets(self, asked: Sequence[str]) -> tuple[str, ...]:
        """Compute capabilities to build for. Raises CompatibilityError for one that this builder cannot serve."""
        ...

    def compile(self, request: Request, log: Log) -> bytes:
        """The plan. Runs in a process of its own; raises RefusalError."""
        ...
