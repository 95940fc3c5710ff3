"""What the machine's facts mean: system, processor, room, driver and GPUs."""

from collections.abc import Iterator
from typing import Any, Final

from obsdiff_export.doctor.checks import Check, Status
from obsdiff_export.doctor.examination import Facts
from obsdiff_export.doctor.host import Host
from obsdiff_runtime.gpus import sparse_types

_MAIN_JOB_BYTES: Final = 0.8e9
"""Peak of the main job on the shipped pipeline, as the README measured it."""
_BUILD: Final = "a transformer of 446 M parameters took 3.0 GB to build in fp16 with TensorRT-RTX 1.7"
_BUILD_BYTES: Final = 3.0e9
_LITTLE_DISK_BYTES: Final = 2**30
_HIDDEN: Final = ("HF_ENDPOINT",)
"""Settings that may name a host."""
_OURS: Final = ("OMP_WAIT_POLICY", "PASSIVE")
"""What the command line sets where nobody did."""


def check_machine(facts: Facts) -> Iterator[Check]:
    """System, processor, memory, disks."""
    host = facts.host
    yield Check(group="machine", name="system", status="ok", finding=_system(host))
    yield _processor(host)
    yield _memory(facts)
    for name, disk in host.disks.items():
        if name == "cache" and not facts.prunes:
            continue
        free = f"{_gib(disk.free_bytes)} free in {disk.folder}"
        if not disk.writable:
            where = "choose another folder" if name != "temp" else "set TMPDIR to another folder"
            yield Check(
                group="machine",
                name=f"disk, {name}",
                status="problem",
                finding=f"no file can be made in {disk.folder}",
                advice=where,
                blocks=name in ("output", "temp"),
            )
        else:
            little = disk.free_bytes < _LITTLE_DISK_BYTES
            advice = f"free some{_planned(facts, 'a model takes')}" if little else ""
            status: Status = "warn" if little else "ok"
            yield Check(group="machine", name=f"disk, {name}", status=status, finding=free, advice=advice)
    shown = {name: "set" if name in _HIDDEN else value for name, value in host.settings.items()}
    settings = [f"{name}={value}" for name, value in shown.items() if (name, value) != _OURS]
    if facts.prunes:
        settings.append(f"a token for the Hub is {'set' if host.hub_token else 'not set'}")
    yield Check(group="machine", name="settings", status="ok", finding="; ".join(settings))
    if host.settings.get("NVIDIA_TF32_OVERRIDE") == "1":
        yield Check(
            group="machine",
            name="TF32",
            status="warn",
            finding="NVIDIA_TF32_OVERRIDE=1 rounds float32 products to 10 bits behind every library's back",
            advice="unset it",
        )


def check_gpus(facts: Facts) -> Iterator[Check]:
    """Driver, GPUs, sparse tensor cores."""
    yield _driver(facts)
    gpus = facts.gpus
    for index, gpu in enumerate(gpus):
        yield _gpu(index, gpu)
    kinds = {gpu["capability"] for gpu in gpus}
    if len(kinds) > 1:
        yield Check(
            group="GPU",
            name="mixed GPUs",
            status="warn",
            finding=f"GPUs of compute capabilities {', '.join(sorted(kinds))}: engines are built for GPU 0 and run on "
            "its kind only",
            advice="choose one with CUDA_VISIBLE_DEVICES",
        )
    if gpus:
        yield _sparse(gpus[0]["capability"])


def _system(host: Host) -> str:
    where = [host.system, f"Python {host.python}"]
    if host.jetson is not None:
        jetpack = f"JetPack {host.jetson.jetpack}" if host.jetson.jetpack else "JetPack unknown"
        where.append(f"{host.jetson.model or 'Jetson'}, L4T {host.jetson.l4t} ({jetpack})")
    if host.container:
        where.append(f"in a container ({host.container})")
    if host.wsl:
        where.append("in WSL")
    if host.cuda_toolkit:
        where.append(f"CUDA toolkit {host.cuda_toolkit}")
    return "; ".join(where)


