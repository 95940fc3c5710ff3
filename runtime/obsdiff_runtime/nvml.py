"""What NVIDIA's management library tells of a GPU, through the library itself: no vendor package.

It is absent on older Jetsons and in some containers, and every GPU leaves out something: what is not told is None.
"""

import ctypes
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_TEXT_BYTES: Final = 256
_CLOCK_SM, _CLOCK_MEMORY, _TEMPERATURE_GPU = 1, 2, 0
"""NVML_CLOCK_SM, NVML_CLOCK_MEM and NVML_TEMPERATURE_GPU of nvml.h."""


@dataclass(frozen=True, kw_only=True)
class GpuVitals:
    """How a GPU is, at one moment.

    Attributes:
        sm_mhz: clock of the multiprocessors.
        sm_max_mhz: the fastest they go.
        memory_mhz: clock of the memory.
        memory_max_mhz: the fastest it goes.
        temperature_c: of the chip, in degrees Celsius.
        power_watts: drawn now.
        power_limit_watts: that is enforced.
    """

    sm_mhz: int | None
    sm_max_mhz: int | None
    memory_mhz: int | None
    memory_max_mhz: int | None
    temperature_c: int | None
    power_watts: float | None
    power_limit_watts: float | None


class Nvml:
    """The library, as far as it is there.

    Attributes:
        driver: its version ("580.65.06"); the kernel module's, which a Jetson has too, where NVML is absent.
    """

    def __init__(self, library: Any | None) -> None:
        started = library is not None and library.nvmlInit_v2() == 0
        self._library = library if started else None
        self.driver = self._version() or _module_version()

    def gpu(self, bus: bytes) -> "NvmlGpu | None":
        """The GPU with this PCI bus id; None where NVML does not know it."""
        handle = ctypes.c_void_p()
        failed = (
            self._library is None
            or not bus
            or self._library.nvmlDeviceGetHandleByPciBusId_v2(ctypes.c_char_p(bus), ctypes.byref(handle))
        )
        return None if failed else NvmlGpu(self._library, handle)

    def _version(self) -> str | None:
        text = ctypes.create_string_buffer(_TEXT_BYTES)
        if self._library is None or self._library.nvmlSystemGetDriverVersion(text, _TEXT_BYTES):
            return None
        return text.value.decode(errors="replace")


class NvmlGpu:
    """One GPU."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle

    def free_bytes(self) -> int | None:
        """Memory that nobody uses."""
        return self._memory(1)

    def used_bytes(self) -> int | None:
        """Memory that all programs use."""
        return self._memory(2)

    def energy_joules(self) -> float | None:
        """Drawn since the driver was loaded, by whatever ran; Volta and later count it."""
        found = self._ask("nvmlDeviceGetTotalEnergyConsumption", kind=ctypes.c_ulonglong)
        return None if found is None else found / 1000

    def vitals(self) -> GpuVitals:
        power, limit = (self._ask(f"nvmlDeviceGet{name}") for name in ("PowerUsage", "EnforcedPowerLimit"))
        return GpuVitals(
            sm_mhz=self._ask("nvmlDeviceGetClockInfo", _CLOCK_SM),
            sm_max_mhz=self._ask("nvmlDeviceGetMaxClockInfo", _CLOCK_SM),
            memory_mhz=self._ask("nvmlDeviceGetClockInfo", _CLOCK_MEMORY),
            memory_max_mhz=self._ask("nvmlDeviceGetMaxClockInfo", _CLOCK_MEMORY),
            temperature_c=self._ask("nvmlDeviceGetTemperature", _TEMPERATURE_GPU),
            power_watts=None if power is None else power / 1000,
            power_limit_watts=None if limit is None else limit / 1000,
        )

    def _memory(self, index: int) -> int | None:
        memory = (ctypes.c_ulonglong * 3)()  # total, free, used
        function = self._function("nvmlDeviceGetMemoryInfo")
        if function is None or function(self._handle, ctypes.byref(memory)):
            return None
        return int(memory[index])

    def _ask(self, name: str, *which: int, kind: type[Any] = ctypes.c_uint) -> int | None:
        value, function = kind(), self._function(name)
        if function is None or function(self._handle, *which, ctypes.byref(value)):
            return None
        return int(value.value)

    def _function(self, name: str) -> Callable[..., int] | None:
        """None where this version of the library has no such function."""
        found: Callable[..., int] | None = getattr(self._library, name, None)
        return found


@functools.cache
def load() -> Nvml:
    """NVML of this machine, started once in a process."""
    return Nvml(library("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"))


def library(name: str) -> Any | None:
    """A shared library; None where there is none of that name."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _module_version() -> str | None:
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
