"""Graphs become engines: one process per build, and a receipt beside every plan.

An engine's key is a hash over the graph and its weights, builder and version, GPU, targets, profiles and flags. A plan
is reused only where its key and its checksum both match; a name alone proves nothing.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from obsdiff_export import process
from obsdiff_export.builders.onnxruntime import OnnxRuntime, OnnxRuntimeTensorRt
from obsdiff_export.builders.request import Builder, Flags, Request
from obsdiff_export.builders.rtx import Rtx
from obsdiff_export.builders.tensorrt import TensorRt
from obsdiff_export.caches import Cache, place
from obsdiff_export.content import content_hash, sha256_of
from obsdiff_export.pattern import PatternReport
from obsdiff_export.ports import read_ports
from obsdiff_export.proof import receipt
from obsdiff_export.proof.receipt import Receipt
from obsdiff_export.workshop import workshop
from obsdiff_runtime.bundle import sha256
from obsdiff_runtime.errors import BundleError, ConfigError, MissingPackageError
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.shapes import Profile

BUILDERS: Final[dict[str, Builder]] = {
    "tensorrt": TensorRt(),
    "tensorrt_rtx": Rtx(),
    "onnxruntime": OnnxRuntime(),
    "onnxruntime_tensorrt": OnnxRuntimeTensorRt(),
}
_UNASKED: Final = ("tensorrt", "tensorrt_rtx")
"""What is chosen from where no builder is named: an engine of another kind is no substitute."""

_NO_FLAGS: Final = Flags()
_ROLES: Final[Mapping[str, str]] = {"data": ".data", "layers": ".layers.json", "log": ".log", "plan": ".plan"}
"""What a build leaves -> the end of its name. The receipt comes last: without it there is no engine."""

_log = logging.getLogger(__name__)


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
        return sha256_of(json.dumps(parts, sort_keys=True).encode())[:24]

    def shapes(self) -> tuple[dict[str, dict[str, Any]], ...]:
        return tuple({name: asdict(limits) for name, limits in sorted(profile.items())} for profile in self.profiles)

    @property
    def timings(self) -> str:
        """Name of the timings that hold for it: those of one builder's version on one GPU."""
        return "-".join((self.builder.name, self.version, self.device, *self.targets))

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
    asked = [BUILDERS[each] for each in ([name] if name is not None else _UNASKED)]
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
    cache: Cache | None = None,
    progress: Progress = silent,
) -> Engine:
    """One engine: the one that is there already, or in the cache, or built in a process of its own.

    Args:
        model: the graph, its weights beside it.
        out_folder: gets `<key>.plan`, `.json` (the receipt) and `.log`; made where it is absent.
        builder: from `choose_builder`.
        profiles: one or more, from `profiles_for`; the engine holds kernels for each.
        flags: what else is asked for.
        targets: compute capabilities; empty for the builder's own choice.
        patterns: the 2:4 verdicts of the graph's weights, for the receipt.
        repeat: several builds of the same engine are told apart by it; beyond 0 nothing is taken from the cache or
            kept there, neither engines nor timings.
        cache: where equal engines of other bundles and earlier timings are; None for neither.
        progress: called with the stage "build" before and after.

    Raises:
        BuildError: the builder refused the graph or crashed; with its last words and the log's place.
        CompatibilityError: a target, a flag, or a number format on a target, that the builder cannot serve.
        ResourceError: it ran out of memory or disk.
        ExportError: the graph cannot be read.
        ConfigError: the profiles are not the graph's.
    """
    job = _job(model, builder, profiles, flags, targets, repeat)
    progress("build", 0, 1, job.note())
    with workshop(out_folder) as scratch:
        engine = _existing(out_folder, job, patterns) or _from_cache(out_folder, scratch, job, cache, patterns)
        if engine is None:
            engine = _build(out_folder, scratch, job, cache, patterns)
    progress("build", 1, 1, job.note())
    return engine


def place_of(builder: Builder) -> str:
    """Where the building process finds a builder: "module:Class"."""
    return f"{type(builder).__module__}:{type(builder).__qualname__}"


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


def _build(folder: Path, scratch: Path, job: _Job, cache: Cache | None, patterns: Sequence[PatternReport]) -> Engine:
    keeps_timings = cache is not None and job.builder.times_tactics and job.repeat == 0
    request = _request(scratch, job, keeps_timings)
    if cache is not None and request.timing_cache is not None:
        known = cache.timings(job.timings)
        if known is not None:
            Path(request.timing_cache).write_bytes(known)
    failed = cache.log(job.key) if cache is not None else folder / f"{job.key}{_ROLES['log']}"
    answer = process.run(request, job.builder, failed)
    if cache is not None and request.timing_cache is not None and Path(request.timing_cache).exists():
        cache.store_timings(job.timings, Path(request.timing_cache).read_bytes())
    paths = {
        "data": scratch / request.data,
        "layers": Path(request.layers),
        "log": process.log_in(scratch),
        "plan": Path(request.plan),
    }
    files = {role: path for role, path in paths.items() if path.exists()}
    if cache is not None and job.repeat == 0:
        cache.store(job.key, files, seconds=answer.seconds, notes=answer.notes)
    return _finish(folder, scratch, job, files, patterns, seconds=answer.seconds, notes=answer.notes, reused=False)


