"""What NVML tells of a GPU: by libraries that are objects, and by one that is compiled, by the C calling convention."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from obsdiff_runtime.nvml import GpuVitals, Nvml

BUS = b"0000:01:00.0"


class Library:
    """An NVML with one GPU that has drawn `energy_mj`; `lacks` functions as old drivers do."""

    def __init__(self, energy_mj: int = 0, lacks: tuple[str, ...] = (), unsupported: tuple[str, ...] = ()) -> None:
        self.energy_mj, self.lacks, self.unsupported = energy_mj, lacks, unsupported
        self.numbers = {
            ("nvmlDeviceGetClockInfo", 1): 1980,
            ("nvmlDeviceGetMaxClockInfo", 1): 2010,
            ("nvmlDeviceGetClockInfo", 2): 2619,
            ("nvmlDeviceGetMaxClockInfo", 2): 2619,
            ("nvmlDeviceGetTemperature", 0): 54,
            ("nvmlDeviceGetPowerUsage",): 412_500,
            ("nvmlDeviceGetEnforcedPowerLimit",): 700_000,
        }

    def __getattr__(self, name: str) -> Any:
        if name in self.lacks or not name.startswith("nvmlDeviceGet"):
            raise AttributeError(name)

        def ask(handle: Any, *arguments: Any) -> int:
            *which, answer = arguments
            if name in self.unsupported:
                return 3  # NVML_ERROR_NOT_SUPPORTED
            total = name == "nvmlDeviceGetTotalEnergyConsumption"
            answer._obj.value = self.energy_mj if total else self.numbers[(name, *which)]
            return 0

        return ask

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, size: int) -> int:  # noqa: N802
        text.value = b"580.65.06"
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus: Any, handle: Any) -> int:  # noqa: N802
        return 0 if bus.value == BUS else 6

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:  # noqa: N802
        memory._obj[:] = (80 * 2**30, 70 * 2**30, 10 * 2**30)
        return 0


def test_clocks_temperature_power_memory_and_energy_are_told_in_their_units() -> None:
    library = Library(energy_mj=12_345)
    gpu = Nvml(library).gpu(BUS)
    assert gpu is not None
    assert gpu.vitals() == GpuVitals(
        sm_mhz=1980,
        sm_max_mhz=2010,
        memory_mhz=2619,
        memory_max_mhz=2619,
        temperature_c=54,
        power_watts=412.5,
        power_limit_watts=700.0,
    )
    assert (gpu.free_bytes(), gpu.used_bytes()) == (70 * 2**30, 10 * 2**30)
    assert gpu.energy_joules() == 12.345
    library.energy_mj += 5000
    assert gpu.energy_joules() == 17.345


def test_what_a_driver_lacks_or_a_gpu_does_not_support_is_unknown_not_zero() -> None:
    lacks = Nvml(Library(lacks=("nvmlDeviceGetTotalEnergyConsumption",))).gpu(BUS)
    refuses = Nvml(Library(unsupported=("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"))).gpu(BUS)
    assert lacks is not None
    assert refuses is not None
    assert lacks.energy_joules() is None
    assert refuses.energy_joules() is None
    assert refuses.vitals().power_watts is None
    assert refuses.vitals().power_limit_watts == 700.0


def test_no_library_and_no_such_gpu_are_no_gpu() -> None:
    assert Nvml(None).gpu(BUS) is None
    assert Nvml(Library()).gpu(b"0000:02:00.0") is None
    assert Nvml(Library()).gpu(b"") is None


SOURCE = r"""
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlSystemGetDriverVersion(char *s, unsigned n) { strncpy(s, "540.4.0", n); return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *b, void **h) { *h = (void *)0x123456789abcdefull; return 0; }
static int known(void *h) { return h == (void *)0x123456789abcdefull; }
int nvmlDeviceGetTotalEnergyConsumption(void *h, unsigned long long *e) { *e = 1ull << 40; return !known(h); }
int nvmlDeviceGetClockInfo(void *h, int t, unsigned *v) { *v = 1000 + t; return !known(h); }
int nvmlDeviceGetTemperature(void *h, int t, unsigned *v) { *v = 40 + t; return !known(h); }
int nvmlDeviceGetPowerUsage(void *h, unsigned *v) { *v = 30500; return !known(h); }
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_compiled_library_is_called_as_c_would(tmp_path: Path) -> None:
    (tmp_path / "nvml.c").write_text(SOURCE)
    library = tmp_path / "nvml.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "nvml.c"], check=True)
    gpu = Nvml(ctypes.CDLL(str(library))).gpu(BUS)
    assert gpu is not None
    assert gpu.energy_joules() == 2**40 / 1000
    found = gpu.vitals()
    assert (found.sm_mhz, found.memory_mhz, found.temperature_c, found.power_watts) == (1001, 1002, 40, 30.5)
    assert (found.sm_max_mhz, found.power_limit_watts, gpu.used_bytes()) == (None, None, None)
