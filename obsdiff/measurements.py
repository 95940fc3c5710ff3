"""What a run found out, as data: the report of the main job.

A value is measured on this machine in this run, counted from shapes and files, or `NotMeasured` with its reason.
Nothing is ever borrowed from elsewhere.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from obsdiff.evaluation import Evaluation
from obsdiff.pruning import LayerResult

Verdict = Literal["faster", "slower", "no different"]

LEAST_DIFFERENCE = 0.02
"""A median that moved by less than this share is called no different, however narrow its interval."""


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
class Timing:
    """Repeated timings of one thing.

    Attributes:
        p50_ms, p95_ms: percentiles.
        low_ms, high_ms: 95 % interval of the median, from order statistics, free of assumptions on the noise's shape.
        runs: how many timings, warm-up not counted.
    """

    p50_ms: float
    p95_ms: float
    low_ms: float
    high_ms: float
    runs: int

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> "Timing":
        """From the timings themselves, in milliseconds.

        Raises:
            ValueError: fewer than 6, too few for a 95 % interval of the median.
        """
        if len(samples_ms) < 6:
            raise ValueError(f"{len(samples_ms)} timings are too few for an interval of the median; at least 6")
        ordered = sorted(samples_ms)
        rank = _median_rank(len(ordered))
        return cls(
            p50_ms=_percentile(ordered, 0.5),
            p95_ms=_percentile(ordered, 0.95),
            low_ms=ordered[rank],
            high_ms=ordered[-1 - rank],
            runs=len(ordered),
        )


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The same work by the dense and by the pruned model.

    Attributes:
        what: "denoiser, one call", "text to image", ...
        backend: "ONNX Runtime, CPU", ...
        shape: what was run, in words: "2 rows of 64x64 pixels, 20 steps".
    """

    what: str
    backend: str
    shape: str
    dense: Timing
    pruned: Timing

    @property
    def speedup(self) -> float:
        """How many times faster the pruned model is; below 1 it is slower."""
        return self.dense.p50_ms / self.pruned.p50_ms

    @property
    def verdict(self) -> Verdict:
        """Faster or slower only where the intervals of the medians do not touch and the medians differ by 2 %."""
        if self.pruned.high_ms < self.dense.low_ms and self.pruned.p50_ms < self.dense.p50_ms * (1 - LEAST_DIFFERENCE):
            return "faster"
        if self.pruned.low_ms > self.dense.high_ms and self.pruned.p50_ms > self.dense.p50_ms * (1 + LEAST_DIFFERENCE):
            return "slower"
        return "no different"


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
    """An engine in the bundle; `sparsity` says in words what is known of its use of sparse kernels."""

    component: str
    backend: str
    targets: tuple[str, ...]
    sparsity: str
    bytes_on_disk: int
    seconds: float


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
        licence: of the base model, where known: an identifier as the Hub uses it.
        latency: one entry or more, the most telling one first.
        notes: what the user should know, in plain sentences.
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
    latency: tuple[Latency, ...] | NotMeasured
    evaluation: Evaluation | NotMeasured
    stages: tuple[Stage, ...]
    notes: tuple[str, ...] = ()
    command: str | None = None
    licence: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data; an absent number becomes {"not_measured": reason}."""
        data = _plain(self)
        if isinstance(self.latency, tuple):
            for entry, latency in zip(data["latency"], self.latency, strict=True):
                entry |= {"speedup": latency.speedup, "verdict": latency.verdict}
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


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Linear between the two nearest ranks."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _median_rank(count: int) -> int:
    """The largest r with P(Binomial(count, 1/2) <= r) <= 2.5 %: values r and -1-r bound the median at 95 %."""
    rank, probability = -1, 0.0
    while True:
        probability += math.comb(count, rank + 1) / 2**count
        if probability > 0.025:
            return max(rank, 0)
        rank += 1
