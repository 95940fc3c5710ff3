"""What the process that builds is told, what it answers, and what every builder provides.

Nothing here imports torch or a vendor's package: the process that builds starts with this.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

Shapes = Mapping[str, Sequence[int]]
"""min, opt and max of one input."""

Log = Callable[[str, str], None]
"""Takes a severity ("ERROR", "WARNING", "INFO", "VERBOSE"; "NOTE" for what a user should know) and a message."""

Refit = Literal["no", "yes", "stripped"]
"""Whether an engine's weights can be replaced: no; yes; or they must be, because the plan holds none."""

REFITS: Final[tuple[Refit, ...]] = ("no", "yes", "stripped")

Failure = Literal["refused", "incompatible", "memory", "disk"]

DISK_FULL: Final = 74
"""Exit code of a building process that could not even write an answer (EX_IOERR of sysexits.h)."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What is asked of a builder beside shapes and targets. All of it is in an engine's key.

    Attributes:
        sparse: allow sparse tactics.
        refit: see `Refit`.
        weight_streaming: let weights stay in the host's memory, for an engine that is larger than the GPU's.
        optimization_level: 0 (fastest build) to 5 (fastest engine); None for the builder's own default.
        tf32: let float32 matrices be multiplied in TF32.
    """

    sparse: bool = False
    refit: Refit = "no"
    weight_streaming: bool = False
    optimization_level: int | None = None
    tf32: bool = False


@dataclass(frozen=True, kw_only=True)
class Request:
    """One build.

    Attributes:
        builder: where its class is, "module:Class".
        onnx: file to read.
        plan, answer: files to write.
        layers: file to write what the builder's inspector says of the engine to, as JSON, where it can be asked.
        data: name of the file for weights that the plan refers to, in the plan's folder; few builders need one.
        timing_cache: file to read and rewrite, None where timings are neither known nor kept.
        profiles: for each optimisation profile, input name -> its shapes.
        flags: what else is asked for.
        targets: compute capabilities ("8.6"), as `Builder.targets` gave them.
    """

    builder: str
    onnx: str
    plan: str
    answer: str
    layers: str
    data: str
    timing_cache: str | None
    profiles: tuple[Mapping[str, Shapes], ...]
    flags: Flags
    targets: tuple[str, ...]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Request":
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        data["flags"] = Flags(**data["flags"])
        return cls(**{**data, "targets": tuple(data["targets"]), "profiles": tuple(data["profiles"])})


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How it ended.

    Attributes:
        failure: "" where a plan was written, else what went wrong.
        message: told of a failure.
        seconds: the build took.
        notes: what a user should know of a plan that was built.
    """

    failure: Failure | Literal[""]
    message: str
    seconds: float
    notes: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Answer":
        """Raises ValueError for what is no answer."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            answer = cls(**{**data, "notes": tuple(data.get("notes", ())), "seconds": float(data["seconds"])})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"it is no answer: {error}") from error
        if not isinstance(answer.failure, str) or not isinstance(answer.message, str):
            raise ValueError("it is no answer: its texts are none")
        return answer


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

    @property
    def times_tactics(self) -> bool:
        """Whether it keeps what it timed in a cache, for the next build."""
        ...

    def missing(self) -> str:
        """Why it cannot build here, "" where it can."""
        ...

    def version(self) -> str:
        """Version of the installed package."""
        ...

    def device(self) -> str:
        """Name of the one GPU that it builds on and for; "" where it builds for a kind of GPU, or for none."""
        ...

    def targets(self, asked: Sequence[str]) -> tuple[str, ...]:
        """Compute capabilities to build for. Raises CompatibilityError for one that this builder cannot serve."""
        ...

    def check(self, flags: Flags, targets: Sequence[str]) -> None:
        """Raises CompatibilityError for flags that it cannot serve here: asked before any work is done."""
        ...

    def compile(self, request: Request, log: Log) -> bytes | memoryview:
        """The plan. Runs in a process of its own; raises RefusalError."""
        ...
