"""What this machine can do, and what stands in the way: facts, what they mean, and what to do.

`examination` looks and tries; `machine`, `libraries` and `products` judge; here it comes together.
"""

import datetime
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from obsdiff_export.builders.rtx import KNOWN_TARGETS
from obsdiff_export.doctor.checks import Check
from obsdiff_export.doctor.examination import Facts, examine
from obsdiff_export.doctor.libraries import check_fit, check_libraries
from obsdiff_export.doctor.machine import check_gpus, check_machine
from obsdiff_export.doctor.products import check_products, runs
from obsdiff_runtime.gpus import sparse_types
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.version import __version__


@dataclass(frozen=True, kw_only=True)
class Ability:
    """Something that people come for: whether it can be done here, and how or why not."""

    name: str
    possible: bool
    how: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Attributes:
    date: ISO 8601, with time zone.
    abilities: what can be done here; the first is what the program is for.
    checks: everything that was looked at.
    facts: what it rests on.
    """

    date: str
    abilities: tuple[Ability, ...]
    checks: tuple[Check, ...]
    facts: Facts

    @property
    def ready(self) -> bool:
        """Whether what the program is for can be done: `obsdiff export`, or `obsdiff-engines build`."""
        return self.abilities[0].possible

    def to_json(self) -> dict[str, Any]:
        """Plain data, the home directory shortened to ~."""
        data = {"obsdiff": __version__, "ready": self.ready, **asdict(self)}
        shortened: dict[str, Any] = shorten_home(data)
        return shortened


def diagnose(
    output: Path = Path(), *, program: str = "obsdiff", quick: bool = False, progress: Progress = silent
) -> Diagnosis:
    """Examines this machine.

    Args:
        output: where results would go; its disk is looked at.
        program: see Facts.
        quick: leave out the products in every number format.
        progress: told of stage "doctor".
    """
    return judge(examine(output, program=program, quick=quick, progress=progress))


def judge(facts: Facts) -> Diagnosis:
    """What the facts mean."""
    judges = (check_machine, check_gpus, check_libraries, check_fit, check_products)
    checks = tuple(check for judging in judges for check in judging(facts))
    export = (_export(checks),) if facts.prunes else ()
    return Diagnosis(
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        abilities=(*export, _engines(facts), _running(facts), _sparse(facts)),
        checks=checks,
        facts=facts,
    )


def shorten_home(data: Any) -> Any:
    """The same data with the home directory written as ~, so that it can be shown to others."""
    home = str(Path.home())
    if isinstance(data, str):
        return data.replace(home, "~") if len(home) > 1 else data
    if isinstance(data, Mapping):
        return {key: shorten_home(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [shorten_home(value) for value in data]
    return data


def _export(checks: tuple[Check, ...]) -> Ability:
    blocking = [check.name for check in checks if check.blocks]
    how = f"first mend: {', '.join(blocking)}" if blocking else "obsdiff export MODEL --sparsity 2:4 -o DIR"
    return Ability(name="prune and export", possible=not blocking, how=how)


def _builder(facts: Facts) -> str:
    """Which builder `--trt` would take; "" where none works."""
    if facts.loaded("polygraphy") is None:
        return ""
    if facts.gpus and facts.loaded("tensorrt") is not None and runs(facts, "tensorrt"):
        return "tensorrt"
    return "tensorrt_rtx" if facts.loaded("tensorrt_rtx") is not None and runs(facts, "tensorrt_rtx") else ""


def _engines(facts: Facts) -> Ability:
    builder = _builder(facts)
    if builder == "tensorrt":
        how = f"with TensorRT {(facts.loaded('tensorrt') or {})['version']}, for the GPU that is here"
    elif builder:
        here = [gpu["capability"] for gpu in facts.gpus]
        fitting = "; they fit this GPU" if set(here) & set(KNOWN_TARGETS) else "; they do not run on this machine"
        how = f"ahead of time with TensorRT-RTX, for compute capabilities {', '.join(KNOWN_TARGETS)}{fitting}"
    else:
        how = f"no builder works here: {facts.install('trt')} beside an NVIDIA GPU, '{facts.program}[rtx]' without one"
    return Ability(name="build engines", possible=bool(builder), how=how)


def _running(facts: Facts) -> Ability:
    cuda = facts.loaded("cuda") or {}
    gpus = {gpu["capability"] for gpu in facts.gpus}
    if not gpus:
        how = "no GPU is visible; bundles run their ONNX graphs on the processor"
    elif not cuda:
        how = f"cuda-python does not load: {facts.install('trt')}"
    elif cuda["device"] is None:
        how = "cuda-python does not reach the GPU; why is told below"
    elif facts.loaded("tensorrt") is not None:
        return Ability(name="run engines", possible=True, how="of TensorRT, built on this GPU by the same version")
    elif facts.loaded("tensorrt_rtx") is not None and gpus & set(KNOWN_TARGETS):
        return Ability(name="run engines", possible=True, how="of TensorRT-RTX")
    else:
        how = f"no TensorRT that fits this GPU loads: {facts.install('trt')}"
    return Ability(name="run engines", possible=False, how=how)


def _sparse(facts: Facts) -> Ability:
    gpus = facts.gpus
    if not gpus:
        how = "no GPU is visible; TensorRT-RTX ignores 2:4, and a processor multiplies zeros like any other number"
    elif not sparse_types(gpus[0]["capability"]):
        how = f"compute capability {gpus[0]['capability']} has no sparse tensor cores"
    elif _builder(facts) != "tensorrt":
        how = f"the GPU has them, but TensorRT does not work here: {facts.install('trt')}"
    else:
        how = "TensorRT may choose them where they are faster; `obsdiff whatif` measures it"
        return Ability(name="run 2:4 kernels", possible=True, how=how)
    return Ability(name="run 2:4 kernels", possible=False, how=how)
