"""What the doctor looks at and tries: versions, libraries that load, products in every number format.

Facts only; what they mean is said beside, in `machine`, `libraries` and `products`. Whatever may crash or hang runs in
a process of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement

from obsdiff_export.asking import Outcome, ask
from obsdiff_export.builders.rtx import KNOWN_TARGETS
from obsdiff_export.doctor.host import Host, read_host
from obsdiff_runtime.progress import Progress, silent

FORMATS: Final = ("fp32", "fp16", "bf16", "int8", "fp8")
LIBRARIES: Final = (
    *("gpus", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime"),
    *("polygraphy", "tensorrt", "tensorrt_rtx", "cuda"),
)
"""Import names, and "gpus" for the driver; "cuda" is cuda-python."""
TO_EXPORT: Final = ("torch", "diffusers", "transformers", "onnxscript")
"""Those that only `obsdiff` uses; `obsdiff-engines` is for places without them."""
PACKAGES: Final = (
    *(
        "obsdiff",
        "obsdiff-runtime",
        "obsdiff-engines",
        "torch",
        "diffusers",
        "transformers",
        "accelerate",
        "safetensors",
        "tokenizers",
        "numpy",
    ),
    *("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "polygraphy", "nvidia-modelopt"),
    *("cuda-python", "cuda-bindings"),
)
_PREFIXES: Final = ("tensorrt", "nvidia-cuda-runtime", "nvidia-cudnn", "nvidia-cusparselt")
"""Beginnings of the names of packages that come per CUDA version."""

_NOT_ASKED: Final = ("AzureExecutionProvider",)
"""Runs nothing here."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Attributes:
    host: see there.
    packages: distribution -> version, of those that matter and are installed.
    unmet: requirements of the program itself that what is installed does not meet, in words.
    misfits: optional packages that are installed in a version that its extras do not take, in words.
    libraries: LIBRARIES -> what each says of itself, or why it does not load.
    products: "torch/cpu/fp16", "onnxruntime/CPUExecutionProvider/fp16", "tensorrt_rtx/8.6/fp16" or
        "tensorrt/here/fp16" -> what came of one product; empty where none was tried.
    program: for which it was looked, and its distribution: "obsdiff", or "obsdiff-engines", which needs no torch.
    """

    host: Host
    packages: Mapping[str, str]
    unmet: tuple[str, ...]
    misfits: tuple[str, ...]
    libraries: Mapping[str, Outcome]
    products: Mapping[str, Outcome]
    program: str = "obsdiff"

    @property
    def prunes(self) -> bool:
        """Whether the program is `obsdiff`, which takes models; the other takes bundles."""
        return self.program == "obsdiff"

    def install(self, extra: str) -> str:
        """The command that installs what an extra of the program holds."""
        owner = "obsdiff-runtime" if extra in ("cpu", "gpu") and not self.prunes else self.program
        return f"pip install '{owner}[{extra}]'"

    @property
    def gpus(self) -> list[dict[str, Any]]:
        """The visible GPUs, as `gpus.Gpu` has them."""
        return list((self.libraries["gpus"].value or {}).get("devices", ()))

    def loaded(self, library: str) -> dict[str, Any] | None:
        """What a library says of itself; None where it does not load."""
        found = self.libraries.get(library)
        return None if found is None else found.value


def examine(
    output: Path, *, program: str = "obsdiff", quick: bool = False, timeout_s: float = 120, progress: Progress = silent
) -> Facts:
    """Looks at this machine.

    Args:
        output: where results would go.
        program: see Facts.
        quick: try no products.
        timeout_s: of each process.
        progress: told of stage "doctor".
    """
    steps = 1 if quick else 4
    progress("doctor", 0, steps, "libraries")
    libraries = ask("obsdiff_export.probes.libraries:describe", asked_of(program), timeout_s=timeout_s)
    products: dict[str, Outcome] = {}
    for done, (library, place, questions) in enumerate(() if quick else _trials(libraries), start=1):
        progress("doctor", done, steps, library)
        asked = ask(place, questions, timeout_s=timeout_s)
        products |= {
            name if name.startswith(f"{library}/") else f"{library}/{name}": outcome for name, outcome in asked.items()
        }
    installed = _installed()
    unmet, misfits = _unmet(program, installed)
    facts = Facts(
        host=read_host(output),
        packages={name: version for name, version in installed.items() if _matters(name)},
        unmet=unmet,
        misfits=misfits,
        libraries=libraries,
        products=products,
        program=program,
    )
    progress("doctor", steps, steps, "")
    return facts


def asked_of(program: str) -> tuple[str, ...]:
    """The libraries that a program uses."""
    return LIBRARIES if program == "obsdiff" else tuple(name for name in LIBRARIES if name not in TO_EXPORT)


def _trials(libraries: Mapping[str, Outcome]) -> list[tuple[str, str, list[str]]]:
    """What to try: (library, function, questions)."""
    trials = []
    loaded = {name: outcome.value or {} for name, outcome in libraries.items()}
    torch, ort, gpus = (loaded.get(name, {}) for name in ("torch", "onnxruntime", "gpus"))
    if torch:
        questions = [f"cpu/{form}" for form in FORMATS]
        if torch["usable"]:
            questions += [f"cuda/{form}" for form in (*FORMATS, "2:4 fp16")]
        trials.append(("torch", "obsdiff_export.probes.arithmetic:multiply", questions))
    if ort:
        providers = [provider for provider in ort["providers"] if provider not in _NOT_ASKED]
        questions = [f"{provider}/{form}" for provider in providers for form in FORMATS]
        trials.append(("onnxruntime", "obsdiff_export.probes.providers:multiply", questions))
    if libraries["tensorrt"].value and gpus.get("devices"):
        questions = [f"tensorrt/here/{form}" for form in FORMATS]
        trials.append(("tensorrt", "obsdiff_export.probes.engines:build", questions))
    if libraries["tensorrt_rtx"].value:
        questions = [f"tensorrt_rtx/{target}/{form}" for target in KNOWN_TARGETS for form in FORMATS]
        trials.append(("tensorrt_rtx", "obsdiff_export.probes.engines:build", questions))
    return trials


def _installed() -> dict[str, str]:
    """Every installed distribution, names as PEP 503 writes them."""
    found: dict[str, str] = {}
    for distribution in distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(name.lower().replace("_", "-").replace(".", "-"), distribution.version)
    return found


def _matters(name: str) -> bool:
    return name in PACKAGES or name.startswith(_PREFIXES)


def _unmet(program: str, installed: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the program requires and does not have; what is of another version than an extra of it asks for."""
    try:
        required = requires(program) or ()
    except PackageNotFoundError:  # run from its sources
        required = ()
    missing: list[str] = []
    others: list[str] = []
    for text in required:
        requirement = Requirement(text)
        optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        has = installed.get(requirement.name.lower().replace("_", "-"))
        asked = f"{requirement.name}{requirement.specifier}"
        if has is None and not optional:
            missing.append(f"{asked} is not installed")
        elif has is not None and not requirement.specifier.contains(has, prereleases=True):
            (others if optional else missing).append(f"{asked} is needed, {has} is installed")
    return tuple(missing), tuple(others)
