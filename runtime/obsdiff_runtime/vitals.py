"""How the machine is while it is measured: what other programs take of it, clocks, temperature, power, memory.

Read from /proc and /sys, and from NVML; what this system does not tell is None.
"""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from obsdiff_runtime import nvml
from obsdiff_runtime.gpus import find_gpus
from obsdiff_runtime.nvml import NvmlGpu

_BUSY_FIELDS: Final = (0, 1, 2, 5, 6, 7)
"""user, nice, system, irq, softirq and steal in the first line of /proc/stat; the others are idle or counted twice."""


@dataclass(frozen=True, kw_only=True)
class CpuTime:
    """Seconds that all cores together have worked, by one moment.

    Attributes:
        at: the moment, in seconds.
        busy: for any program, or for another guest of the same host.
        own: for this process.
    """

    at: float
    busy: float
    own: float


@dataclass(frozen=True, kw_only=True)
class CpuVitals:
    """How the CPU is, at one moment.

    Attributes:
        mhz: clock, mean over the cores.
        max_mhz: the fastest they go.
        governor: what chooses the clock ("performance").
    """

    mhz: float | None
    max_mhz: float | None
    governor: str | None


def text_of(path: Path) -> str:
    """What a file of the system holds; "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float | None:
    """Programs that ran or wanted to, mean over the last minute."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def cpu_time(root: Path = Path("/")) -> CpuTime | None:
    """Now; `root` is where /proc is looked for."""
    try:
        fields = (root / "proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return None
    own = os.times()
    busy = sum(int(fields[index]) for index in _BUSY_FIELDS) / ticks
    return CpuTime(at=time.monotonic(), busy=busy, own=own.user + own.system)


def others_cores(before: CpuTime | None, after: CpuTime | None) -> float | None:
    """Cores that other programs kept busy between two moments, on the mean."""
    if before is None or after is None or after.at <= before.at:
        return None
    return max((after.busy - before.busy) - (after.own - before.own), 0.0) / (after.at - before.at)


def cpu_vitals(root: Path = Path("/")) -> CpuVitals:
    """Now; `root` is where /proc and /sys are looked for."""
    cores = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"))
    clocks = [clock for core in cores if (clock := _number(core / "scaling_cur_freq")) is not None]
    if clocks:
        mhz: float | None = sum(clocks) / len(clocks) / 1000
    else:
        said = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text_of(root / "proc/cpuinfo"), re.MULTILINE)
        mhz = sum(map(float, said)) / len(said) if said else None
    fastest = [clock for core in cores if (clock := _number(core / "cpuinfo_max_freq")) is not None]
    return CpuVitals(
        mhz=mhz,
        max_mhz=max(fastest) / 1000 if fastest else None,
        governor=text_of(cores[0] / "scaling_governor").strip() or None if cores else None,
    )


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM."""
    fields = text_of(Path("/proc/self/statm")).split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if fields else None


def managed_gpu(index: int) -> NvmlGpu | None:
    """NVML's view of the GPU with this number in CUDA's order; None where it has none."""
    devices = find_gpus().devices
    return nvml.load().gpu(devices[index].bus.encode()) if index < len(devices) else None


@dataclass(frozen=True, kw_only=True)
class Sensors:
    """Where a benchmark reads the machine; a test gives others."""

    gpu: Callable[[int], NvmlGpu | None] = managed_gpu
    resident_bytes: Callable[[], int | None] = resident_bytes
    cpu_time: Callable[[], CpuTime | None] = cpu_time
    load_average: Callable[[], float | None] = load_average


def _number(path: Path) -> float | None:
    text = text_of(path).strip()
    return float(text) if text.isdigit() else None
