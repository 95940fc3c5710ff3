"""Timing by turns: what is compared runs interleaved, and a difference within noise is called that.

Each round runs every candidate once, in alternating order, so that a machine that warms up or gets busy does so for all
of them. A ratio is formed in each round; its median has a distribution-free confidence interval.
"""

import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np

from obsdiff_runtime.backends import backend as find_backend
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.quantiles import Interval, interval
from obsdiff_runtime.version import __version__

LEAST: Final = 0.03
"""A difference no larger counts as none, however sure the timing is of it: of two sessions of one graph that ONNX
Runtime opens on a CPU the one opened later is 2 % faster, whichever is named first, and builds of one network by
TensorRT differed by 3.5 % on a Jetson board."""

Outcome = Literal["faster", "slower", "no different", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Of one thing that ran `count` times; the figures that trtexec prints, and how sure the percentiles are."""

    count: int
    min_ms: float
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    p50_interval_ms: Interval
    p90_interval_ms: Interval
    p99_interval_ms: Interval


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How much faster `name` is than `against`.

    Attributes:
        speedup: median over the rounds of the time of `against` divided by that of `name`.
        low, high: 95 % confidence interval of that median; None where the rounds are too few for one.
        verdict: the same in words.
    """

    name: str
    against: str
    rounds: int
    speedup: float
    low: float | None
    high: float | None
    verdict: str

    @property
    def outcome(self) -> Outcome:
        """Faster or slower only where the interval leaves 1 out, and by more than LEAST."""
        if self.low is None or self.high is None:
            return "unknown"
        if self.low > 1 and self.speedup > 1 + LEAST:
            return "faster"
        return "slower" if self.high < 1 and self.speedup < 1 / (1 + LEAST) else "no different"


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Latencies by name, and every later candidate compared with the first."""

    latencies: Mapping[str, Latency]
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True, kw_only=True)
class Machine:
    cpu: str
    logical_cores: int
    system: str
    versions: Mapping[str, str]


def time_interleaved(
    callables: Mapping[str, Callable[[], object]],
    iterations: int,
    warmup: int = 2,
    progress: Progress = silent,
) -> Timings:
    """Times callables in alternating order.

    Args:
        callables: by name; the first is what the others are compared with.
        iterations: rounds that count; a round calls each once.
        warmup: rounds before that do not.
        progress: told of stage "bench" after each round.

    Raises:
        ConfigError: nothing to time.
    """
    seconds = interleaved(callables, iterations, warmup, progress)
    first, *others = seconds
    return Timings(
        latencies={name: latency(values) for name, values in seconds.items()},
        comparisons=tuple(compare(name, seconds[name], first, seconds[first]) for name in others),
    )


def machine(versions: Mapping[str, str] | None = None) -> Machine:
    """What the measurement ran on; `versions` of what executed, ONNX Runtime's if None."""
    return Machine(
        cpu=_cpu_model(),
        logical_cores=os.cpu_count() or 1,
        system=platform.platform(),
        versions={
            "obsdiff_runtime": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            **(find_backend("onnxruntime").versions() if versions is None else versions),
        },
    )


def host_peak_bytes() -> int | None:
    """Largest resident memory this process ever had."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def interleaved(
    callables: Mapping[str, Callable[[], object]], iterations: int, warmup: int, progress: Progress
) -> dict[str, list[float]]:
    """Seconds by name, (iterations,) each; round i of each name belongs together."""
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    for index, name in turns(callables, iterations, warmup, progress):
        start = time.perf_counter()
        callables[name]()
        took = time.perf_counter() - start
        if index >= 0:
            seconds[name].append(took)
    return seconds


def check_rounds(iterations: int, warmup: int) -> None:
    """Raises ConfigError for a number of rounds that cannot be."""
    if iterations < 1 or warmup < 0:
        raise ConfigError(f"iterations should be at least 1 and warmup at least 0, not {iterations} and {warmup}")


def turns(names: Iterable[str], iterations: int, warmup: int, progress: Progress) -> Iterator[tuple[int, str]]:
    """Whose turn it is, with the number of the round: below 0 where it is warm-up.

    Args:
        names: of what takes turns; the order is reversed in every other round.
        iterations: rounds that count.
        warmup: rounds before that do not.
        progress: told of stage "bench" after each round.

    Raises:
        ConfigError: nothing to time.
    """
    order = list(names)
    if not order:
        raise ConfigError("there is nothing to time")
    check_rounds(iterations, warmup)
    for index in range(-warmup, iterations):
        for name in order if index % 2 == 0 else reversed(order):
            yield index, name
        progress("bench", index + warmup + 1, iterations + warmup)


def latency(seconds: Sequence[float], *, rounds: int | None = None) -> Latency:
    """The figures of some runs; `rounds` in which they were measured, one each if None."""
    ms = np.asarray(seconds) * 1000
    p50, p90, p95, p99 = (float(value) for value in np.percentile(ms, [50, 90, 95, 99]))
    intervals = [interval(ms.tolist(), share, rounds=rounds) for share in (0.5, 0.9, 0.99)]
    return Latency(
        count=len(ms),
        min_ms=float(ms.min()),
        mean_ms=float(ms.mean()),
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        max_ms=float(ms.max()),
        p50_interval_ms=intervals[0],
        p90_interval_ms=intervals[1],
        p99_interval_ms=intervals[2],
    )


def compare(name: str, seconds: Sequence[float], against: str, base: Sequence[float]) -> Comparison:
    """How much faster `name` is, from the ratio in each round."""
    ratios = (np.asarray(base) / np.asarray(seconds)).tolist()
    speedup = float(np.median(ratios))
    found = interval(ratios, 0.5)
    made = Comparison(
        name=name, against=against, rounds=len(ratios), speedup=speedup, low=found.low, high=found.high, verdict=""
    )
    return replace(made, verdict=_verdict(made))


def _verdict(found: Comparison) -> str:
    ratio = f"{found.speedup:.2f}x"
    if found.low is None or found.high is None:
        return f"{found.name} against {found.against}: {ratio}, from too few rounds to tell it from noise"
    span = f"95 % in {found.low:.2f} .. {found.high:.2f}"
    if found.outcome == "no different":
        return f"{found.name} against {found.against}: no difference beyond noise ({ratio}, {span})"
    return f"{found.name} is {found.outcome} than {found.against}: {ratio} ({span})"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
