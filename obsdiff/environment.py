"""What this machine is, for whoever reads a number that was measured on it."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import psutil
import torch

from obsdiff.measurements import Environment

PACKAGES: Final = (
    *("torch", "diffusers", "transformers", "safetensors", "numpy", "onnx", "onnxscript"),
    *("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "polygraphy"),
)


def environment(*, threads: int) -> Environment:
    """The machine as it is now; `threads` are those of the measured sessions."""
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=threads,
        memory_bytes=psutil.virtual_memory().total,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        packages=_versions(),
    )


def _cpu() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
