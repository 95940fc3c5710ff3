"""Times what runs on a GPU, by CUDA events; on a CPU, to try the benchmark, by the host's clock.

A window is as many calls as fill it: the launches of one call take longer than small kernels do, those of many
overlap with them. Candidates take turns, window by window. Operands stay in the GPU's cache where they fit.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from obsdiff_export import semi_structured
from obsdiff_runtime.errors import CompatibilityError
from obsdiff_runtime.timing import compare

Call = Callable[[], object]

WINDOW_SECONDS = 2e-3
FEWEST, MOST = 9, 60


def times(candidates: Mapping[str, Call], device: str, seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each window, by name; window i of every name belongs together.

    Args:
        candidates: what to time.
        device: "cuda" or "cpu".
        seconds: to spend; at least FEWEST rounds are run, at most MOST.
    """
    with torch.no_grad():
        calls = {name: _calls(call, device) for name, call in candidates.items()}
        first = sum(_window(call, calls[name], device) * calls[name] for name, call in candidates.items())
        rounds = int(min(max(seconds / max(first, 1e-9), FEWEST), MOST))
        found: dict[str, list[float]] = {name: [] for name in candidates}
        for index in range(-1, rounds):
            names = list(candidates) if index % 2 else list(candidates)[::-1]
            for name in names:
                took = _window(candidates[name], calls[name], device)
                if index >= 0:
                    found[name].append(took)
    return found


def figures(found: Mapping[str, Sequence[float]], against: str, unit: str = "ms") -> dict[str, float]:
    """Medians of each, and how much faster each other is than `against`: "x_ms", "x_speedup", "x_low", "x_high"."""
    scale = {"ms": 1e3, "us": 1e6}[unit]
    values = {f"{name}_{unit}": float(np.median(seconds)) * scale for name, seconds in found.items()}
    for name, seconds in found.items():
        if name == against or against not in found:
            continue
        comparison = compare(name, seconds, against, found[against])
        values[f"{name}_speedup"] = comparison.speedup
        if comparison.low is not None and comparison.high is not None:
            values |= {f"{name}_low": comparison.low, f"{name}_high": comparison.high}
    return values


def graphed(call: Call, device: str) -> Call:
    """The same work as one CUDA graph, whose memory is fixed.

    Raises:
        CompatibilityError: there is no GPU.
    """
    if device != "cuda":
        raise CompatibilityError("a CUDA graph needs a GPU")
    return semi_structured.graphed(call)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _calls(call: Call, device: str) -> int:
    for _ in range(2):
        call()
    wait(device)
    started = time.perf_counter()
    for _ in range(3):
        call()
    wait(device)
    return max(1, min(int(WINDOW_SECONDS / max((time.perf_counter() - started) / 3, 1e-7)), 1000))


def _window(call: Call, calls: int, device: str) -> float:
    """Seconds per call."""
    if device != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - started) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls
