"""Which of a bundle's engines runs here: a plan fits one builder version and the GPUs it was built for, no others."""

import re
from collections.abc import Sequence
from pathlib import Path

from obsdiff_runtime.bundle import EngineEntry
from obsdiff_runtime.cuda import Device
from obsdiff_runtime.errors import CompatibilityError


def select(
    entries: Sequence[EngineEntry], *, backend: str, version: str, device: Device, component: str, bundle: Path
) -> EngineEntry:
    """The newest engine that was built by this backend, in this version, for this GPU.

    Args:
        entries: of the component, oldest first.
        backend: "tensorrt" or "tensorrt_rtx".
        version: of it that is installed here.
        device: the GPU that is here.
        component: what messages call it.
        bundle: the folder, for the command that rebuilds.

    Raises:
        CompatibilityError: there is none; says what they were built for, what is here and how to build one.
    """
    command = f"build one for this machine: obsdiff build {bundle}"
    if not entries:
        raise CompatibilityError(f"{component} of {bundle} has no engine; {command}")
    reasons = []
    for entry in reversed(entries):
        reason = _obstacle(entry, backend, version, device)
        if not reason:
            return entry
        reasons.append(f"{entry.path} {reason}")
    raise CompatibilityError(
        f"no engine of {component} runs here, with {backend} {version} on {device.name} ({device.capability}): "
        f"{'; '.join(reasons)}; {command}"
    )


def same_version(built: str, here: str) -> bool:
    """Whether a plan of one version loads in the other; "unknown" leaves it to the vendor to refuse.

    Compared as far as both say: packages leave out the build number ("10.3.0") that the library may have ("10.3.0.26").
    """
    ours, theirs = _numbers(built), _numbers(here)
    length = min(len(ours), len(theirs))
    return ours[:length] == theirs[:length]


def _obstacle(entry: EngineEntry, backend: str, version: str, device: Device) -> str:
    """Why it does not run here, "" if it should."""
    if entry.backend != backend:
        return f"is for {entry.backend}"
    targets = ", ".join(entry.targets)
    if entry.targets and device.capability not in entry.targets:
        return f"was built by {entry.backend} {entry.backend_version} for compute capability {targets}"
    if not same_version(entry.backend_version, version):
        return f"was built by {entry.backend} {entry.backend_version}, and a plan loads in the version that built it"
    if entry.refit == "stripped":
        return "holds no weights, and none are put into engines here"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(number) for number in found[0].split(".")) if found else ()
