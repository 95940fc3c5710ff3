"""What a run found out, as data: the report of the main job.

A value is measured on this machine in this run, counted from shapes and files, or `NotMeasured` with its reason.
Nothing is ever borrowed from elsewhere.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from obsdiff.evaluation import Evaluation
from obsdiff.results import LayerResult, QuantizedLinear
from obsdiff_runtime.timing import Comparison, Latency, Outcome, Timings


@dataclass(frozen=True, kw_only=True)
class NotMeasured:
    """Stands where a number is absent; `why` completes "not measured: ..."."""

    why: str


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where the numbers come from.

    Attributes:
        date: ISO 8601 with time zone.
        packages: version by distribution name: torch, diffusers, onnxruntime, ...
        cpu: model name.
        cores: logical cores this process may use.
        threads: of the measured sessions.
        memory_bytes: of the machine.
        gpu: name, or None where there is none.
    """

    date: str
    python: str
    platform: str
    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    gpu: str | None
    packages: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Size of a denoiser.

    Attributes:
        parameters: stored numbers, zeros included.
        nonzero: those that are not zero.
        macs: multiply-accumulates of the linears and convolutions for a batch of one, zeros included; see costs.py.
        bytes_on_disk: of its weights as saved.
    """

    parameters: int
    nonzero: int
    macs: int | NotMeasured
    bytes_on_disk: int | NotMeasured


@dataclass(frozen=True, kw_only=True)
class LatencyPair:
    """The same work by the dense and by the pruned model, timed by turns.

    Attributes:
        what: "one denoiser call", "text to image", ...
        backend: "ONNX Runtime on the CPU", ...
        shape: what was run, in words: "2 rows of 64x64 pixels".
        comparison: of "pruned" against "dense".
    """

    what: str
    backend: str
    shape: str
    dense: Latency
    pruned: Latency
    comparison: Comparison

    @classmethod
    def of(cls, timings: Timings, *, what: str, backend: str, shape: str) -> "LatencyPair":
        """From `time_interleaved({"dense": ..., "pruned": ...})`."""
        latencies = timings.latencies
        found = next(entry for entry in timings.comparisons if (entry.name, entry.against) == ("pruned", "dense"))
        return cls(
            what=what,
            backend=backend,
            shape=shape,
            dense=latencies["dense"],
            pruned=latencies["pruned"],
            comparison=found,
        )

    @property
    def verdict(self) -> Outcome:
        return self.comparison.outcome


@dataclass(frozen=True, kw_only=True)
class ExportedComponent:
    """A network in the bundle.

    Attributes:
        max_error: largest |onnx - torch| / max |torch| over outputs and input sets, through ONNX Runtime.
    """

    name: str
    dtype: str
    bytes_on_disk: int
    max_error: float | NotMeasured


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """An engine in the bundle.

    Attributes:
        backend: with its version.
        targets: compute capabilities that it is for.
        sparsity: what is known of its use of sparse kernels, in words.
        verdicts: its linears by what is proven of them: {"active": 140, "not chosen": 56}; empty where none was looked
            at.
        choice: why this engine was taken of those that were timed, or why none was; "" where one alone was wanted.
    """

    component: str
    backend: str
    targets: tuple[str, ...]
    sparsity: str
    bytes_on_disk: int
    seconds: float
    verdicts: Mapping[str, int] = field(default_factory=dict)
    choice: str = ""


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a run found out.

    Attributes:
        model: as the user named it.
        command: what to type to get this again; None where the run was not started from a shell.
        recipe: the resolved configuration, as JSON data.
        licence: of the base model where known, as its card says it: license, license_name, license_link.
        latency: one entry or more, the most telling one first.
        notes: what the user should know, in plain sentences.
        quantized: what `--precision` made of each linear of the blocks; empty where it was not asked for.
    """

    obsdiff_version: str
    model: str
    family: str
    sparsity: str
    method: str
    recipe: Mapping[str, Any]
    environment: Environment
    dense: Counts
    pruned: Counts
    layers: tuple[LayerResult, ...]
    components: tuple[ExportedComponent, ...] | NotMeasured
    engines: tuple[BuiltEngine, ...] | NotMeasured
    latency: tuple[LatencyPair, ...] | NotMeasured
    evaluation: Evaluation | NotMeasured
    stages: tuple[Stage, ...]
    notes: tuple[str, ...] = ()
    quantized: tuple[QuantizedLinear, ...] = ()
    command: str | None = None
    licence: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data; an absent number becomes {"not_measured": reason}."""
        data = _plain(self)
        if isinstance(self.latency, tuple):
            for entry, latency in zip(data["latency"], self.latency, strict=True):
                entry["verdict"] = latency.verdict
        return data  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, NotMeasured):
        return {"not_measured": value.why}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_plain(entry) for entry in value]
    return value
