"""What a benchmark found."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from obsdiff_runtime.benchmark.runner import Request, Subject
from obsdiff_runtime.decoding import decode, encode
from obsdiff_runtime.nvml import GpuVitals
from obsdiff_runtime.quantiles import Interval
from obsdiff_runtime.timing import Comparison, Latency, Machine
from obsdiff_runtime.vitals import CpuVitals

END_TO_END = "end_to_end"


@dataclass(frozen=True, kw_only=True)
class Outside:
    """Time of a call in which no component ran: tokenizing, the scheduler, copies, pixels to bytes.

    Attributes:
        latency: per call.
        share: of the whole call, median over the rounds.
        stages_ms: where it went, median over the rounds: in "text", "denoise" and "decode"; empty where that is not
            known.
    """

    latency: Latency
    share: float
    stages_ms: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a candidate takes.

    Attributes:
        host_growth_bytes: of the process's resident memory while it was loaded and drew its first image; less than it
            takes where an earlier candidate had left room. None where the system does not tell.
        device_peak_bytes: of the GPU; None where it runs on the CPU, or nobody tells.
        device_source: who tells the latter, or why nobody does.
    """

    host_growth_bytes: int | None
    device_peak_bytes: int | None
    device_source: str


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Of the whole GPU, by NVML's counter.

    Attributes:
        joules_per_image: over all rounds that count; None where it was not measured.
        source: who counted, or why nobody did.
    """

    joules_per_image: float | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One of those that were measured.

    Attributes:
        dtype: that its denoiser computes in.
        devices: where each component ran.
        load_ms: of each component, or of all as "pipeline".
        first_image_ms: the first call, without loading.
        end_to_end: text to pixels in the host's memory; one call draws `num_images`.
        components: per run; the denoiser runs once a step.
        images_per_second: at the median call.
        images_per_second_interval: from that of the median.
        time_to_first_step: from the call to the end of the first denoising step.
        png_ms: encoding the pictures of a call as PNG, median; it is in no other figure. None without Pillow.
        rounds_ms: every call and, by component, every run in it, (rounds, runs) each.
    """

    subject: Subject
    dtype: str
    devices: Mapping[str, str]
    load_ms: Mapping[str, float]
    first_image_ms: float
    end_to_end: Latency
    components: Mapping[str, Latency]
    images_per_second: float
    images_per_second_interval: Interval
    time_to_first_step: Latency
    outside: Outside
    png_ms: float | None
    memory: Memory
    energy: Energy
    rounds_ms: Mapping[str, tuple[tuple[float, ...], ...]]


@dataclass(frozen=True, kw_only=True)
class GpuState:
    """A GPU that a candidate ran on, before the rounds and after them."""

    name: str
    before: GpuVitals | None
    after: GpuVitals | None


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What it was measured under.

    Attributes:
        cores: that this process may use.
        load_average: of the last minute, before anything was loaded.
        others_cores: that other programs kept busy while the rounds ran, on the mean.
        cpu_before: before the rounds.
        cpu_after: after them.
        driver: of the GPUs.
        gpus: that candidates ran on, by number.
    """

    cores: int
    load_average: float | None
    others_cores: float | None
    cpu_before: CpuVitals
    cpu_after: CpuVitals
    driver: str | None
    gpus: Mapping[str, GpuState]


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """What `bench` measured.

    Attributes:
        request: what each call drew.
        iterations: rounds that count.
        warmup: rounds before them.
        threads: of the host that were allowed; None for all.
        candidates: by name, in the order given.
        baseline: name of the one that the others are compared with.
        comparisons: of each other one with it, "end_to_end" and by component, from the sums of each round.
        host_peak_bytes: largest resident memory of this process so far, with everything it has loaded; None where
            the system does not tell.
        machine: and the versions of what ran.
        notes: what has to be known to read the figures.
    """

    request: Request
    iterations: int
    warmup: int
    threads: int | None
    candidates: Mapping[str, Candidate]
    baseline: str
    comparisons: Mapping[str, Mapping[str, Comparison]]
    host_peak_bytes: int | None
    machine: Machine
    conditions: Conditions
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        report: dict[str, Any] = encode(self)
        return report

    @classmethod
    def from_json(cls, data: object, *, source: str) -> "BenchReport":
        """What `to_json` gave; `source` names it in messages.

        Raises:
            BundleError: it is something else.
        """
        return decode(cls, data, source=source)