def _processor(host: Host) -> Check:
    finding = f"{host.cpu}, {host.cores} cores to use"
    usable = min(host.cores, max(1, round(host.quota))) if host.quota else host.cores
    asked = host.settings.get("OMP_NUM_THREADS", "")
    threads = int(asked) if asked.isdigit() else host.cores
    if threads > usable:
        time = f" in a container with {host.quota:.1f} cores' time" if host.quota and usable < host.cores else ""
        return Check(
            group="machine",
            name="processor",
            status="warn",
            finding=f"{finding}{time}; {threads} threads would be started, and wait for each other",
            advice=f"set OMP_NUM_THREADS={usable}",
        )
    return Check(group="machine", name="processor", status="ok", finding=finding)


def _planned(facts: Facts, what: str) -> str:
    """Where to read what a model needs; "" where the command that says so is another's."""
    return f"; `obsdiff plan MODEL` says what {what}" if facts.prunes else ""


def _memory(facts: Facts) -> Check:
    host = facts.host
    finding = f"{_gib(host.available_bytes)} of {_gib(host.memory_bytes)} available"
    if facts.prunes and host.available_bytes < _MAIN_JOB_BYTES:
        return Check(
            group="machine",
            name="memory",
            status="problem",
            finding=f"{finding}; the main job takes 0.8 GB on the pipeline shipped inside",
            advice="close other programs",
            blocks=True,
        )
    if host.available_bytes < _BUILD_BYTES:
        return Check(
            group="machine",
            name="memory",
            status="warn",
            finding=f"{finding}; {_BUILD}",
            advice=f"build large engines elsewhere{_planned(facts, 'pruning takes')}",
        )
    return Check(group="machine", name="memory", status="ok", finding=finding)


def _driver(facts: Facts) -> Check:
    outcome, host = facts.libraries["gpus"], facts.host
    said = outcome.value or {}
    version = f"driver {said['driver']}" if said.get("driver") else "driver of unknown version"
    if said.get("devices"):
        served = f", serves CUDA up to {said['cuda']}" if said["cuda"] else ""
        return Check(group="GPU", name="driver", status="ok", finding=f"{version}{served}")
    why = outcome.failure or said["failure"]
    if said and not said["driver"] and not said["cuda"]:
        advice = "install the NVIDIA driver in Windows; WSL takes it from there" if host.wsl else ""
        return Check(group="GPU", name="driver", status="not here", finding=why, advice=advice)
    if host.container:
        advice = "start the container with the GPU (docker: --gpus all; Jetson: --runtime nvidia)"
    elif "CUDA_VISIBLE_DEVICES" in host.settings:
        advice = f"is CUDA_VISIBLE_DEVICES={host.settings['CUDA_VISIBLE_DEVICES']} right?"
    else:
        advice = "does nvidia-smi list it? After a driver update, reboot"
    return Check(group="GPU", name="driver", status="problem", finding=f"{version}: {why}", advice=advice)


def _gpu(index: int, gpu: dict[str, Any]) -> Check:
    total, free = gpu["memory_bytes"], gpu["free_bytes"]
    shared = " shared with the processor" if gpu["integrated"] else ""
    left = f", {_gib(free)} free" if free is not None else ""
    finding = (
        f"{gpu['name']}, compute capability {gpu['capability']}, {_gib(total)}{shared}{left}, "
        f"{gpu['processors']} multiprocessors"
    )
    if free is not None and free < total / 2 and not gpu["integrated"]:
        advice = "another program holds most of its memory: close it before you build or measure"
        return Check(group="GPU", name=f"GPU {index}", status="warn", finding=finding, advice=advice)
    return Check(group="GPU", name=f"GPU {index}", status="ok", finding=finding)


def _sparse(capability: str) -> Check:
    types = sparse_types(capability)
    if types:
        finding = f"{', '.join(types)}, as NVIDIA documents {capability}; whether 2:4 is faster is to be measured"
        return Check(group="GPU", name="sparse tensor cores", status="ok", finding=finding, advice="`obsdiff whatif`")
    return Check(
        group="GPU",
        name="sparse tensor cores",
        status="not here",
        finding=f"compute capability {capability} is before Ampere (8.0): 2:4 cannot be faster on this GPU",
        advice="use --sparsity structured:0.25, which makes layers narrower",
    )


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
