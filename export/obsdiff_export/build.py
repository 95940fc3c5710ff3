"""Graphs become engines: one process per build, and a receipt beside every plan.

An engine's key is a hash over the graph and its weights, builder and version, targets, shapes and flags. A plan is
reused only where its key and its checksum both match; a name alone proves nothing.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import onnx

import obsdiff_export
import obsdiff_runtime.errors
from obsdiff_export.builders.request import Answer, Builder, Request
from obsdiff_export.builders.rtx import Rtx
from obsdiff_export.builders.tensorrt import TensorRt
from obsdiff_export.pattern import PatternReport
from obsdiff_export.ports import read_ports
from obsdiff_export.profiles import Profile
from obsdiff_export.receipt import Receipt, load, parse_log
from obsdiff_runtime.errors import (
    BuildError,
    BundleError,
    CompatibilityError,
    ConfigError,
    ExportError,
    MissingPackageError,
    ObsdiffError,
    ResourceError,
)
from obsdiff_runtime.progress import Progress, silent

BUILDERS: Final[dict[str, Builder]] = {"tensorrt": TensorRt(), "tensorrt_rtx": Rtx()}

SCRATCH: Final = "building"
"""Begins the name, behind a dot, of the folder that a build works in, beside its plan."""

_TAIL_LINES: Final = 8


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A built engine.

    Attributes:
        path: `<key>.plan`.
        key: hash of everything that went into it.
        backend, backend_version: the builder.
        targets: compute capabilities it runs on.
        sparse_requested: whether sparse tactics were asked for; what came of it is in the receipt.
        bytes: of the plan.
        seconds: how long it took to build; of the first build where it was reused.
        receipt_path, log_path: beside the plan.
        reused: an equal engine was there already.
    """

    path: Path
    key: str
    backend: str
    backend_version: str
    targets: tuple[str, ...]
    sparse_requested: bool
    bytes: int
    seconds: float
    receipt_path: Path
    log_path: Path
    reused: bool


def available_builders() -> tuple[str, ...]:
    """Names of the builders that can build here, best first."""
    return tuple(name for name, builder in BUILDERS.items() if not builder.missing())


def choose_builder(name: str | None = None) -> Builder:
    """The named builder, or the best that can build here: TensorRT where there is a GPU, else TensorRT-RTX.

    Cheap: ask before any work is done.

    Raises:
        ConfigError: no builder has this name.
        MissingPackageError: it cannot build here, or none can; says what to install.
    """
    if name is not None and name not in BUILDERS:
        raise ConfigError(f"no builder is called {name!r}; there are {', '.join(BUILDERS)}")
    asked = [BUILDERS[name]] if name is not None else list(BUILDERS.values())
    for builder in asked:
        if not builder.missing():
            return builder
    why = "; ".join(f"{builder.name}: {builder.missing()}" for builder in asked)
    how = " or ".join(f"pip install 'obsdiff[{builder.extra}]'" for builder in asked)
    hint = " (trt needs an NVIDIA GPU in this machine, rtx builds without one)" if name is None else ""
    raise MissingPackageError(f"no engine can be built here: {why}. Install one: {how}{hint}")


def build(
    model: Path,
    out_folder: Path,
    *,
    builder: Builder,
    profile: Mapping[str, Profile],
    sparse: bool,
    targets: Sequence[str] = (),
    patterns: Sequence[PatternReport] = (),
    progress: Progress = silent,
) -> Engine:
    """Builds one engine in a process of its own.

    Args:
        model: the graph, its weights beside it.
        out_folder: gets `<key>.plan`, `.json` (the receipt) and `.log`; made where it is absent.
        builder: from `choose_builder`.
        profile: from `profile_for`.
        sparse: ask for sparse tactics.
        targets: compute capabilities; empty for the builder's own choice.
        patterns: the N:M verdicts of the graph's weights, for the receipt.
        progress: called with the stage "build" before and after.

    Raises:
        BuildError: the builder refused the graph or crashed; with its last words and the log's place.
        CompatibilityError: a target, or a number format on a target, that the builder cannot serve.
        ResourceError: it ran out of memory.
        ExportError: the graph cannot be read.
    """
    _check_profile(model, profile)
    chosen = builder.targets(targets)
    content = content_hash(model)
    shapes = {name: asdict(shape) for name, shape in sorted(profile.items())}
    key = _key(content, builder, chosen, shapes, sparse)
    out_folder.mkdir(parents=True, exist_ok=True)
    for left in out_folder.glob(f".{SCRATCH}-*"):  # of a build that was killed
        shutil.rmtree(left, ignore_errors=True)
    note = f"{model.parent.name} for {', '.join(chosen)}"
    progress("build", 0, 1, note)
    engine = _existing(out_folder, key)
    if engine is None:
        log = out_folder / f"{key}.log"
        with tempfile.TemporaryDirectory(prefix=f".{SCRATCH}-", dir=out_folder) as scratch:
            request = _request(Path(scratch), model, builder, shapes, sparse, chosen)
            seconds = _run(request, builder, log)
            plan = Path(request.plan)
            receipt = Receipt(
                key=key,
                component=model.parent.name,
                backend=builder.name,
                backend_version=builder.version(),
                targets=chosen,
                onnx_sha256=content,
                plan_sha256=_sha256(plan),
                plan_bytes=plan.stat().st_size,
                profile=shapes,
                sparse_requested=sparse,
                sparsity_log=parse_log(log.read_text(encoding="utf-8", errors="replace")),
                weights=tuple(patterns),
                seconds=seconds,
            )
            plan.replace(out_folder / f"{key}.plan")
            receipt.save(out_folder / f"{key}.json")
        engine = _engine(out_folder, receipt, reused=False)
    progress("build", 1, 1, note)
    return engine


