"""Graphs become engines: one process per build, and a receipt beside every plan.

An engine's key is a hash over the graph and its weights, builder and version, GPU, targets, profiles and flags. A plan
is reused only where its key and its checksum both match; a name alone proves nothing.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import onnx

from obsdiff_export import process, receipt
from obsdiff_export.builders.request import Answer, Builder, Flags, Request
from obsdiff_export.builders.rtx import Rtx
from obsdiff_export.builders.tensorrt import TensorRt
from obsdiff_export.pattern import PatternReport
from obsdiff_export.ports import read_ports
from obsdiff_export.receipt import Receipt
from obsdiff_runtime.errors import BundleError, ConfigError, ExportError, MissingPackageError
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.shapes import Profile

BUILDERS: Final[dict[str, Builder]] = {"tensorrt": TensorRt(), "tensorrt_rtx": Rtx()}

SCRATCH: Final = "building"
"""Begins the name, behind a dot, of the folder that a build works in, beside its plan."""

_NO_FLAGS: Final = Flags()


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A built engine.

    Attributes:
        path: `<key>.plan`.
        key: hash of everything that went into it.
        backend, backend_version: the builder.
        targets: compute capabilities it runs on.
        device: the one GPU it was built on and for, "" where it was built for a kind of GPU.
        profiles: the shapes it takes.
        flags: what was asked of the builder; what came of `sparse` is in the receipt.
        bytes: of the plan.
        seconds: how long it took to build; of the first build where it was reused.
        receipt_path, log_path: beside the plan.
        layers_path: what the builder's inspector says of the layers; None where it was not asked.
        notes: what a user should know of it.
        reused: an equal engine was there already.
    """

    path: Path
    key: str
    backend: str
    backend_version: str
    targets: tuple[str, ...]
    device: str
    profiles: tuple[Profile, ...]
    flags: Flags
    bytes: int
    seconds: float
    receipt_path: Path
    log_path: Path
    layers_path: Path | None
    notes: tuple[str, ...]
    reused: bool

    @property
    def sparse_requested(self) -> bool:
        return self.flags.sparse


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One engine that is to be: everything that its key is made of, and the key."""

    model: Path
    builder: Builder
    version: str
    device: str
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...]
    flags: Flags
    content: str
    repeat: int

    @property
    def key(self) -> str:
        parts = {
            "onnx": self.content,
            "builder": [self.builder.name, self.version],
            "device": self.device,
            "targets": list(self.targets),
            "profiles": self.shapes(),
            "flags": {**asdict(self.flags), "strongly_typed": True},
            "repeat": self.repeat,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]

    def shapes(self) -> tuple[dict[str, dict[str, Any]], ...]:
        return tuple({name: asdict(limits) for name, limits in sorted(profile.items())} for profile in self.profiles)

    def note(self) -> str:
        return f"{self.model.parent.name} for {', '.join(self.targets)}"


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
    profiles: Sequence[Profile],
    flags: Flags = _NO_FLAGS,
    targets: Sequence[str] = (),
    patterns: Sequence[PatternReport] = (),
    repeat: int = 0,
    progress: Progress = silent,
) -> Engine:
    """Builds one engine in a process of its own.

    Args:
        model: the graph, its weights beside it.
        out_folder: gets `<key>.plan`, `.json` (the receipt) and `.log`; made where it is absent.
        builder: from `choose_builder`.
        profiles: one or more, from `profiles_for`; the engine holds kernels for each.
        flags: what else is asked for.
        targets: compute capabilities; empty for the builder's own choice.
        patterns: the N:M verdicts of the graph's weights, for the receipt.
        repeat: several builds of the same engine are told apart by it; beyond 0 no earlier timing is used.
        progress: called with the stage "build" before and after.

    Raises:
        BuildError: the builder refused the graph or crashed; with its last words and the log's place.
        CompatibilityError: a target, a flag, or a number format on a target, that the builder cannot serve.
        ResourceError: it ran out of memory or disk.
        ExportError: the graph cannot be read.
        ConfigError: the profiles are not the graph's.
    """
    job = _job(model, builder, profiles, flags, targets, repeat)
    out_folder.mkdir(parents=True, exist_ok=True)
    for left in out_folder.glob(f".{SCRATCH}-*"):  # of a build that was killed
        shutil.rmtree(left, ignore_errors=True)
    progress("build", 0, 1, job.note())
    engine = _existing(out_folder, job)
    if engine is None:
        engine = _build(job, out_folder, patterns)
    progress("build", 1, 1, job.note())
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
        digests = [sha256(model), *(sha256(model.parent / place) for place in sorted(places))]
    except Exception as error:
        raise ExportError(f"{model}: cannot be read as a graph with its weights: {error}") from error
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def place_of(builder: Builder) -> str:
    """Where the building process finds a builder: "module:Class"."""
    return f"{type(builder).__module__}:{type(builder).__qualname__}"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _job(
    model: Path, builder: Builder, profiles: Sequence[Profile], flags: Flags, targets: Sequence[str], repeat: int
) -> _Job:
    if not profiles:
        raise ConfigError(f"{model}: an engine needs a profile of the shapes that it is to take")
    inputs, _ = read_ports(model)
    names = {port.name for port in inputs}
    for profile in profiles:
        if names != set(profile):
            raise ConfigError(f"{model}: the profile is for {sorted(profile)}, the graph's inputs are {sorted(names)}")
    chosen = builder.targets(targets)
    builder.check(flags, chosen)
    return _Job(
        model=model,
        builder=builder,
        version=builder.version(),
        device=builder.device(),
        targets=chosen,
        profiles=tuple(profiles),
        flags=flags,
        content=content_hash(model),
        repeat=repeat,
    )


def _build(job: _Job, out_folder: Path, patterns: Sequence[PatternReport]) -> Engine:
    """Builds beside, then moves in; the receipt comes last, so that a plan without one is no engine."""
    log = out_folder / f"{job.key}.log"
    with tempfile.TemporaryDirectory(prefix=f".{SCRATCH}-", dir=out_folder) as scratch:
        request = _request(Path(scratch), job)
        answer = process.run(request, job.builder, log)
        made = _receipt(job, answer.seconds, Path(request.plan), Path(request.layers), log, patterns)
        made.save(Path(scratch) / "receipt.json")
        moves = {
            request.plan: f"{job.key}.plan",
            request.layers: f"{job.key}.layers.json",
            str(Path(scratch) / request.data): request.data,
            str(Path(scratch) / "receipt.json"): f"{job.key}.json",
        }
        for source, name in moves.items():
            if Path(source).exists():
                Path(source).replace(out_folder / name)
    return _engine(out_folder, job, made, reused=False, notes=answer.notes)


def _receipt(
    job: _Job, seconds: float, plan: Path, layers: Path, log: Path, patterns: Sequence[PatternReport]
) -> Receipt:
    return receipt.of(
        key=job.key,
        component=job.model.parent.name,
        backend=job.builder.name,
        backend_version=job.version,
        targets=job.targets,
        onnx_sha256=job.content,
        plan_sha256=sha256(plan),
        plan_bytes=plan.stat().st_size,
        profiles=job.shapes(),
        sparse_requested=job.flags.sparse,
        patterns=patterns,
        log=log.read_text(encoding="utf-8", errors="replace"),
        inspector=layers.read_text(encoding="utf-8", errors="replace") if layers.exists() else None,
        seconds=seconds,
        flags={**asdict(job.flags), "strongly_typed": True, "device": job.device, "repeat": job.repeat},
    )


def _existing(folder: Path, job: _Job) -> Engine | None:
    """The engine of this key, where its plan is the one that its receipt describes."""
    plan, path = folder / f"{job.key}.plan", folder / f"{job.key}.json"
    if not plan.exists() or not path.exists():
        return None
    try:
        found = receipt.load(path)
    except BundleError:
        return None
    same = found.key == job.key and found.plan_sha256 == sha256(plan)
    return _engine(folder, job, found, reused=True) if same else None


def _engine(folder: Path, job: _Job, found: Receipt, *, reused: bool, notes: tuple[str, ...] = ()) -> Engine:
    layers = folder / f"{job.key}.layers.json"
    return Engine(
        path=folder / f"{job.key}.plan",
        key=job.key,
        backend=job.builder.name,
        backend_version=job.version,
        targets=job.targets,
        device=job.device,
        profiles=job.profiles,
        flags=job.flags,
        bytes=found.plan_bytes,
        seconds=found.seconds,
        receipt_path=folder / f"{job.key}.json",
        log_path=folder / f"{job.key}.log",
        layers_path=layers if layers.exists() else None,
        notes=notes,
        reused=reused,
    )


def _request(scratch: Path, job: _Job) -> Request:
    folder = scratch.resolve()
    return Request(
        builder=place_of(job.builder),
        onnx=str(job.model.resolve()),
        plan=str(folder / "plan"),
        answer=str(folder / "answer.json"),
        layers=str(folder / "layers.json"),
        data=f"{job.key}.data",
        timing_cache=None,
        profiles=job.shapes(),
        flags=job.flags,
        targets=job.targets,
    )
