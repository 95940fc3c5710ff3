"""The NVIDIA GPUs of this machine, asked of the driver itself: no torch, no vendor package.

The CUDA driver API tells what programs see; NVML, where it is there, adds the driver's version and what memory is free.
"""

import ctypes
import functools
import sys
from dataclasses import dataclass
from typing import Any, Final

from obsdiff_runtime import nvml
from obsdiff_runtime.nvml import Nvml

_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _PROCESSORS, _INTEGRATED = 75, 76, 16, 18
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR, _MULTIPROCESSOR_COUNT and _INTEGRATED of cuda.h."""

_TEXT_BYTES: Final = 256
_SPARSE_TYPES: Final = ("tf32", "fp16", "bf16", "int8")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One visible GPU.

    Attributes:
        name: the vendor's ("NVIDIA H100 80GB HBM3").
        capability: compute capability ("9.0").
        memory_bytes: of the GPU, or shared with the host where it is `integrated`.
        free_bytes: now; None where NVML does not say.
        processors: streaming multiprocessors.
        integrated: it is part of the host's chip, as on a Jetson.
        bus: its PCI bus id, by which NVML knows it; "" where the driver does not say.
    """

    name: str
    capability: str
    memory_bytes: int
    free_bytes: int | None
    processors: int
    integrated: bool
    bus: str = ""


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """What the driver says.

    Attributes:
        driver: its version ("580.65.06"); None where nothing tells it.
        cuda: the newest CUDA that it serves ("13.0"); None without a driver.
        devices: the visible GPUs, in CUDA's order.
        failure: why there are none, "" where there are.
    """

    driver: str | None
    cuda: str | None
    devices: tuple[Gpu, ...]
    failure: str


@functools.cache
def find_gpus() -> Gpus:
    """The GPUs that are visible, asked once in a process."""
    return _read(nvml.library("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"), nvml.load())


def read_gpus(cuda: Any | None, management: Any | None) -> Gpus:
    """The same, from libraries that are loaded already; None for one that is absent."""
    return _read(cuda, Nvml(management))


def _read(cuda: Any | None, memory: Nvml) -> Gpus:
    if cuda is None:
        return Gpus(driver=memory.driver, cuda=None, devices=(), failure="no CUDA driver is installed (libcuda.so.1)")
    version, count = ctypes.c_int(), ctypes.c_int()
    newest = None if cuda.cuDriverGetVersion(ctypes.byref(version)) else _dotted(version.value)
    try:
        _check(cuda, cuda.cuInit(0), "the driver does not start")
        _check(cuda, cuda.cuDeviceGetCount(ctypes.byref(count)), "the driver counts no GPUs")
        devices = tuple(_device(cuda, memory, index) for index in range(count.value))
    except OSError as error:
        return Gpus(driver=memory.driver, cuda=newest, devices=(), failure=str(error))
    failure = "" if devices else "the driver sees no GPU"
    return Gpus(driver=memory.driver, cuda=newest, devices=devices, failure=failure)


def sparse_types(capability: str) -> tuple[str, ...]:
    """Number formats of a GPU's sparse (2:4) tensor cores, by NVIDIA's architecture papers; () before Ampere."""
    version = tuple(int(part) for part in capability.split("."))
    if version < (8, 0):
        return ()
    return (*_SPARSE_TYPES, "fp8") if version >= (8, 9) else _SPARSE_TYPES


def _device(cuda: Any, memory: Nvml, index: int) -> Gpu:
    device, total = ctypes.c_int(), ctypes.c_size_t()
    name, bus = ctypes.create_string_buffer(_TEXT_BYTES), ctypes.create_string_buffer(_TEXT_BYTES)
    where = f"GPU {index} does not answer"
    _check(cuda, cuda.cuDeviceGet(ctypes.byref(device), index), where)
    _check(cuda, cuda.cuDeviceGetName(name, _TEXT_BYTES, device), where)
    _check(cuda, cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device), where)
    cuda.cuDeviceGetPCIBusId(bus, _TEXT_BYTES, device)
    known = memory.gpu(bus.value)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        _check(cuda, cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device), where)
        return value.value

    return Gpu(
        name=name.value.decode(errors="replace"),
        capability=f"{attribute(_CAPABILITY_MAJOR)}.{attribute(_CAPABILITY_MINOR)}",
        memory_bytes=total.value,
        free_bytes=None if known is None else known.free_bytes(),
        processors=attribute(_PROCESSORS),
        integrated=bool(attribute(_INTEGRATED)),
        bus=bus.value.decode(errors="replace"),
    )


def _check(cuda: Any, code: int, what: str) -> None:
    """Raises OSError with the driver's own words."""
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(text))
        raise OSError(f"{what}: {(text.value or b'error').decode(errors='replace')} (CUDA error {code})")


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
