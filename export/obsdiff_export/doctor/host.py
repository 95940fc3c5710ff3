"""The machine as far as files, the environment and the operating system tell: nothing is loaded, nothing can crash."""

import os
import platform
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from obsdiff_export.caches import default_folder
from obsdiff_export.resources import existing_folder, free_bytes
from obsdiff_runtime.vitals import text_of, usable_cores

SETTINGS: Final = (
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE"),
    *(
        "LD_LIBRARY_PATH",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HF_ENDPOINT",
        "TMPDIR",
        "PYTHONPATH",
        "OBSDIFF_CACHE",
    ),
)
"""Environment variables that change what a run does."""


@dataclass(frozen=True, kw_only=True)
class Jetson:
    """A Jetson, by its files.

    Attributes:
        model: of the board; "" where the device tree does not say.
        l4t: release of Linux for Tegra ("36.4.0").
        jetpack: major version that this release belongs to; None where it is not known.
        tensorrt_pythons: Python versions that JetPack's TensorRT is installed for ("3.10").
    """

    model: str
    l4t: str
    jetpack: int | None
    tensorrt_pythons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Room in one folder.

    Attributes:
        folder: where; its nearest parent that exists was asked.
        free_bytes: there.
        writable: a file could be made.
    """

    folder: str
    free_bytes: int
    writable: bool


@dataclass(frozen=True, kw_only=True)
class Host:
    """Attributes:
    system: of the kernel and C library; machine: architecture; python: version; cpu: model.
    cores: that this process may use; quota: of processor time, in cores, None where none is set.
    memory_bytes, available_bytes: of the machine, or of the control group where that is less.
    cuda_toolkit: version in /usr/local/cuda; None where none is there.
    container: its kind, "" outside of one; wsl: inside Windows.
    jetson: None on other machines.
    settings: environment variables that matter and are set.
    hub_token: whether one is set or stored.
    disks: "output", "cache" (of the Hub), "engines" (the cache of built ones) and "temp".
    """

    system: str
    machine: str
    python: str
    cpu: str
    cores: int
    quota: float | None
    memory_bytes: int
    available_bytes: int
    cuda_toolkit: str | None
    container: str
    wsl: bool
    jetson: Jetson | None
    settings: Mapping[str, str]
    hub_token: bool
    disks: Mapping[str, Disk]


def read_host(output: Path, *, root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> Host:
    """Looks around; `output` is where results would go, `root` where the system's files lie."""
    memory = psutil.virtual_memory()
    limit, used = (_number(root / "sys/fs/cgroup" / name) for name in ("memory.max", "memory.current"))
    hub = hub_folder(environment)
    return Host(
        system=platform.platform(),
        machine=platform.machine(),
        python=platform.python_version(),
        cpu=_processor(root),
        cores=usable_cores(),
        quota=_quota(root),
        memory_bytes=min(memory.total, limit or memory.total),
        available_bytes=min(memory.available, limit - (used or 0) if limit else memory.available),
        cuda_toolkit=_toolkit(root),
        container=_container(root, environment),
        wsl="microsoft" in text_of(root / "proc/version").lower(),
        jetson=_jetson(root),
        settings={name: environment[name] for name in SETTINGS if environment.get(name)},
        hub_token=bool(environment.get("HF_TOKEN")) or (hub.parent / "token").is_file(),
        disks={
            "output": _disk(output),
            "cache": _disk(hub),
            "engines": _disk(default_folder()),
            "temp": _disk(Path(tempfile.gettempdir())),
        },
    )


def hub_folder(environment: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps what it downloads."""
    if environment.get("HF_HUB_CACHE"):
        return Path(environment["HF_HUB_CACHE"])
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(environment.get("HF_HOME") or cache / "huggingface") / "hub"


def _disk(folder: Path) -> Disk:
    try:
        with tempfile.TemporaryFile(dir=existing_folder(folder)):
            writable = True
    except OSError:
        writable = False
    return Disk(folder=str(folder.absolute()), free_bytes=free_bytes(folder), writable=writable)


def _processor(root: Path) -> str:
    """The model's name; Arm's cores have none."""
    found = re.search(r"^model name\s*:\s*(.+)$", text_of(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _quota(root: Path) -> float | None:
    """Cores' worth of time that the control group may use."""
    share, _, period = text_of(root / "sys/fs/cgroup/cpu.max").partition(" ")
    return int(share) / int(period) if share.isdigit() and period.strip().isdigit() else None


def _container(root: Path, environment: Mapping[str, str]) -> str:
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    if environment.get("KUBERNETES_SERVICE_HOST"):
        return "kubernetes"
    return environment.get("container", "")


def _jetson(root: Path) -> Jetson | None:
    release = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text_of(root / "etc/nv_tegra_release"))
    if release is None:
        return None
    major = int(release[1])
    pythons = (root / "usr/lib").glob("python3*/dist-packages/tensorrt/__init__.py")
    return Jetson(
        model=text_of(root / "proc/device-tree/model").strip("\0\n "),
        l4t=f"{major}.{release[2]}",
        jetpack={32: 4, 34: 5, 35: 5, 36: 6, 38: 7}.get(major),
        tensorrt_pythons=tuple(sorted(path.parents[2].name.removeprefix("python") for path in pythons)),
    )


def _toolkit(root: Path) -> str | None:
    found = re.search(r'"cuda"\s*:\s*{[^}]*"version"\s*:\s*"([^"]+)"', text_of(root / "usr/local/cuda/version.json"))
    return found[1] if found else None


def _number(path: Path) -> int | None:
    text = text_of(path).strip()
    return int(text) if text.isdigit() else None