def _from_cache(
    folder: Path, scratch: Path, job: _Job, cache: Cache | None, patterns: Sequence[PatternReport]
) -> Engine | None:
    entry = cache.find(job.key) if cache is not None and job.repeat == 0 else None
    if entry is None:
        return None
    files = {role: scratch / role for role in entry.files}
    for role, path in entry.files.items():
        place(path, files[role])
    return _finish(folder, scratch, job, files, patterns, seconds=entry.seconds, notes=entry.notes, reused=True)


def _finish(
    folder: Path,
    scratch: Path,
    job: _Job,
    files: Mapping[str, Path],
    patterns: Sequence[PatternReport],
    *,
    seconds: float,
    notes: tuple[str, ...],
    reused: bool,
) -> Engine:
    """Moves what a build left beside each other, with a receipt made of it."""
    made = _receipt(job, files, patterns, seconds, notes)
    made.save(scratch / "receipt.json")
    moves = {path: folder / f"{job.key}{_ROLES[role]}" for role, path in files.items()}
    moves[scratch / "receipt.json"] = folder / f"{job.key}.json"
    try:
        for source, target in moves.items():
            source.replace(target)
    except BaseException:
        for target in moves.values():
            target.unlink(missing_ok=True)
        raise
    return _engine(folder, job, made, reused=reused)


def _receipt(
    job: _Job, files: Mapping[str, Path], patterns: Sequence[PatternReport], seconds: float, notes: tuple[str, ...]
) -> Receipt:
    def text(role: str) -> str | None:
        return files[role].read_text(encoding="utf-8", errors="replace") if role in files else None

    flags = {**asdict(job.flags), "strongly_typed": True, "device": job.device, "repeat": job.repeat}
    if notes:
        flags["notes"] = list(notes)
    if "data" in files:
        flags["data_sha256"] = sha256(files["data"])
    return receipt.of(
        key=job.key,
        component=job.model.parent.name,
        backend=job.builder.name,
        backend_version=job.version,
        targets=job.targets,
        onnx_sha256=job.content,
        plan_sha256=sha256(files["plan"]),
        plan_bytes=files["plan"].stat().st_size,
        profiles=job.shapes(),
        sparse_requested=job.flags.sparse,
        patterns=patterns,
        log=text("log") or "",
        inspector=text("layers"),
        seconds=seconds,
        flags=flags,
    )


def _existing(folder: Path, job: _Job, patterns: Sequence[PatternReport]) -> Engine | None:
    """The engine of this key, where its files are those that its receipt describes.

    The receipt is made anew: it may have been written without the verdicts on the weights.
    """
    paths = {role: folder / f"{job.key}{end}" for role, end in _ROLES.items()}
    path = folder / f"{job.key}.json"
    if not paths["plan"].exists() or not path.exists():
        return None
    try:
        found = receipt.load(path)
    except BundleError as error:
        _log.warning("%s", error)
        return None
    expected = {"plan": found.plan_sha256}
    if "data_sha256" in found.flags:
        expected["data"] = str(found.flags["data_sha256"])
    for role, digest in expected.items():
        if found.key != job.key or not paths[role].exists() or sha256(paths[role]) != digest:
            _log.warning("%s is not what its receipt describes; it is built again", paths[role])
            return None
    if patterns:
        files = {role: file for role, file in paths.items() if file.exists()}
        notes = found.flags.get("notes")
        found = _receipt(job, files, patterns, found.seconds, tuple(notes) if isinstance(notes, list) else ())
        found.save(path)
    return _engine(folder, job, found, reused=True)


def _engine(folder: Path, job: _Job, found: Receipt, *, reused: bool) -> Engine:
    layers = folder / f"{job.key}{_ROLES['layers']}"
    notes = found.flags.get("notes")
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
        notes=tuple(map(str, notes)) if isinstance(notes, Sequence) else (),
        reused=reused,
    )


def _request(scratch: Path, job: _Job, keeps_timings: bool) -> Request:
    folder = scratch.resolve()
    return Request(
        builder=place_of(job.builder),
        onnx=str(job.model.resolve()),
        plan=str(folder / "plan"),
        answer=str(folder / "answer.json"),
        layers=str(folder / "layers.json"),
        data=f"{job.key}.data",
        timing_cache=str(folder / "timings") if keeps_timings else None,
        profiles=job.shapes(),
        flags=job.flags,
        targets=job.targets,
    )
