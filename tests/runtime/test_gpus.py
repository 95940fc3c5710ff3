"""What the driver says, with drivers that are objects; and by the C calling convention, with one that is compiled."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from obsdiff_runtime.gpus import read_gpus, sparse_types

ORIN = {75: 8, 76: 7, 16: 16, 18: 1}
H100 = {75: 9, 76: 0, 16: 132, 18: 0}


class Driver:
    """libcuda with these GPUs: attribute tables."""

    def __init__(self, *gpus: dict[int, int], init: int = 0, version: int = 13000) -> None:
        self.gpus, self.init, self.version = gpus, init, version

    def cuDriverGetVersion(self, value: Any) -> int:  # noqa: N802
        value._obj.value = self.version
        return 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.init

    def cuDeviceGetCount(self, value: Any) -> int:  # noqa: N802
        value._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, text: Any, size: int, device: Any) -> int:  # noqa: N802
        text.value = f"GPU {device.value}".encode()
        return 0

    def cuDeviceTotalMem_v2(self, value: Any, device: Any) -> int:  # noqa: N802
        value._obj.value = 80 * 2**30
        return 0

    def cuDeviceGetPCIBusId(self, text: Any, size: int, device: Any) -> int:  # noqa: N802
        text.value = b"0000:01:00.0"
        return 0

    def cuDeviceGetAttribute(self, value: Any, number: int, device: Any) -> int:  # noqa: N802
        value._obj.value = self.gpus[device.value][number]
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> int:  # noqa: N802
        text._obj.value = b"no CUDA-capable device is detected"
        return 0


class Nvml:
    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, size: int) -> int:  # noqa: N802
        text.value = b"580.65.06"
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus: Any, handle: Any) -> int:  # noqa: N802
        return 0 if bus.value == b"0000:01:00.0" else 1

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:  # noqa: N802
        memory._obj[:] = (80 * 2**30, 70 * 2**30, 10 * 2**30)
        return 0


def test_every_visible_gpu_is_described() -> None:
    gpus = read_gpus(Driver(H100, ORIN), Nvml())
    assert (gpus.driver, gpus.cuda, gpus.failure) == ("580.65.06", "13.0", "")
    assert [(gpu.name, gpu.capability, gpu.processors, gpu.integrated) for gpu in gpus.devices] == [
        ("GPU 0", "9.0", 132, False),
        ("GPU 1", "8.7", 16, True),
    ]
    assert {(gpu.memory_bytes, gpu.free_bytes) for gpu in gpus.devices} == {(80 * 2**30, 70 * 2**30)}


def test_without_nvml_free_memory_is_unknown_not_zero() -> None:
    assert read_gpus(Driver(H100), None).devices[0].free_bytes is None


def test_a_driver_that_does_not_start_gives_its_own_words() -> None:
    gpus = read_gpus(Driver(H100, init=100), None)
    assert gpus.devices == ()
    assert gpus.failure == "the driver does not start: no CUDA-capable device is detected (CUDA error 100)"
    assert gpus.cuda == "13.0"


def test_no_driver_and_no_gpu_are_told_apart() -> None:
    assert "no CUDA driver" in read_gpus(None, None).failure
    assert read_gpus(Driver(), None).failure == "the driver sees no GPU"


def test_sparse_tensor_cores_begin_with_ampere_and_know_fp8_from_ada_on() -> None:
    assert sparse_types("7.5") == ()
    assert sparse_types("8.7") == ("tf32", "fp16", "bf16", "int8")
    assert [capability for capability in ("8.6", "8.9", "9.0", "12.0") if "fp8" in sparse_types(capability)] == [
        "8.9",
        "9.0",
        "12.0",
    ]


SOURCE = r"""
#include <stddef.h>
#include <string.h>
int cuInit(unsigned f) { return 0; }
int cuDriverGetVersion(int *v) { *v = 12060; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetName(char *s, int n, int d) { strncpy(s, "NVIDIA Orin", n); return 0; }
int cuDeviceTotalMem_v2(size_t *b, int d) { *b = 64ull << 30; return 0; }
int cuDeviceGetPCIBusId(char *s, int n, int d) { strncpy(s, "0000:00:00.0", n); return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 8 : a == 76 ? 7 : a == 16 ? 16 : 1; return 0; }
int cuGetErrorString(int c, const char **s) { *s = "?"; return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlSystemGetDriverVersion(char *s, unsigned n) { strncpy(s, "540.4.0", n); return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *b, void **h) { *h = (void *)0x123456789abcdefull; return 0; }
int nvmlDeviceGetMemoryInfo(void *h, unsigned long long *m)
{ if (h != (void *)0x123456789abcdefull) return 1; m[0] = 64ull << 30; m[1] = 60ull << 30; m[2] = 0; return 0; }
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_compiled_driver_is_called_as_c_would(tmp_path: Path) -> None:
    (tmp_path / "driver.c").write_text(SOURCE)
    library = tmp_path / "driver.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True)
    driver = ctypes.CDLL(str(library))
    gpus = read_gpus(driver, driver)
    (gpu,) = gpus.devices
    assert (gpus.driver, gpus.cuda) == ("540.4.0", "12.6")
    assert (gpu.name, gpu.capability, gpu.memory_bytes, gpu.free_bytes) == (
        "NVIDIA Orin", "8.7", 64 << 30, 60 << 30,
    )  # fmt: skip