def content_hash(model: Path) -> str:
    """sha256 over a graph and the files its weights lie in.

    Raises:
        ExportError: one of them is absent, or the graph is none.
    """
    try:
        graph = onnx.load(str(model), load_external_data=False).graph
        places = {
            entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"
        }
        digests = [_sha256(model), *(_sha256(model.parent / place) for place in sorted(places))]
    except Exception as error:
        raise ExportError(f"{model}: cannot be read as a graph with its weights: {error}") from error
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def place_of(builder: Builder) -> str:
    """Where the building process finds a builder: "module:Class"."""
    return f"{type(builder).__module__}:{type(builder).__qualname__}"


def _check_profile(model: Path, profile: Mapping[str, Profile]) -> None:
    inputs, _ = read_ports(model)
    names = {port.name for port in inputs}
    if names != set(profile):
        raise ConfigError(f"{model}: the profile is for {sorted(profile)}, the graph's inputs are {sorted(names)}")


def _key(
    content: str, builder: Builder, targets: Sequence[str], shapes: Mapping[str, Mapping[str, Any]], sparse: bool
) -> str:
    parts = {
        "onnx": content,
        "builder": [builder.name, builder.version()],
        "targets": list(targets),
        "shapes": shapes,
        "flags": {"sparse": sparse, "strongly_typed": True, "tf32": False},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _existing(folder: Path, key: str) -> Engine | None:
    """The engine of this key, where its plan is the one that its receipt describes."""
    plan, path = folder / f"{key}.plan", folder / f"{key}.json"
    if not plan.exists() or not path.exists():
        return None
    try:
        receipt = load(path)
    except BundleError:
        return None
    same = receipt.key == key and receipt.plan_sha256 == _sha256(plan)
    return _engine(folder, receipt, reused=True) if same else None


def _engine(folder: Path, receipt: Receipt, *, reused: bool) -> Engine:
    return Engine(
        path=folder / f"{receipt.key}.plan",
        key=receipt.key,
        backend=receipt.backend,
        backend_version=receipt.backend_version,
        targets=receipt.targets,
        sparse_requested=receipt.sparse_requested,
        bytes=receipt.plan_bytes,
        seconds=receipt.seconds,
        receipt_path=folder / f"{receipt.key}.json",
        log_path=folder / f"{receipt.key}.log",
        reused=reused,
    )


def _request(
    scratch: Path,
    model: Path,
    builder: Builder,
    shapes: Mapping[str, Mapping[str, Any]],
    sparse: bool,
    targets: tuple[str, ...],
) -> Request:
    return Request(
        builder=place_of(builder),
        onnx=str(model.resolve()),
        plan=str((scratch / "plan").resolve()),
        answer=str((scratch / "answer.json").resolve()),
        profile=shapes,
        sparse=sparse,
        targets=targets,
    )


def _run(request: Request, builder: Builder, log: Path) -> float:
    """Seconds that the build took; everything the process says goes to the log."""
    scratch = Path(request.answer).parent
    request.save(scratch / "request.json")
    command = [sys.executable, "-P", "-u", "-m", "obsdiff_export.builders.worker", str(scratch / "request.json")]
    with log.open("wb") as sink:
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=_environment(builder)
        ).returncode
    answer = Answer.load(Path(request.answer)) if Path(request.answer).exists() else None
    if code == 0 and answer is not None and not answer.failure:
        return answer.seconds
    raise _failure(request, builder, log, code, answer)


def _environment(builder: Builder) -> dict[str, str]:
    """This process's, with our packages on the path however they were found."""
    roots = [str(Path(module.__file__ or "").parent.parent) for module in (obsdiff_export, obsdiff_runtime.errors)]
    inherited = [path for path in (os.environ.get("PYTHONPATH"), builder.environment.get("PYTHONPATH")) if path]
    return {**os.environ, **builder.environment, "PYTHONPATH": os.pathsep.join([*roots, *inherited])}


def _failure(request: Request, builder: Builder, log: Path, code: int, answer: Answer | None) -> ObsdiffError:
    """What to raise for a build that gave no plan."""
    what = f"{builder.name} {builder.version()} built no engine from {request.onnx}"
    if answer is not None and answer.failure == "incompatible":
        return CompatibilityError(f"{what}: {answer.message}")
    if code == -signal.SIGKILL or (answer is not None and answer.failure == "memory"):
        return ResourceError(
            f"{what}: it ran out of memory (or was killed); build for fewer targets, for smaller sizes or batches, "
            f"or where more memory is free. Log: {log}"
        )
    if answer is not None and answer.failure:
        return BuildError(f"{what}: {answer.message}. Log: {log}")
    how = f"was ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    return BuildError(f"{what}: its process {how}. The last lines of {log}:\n" + "\n".join(lines))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
