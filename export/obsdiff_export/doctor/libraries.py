"""What the libraries' facts mean: do they load, and do they fit together and with the driver and the GPU?"""

import re
from collections.abc import Iterator
from typing import Final

from obsdiff_export.builders.rtx import KNOWN_TARGETS
from obsdiff_export.doctor.checks import Check, Status, major
from obsdiff_export.doctor.examination import Facts

_NEEDED: Final = {
    "obsdiff": ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime"),
    "obsdiff-engines": ("onnx",),
}
"""Without one of them `obsdiff export`, or `obsdiff-engines build`, does not run."""
_EXTRAS: Final = {"onnxruntime": "cpu", "tensorrt": "trt", "tensorrt_rtx": "rtx", "polygraphy": "rtx", "cuda": "trt"}
_DRIVERS: Final = {12: 525, 13: 580}
"""CUDA major -> the first driver that runs it (NVIDIA, "CUDA Compatibility")."""
_OLDEST_TENSORRT: Final = (10, 3)


def check_libraries(facts: Facts) -> Iterator[Check]:
    """Every library on its own."""
    yield _requirements(facts)
    if facts.misfits:
        yield Check(
            group="libraries",
            name="versions",
            status="warn",
            finding="; ".join(facts.misfits),
            advice=f"pip install --upgrade '{facts.program}[...]' with the extras that you use",
        )
    for name in facts.libraries:
        if name != "gpus":
            yield _library(facts, name)


def check_fit(facts: Facts) -> Iterator[Check]:
    """Pairs that do not go together; what fits says nothing, but for torch."""
    yield from _torch(facts)
    yield from _onnxruntime(facts)
    yield from _tensorrt(facts)
    yield from _jetson(facts)
    yield from _rtx(facts)
    yield from _running(facts)


def _requirements(facts: Facts) -> Check:
    if facts.unmet:
        return Check(
            group="libraries",
            name="requirements",
            status="problem",
            finding="; ".join(facts.unmet),
            advice=f"pip install --upgrade {facts.program}, in an environment of its own",
            blocks=True,
        )
    finding = (
        f"{facts.program} {facts.packages.get(facts.program, 'from its sources')}: all that it requires is installed"
    )
    return Check(group="libraries", name="requirements", status="ok", finding=finding)


def _library(facts: Facts, name: str) -> Check:
    outcome, needed = facts.libraries[name], name in _NEEDED[facts.program]
    title = "cuda-python" if name == "cuda" else name
    if outcome.value is not None:
        details = [str(outcome.value["version"])]
        if name == "torch":
            details.append(f"CUDA {outcome.value['cuda']}" if outcome.value["cuda"] else "built without CUDA")
            if outcome.value["cudnn"]:
                details.append(f"cuDNN {outcome.value['cudnn']}")
            if outcome.value["cusparselt"]:
                details.append("cuSPARSELt")
        if name == "onnxruntime":
            details.append(", ".join(outcome.value["providers"]))
        return Check(group="libraries", name=title, status="ok", finding="; ".join(details))
    absent = re.match(rf"ModuleNotFoundError: No module named '{name}'", outcome.failure) is not None
    extra = _EXTRAS.get(name)
    install = facts.install(extra) if extra else f"pip install --upgrade {facts.program}"
    if name == "onnxruntime":
        install += ", or [gpu] where there is one"
    if absent:
        status: Status = "problem" if needed else "not here"
        return Check(
            group="libraries", name=title, status=status, finding="not installed", advice=install, blocks=needed
        )
    return Check(
        group="libraries",
        name=title,
        status="problem",
        finding=f"installed, but does not load: {outcome.failure}",
        advice=f"install it again: pip install --force-reinstall {title.replace('_', '-')}",
        blocks=needed,
    )


def _torch(facts: Facts) -> Iterator[Check]:
    torch, gpus = facts.loaded("torch"), facts.gpus
    if torch is None or not gpus:
        return
    driver = (facts.loaded("gpus") or {})["cuda"]
    if torch["cuda"] is None:
        yield _unfit(
            "torch and the GPU",
            "torch is built without CUDA: pruning would leave the GPU idle",
            "warn",
            "install a CUDA build of torch, as pytorch.org says for this system",
        )
    elif driver and major(torch["cuda"]) > major(driver):
        yield _unfit(
            "torch and the driver",
            f"torch is built for CUDA {torch['cuda']}, the driver serves {driver}",
            "problem",
            _newer_driver(torch["cuda"], "torch"),
        )
    elif not torch["usable"]:
        yield _unfit(
            "torch and the GPU",
            f"torch for CUDA {torch['cuda']} cannot use the GPU: {torch['why']}",
            "problem",
            "pruning would run on the processor; install a torch that fits the driver",
        )
    elif not _compiled_for(gpus[0]["capability"], torch["architectures"]):
        known = ", ".join(torch["architectures"])
        yield _unfit(
            "torch and the GPU",
            f"torch has no kernels for {gpus[0]['capability']}, only for {known}",
            "problem",
            "install a torch that was built for this GPU",
        )
    else:
        yield Check(group="fit", name="torch and the GPU", status="ok", finding=f"CUDA {torch['cuda']} runs on it")


def _onnxruntime(facts: Facts) -> Iterator[Check]:
    ort = facts.loaded("onnxruntime")
    both = {"onnxruntime", "onnxruntime-gpu"} <= set(facts.packages)
    if both:
        yield _unfit(
            "onnxruntime twice",
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other",
            "warn",
            "pip uninstall onnxruntime onnxruntime-gpu, then install one of them again",
        )
    if ort is None or not facts.gpus:
        return
    if "CUDAExecutionProvider" not in ort["providers"] and not both:
        yield _unfit(
            "onnxruntime and the GPU",
            "this onnxruntime runs on the processor only",
            "warn",
            f"pip uninstall onnxruntime, then {facts.install('gpu')}",
        )
    tensorrt = facts.loaded("tensorrt")
    if "TensorrtExecutionProvider" in ort["providers"] and tensorrt and major(tensorrt["version"]) > 10:
        yield _unfit(
            "onnxruntime and TensorRT",
            f"onnxruntime-gpu links libnvinfer.so.10: its TensorRT provider cannot use TensorRT {tensorrt['version']}",
            "warn",
            "obsdiff's own engines do; for the provider, install tensorrt 10 in another environment",
        )


def _tensorrt(facts: Facts) -> Iterator[Check]:
    tensorrt = facts.loaded("tensorrt")
    parts = {
        name: version.partition(".post")[0]
        for name, version in facts.packages.items()
        if re.match(r"tensorrt(?!-rtx)(-|$)", name)
    }
    if len(set(parts.values())) > 1:
        yield _unfit(
            "TensorRT's parts",
            "of different versions: " + ", ".join(f"{name} {version}" for name, version in sorted(parts.items())),
            "problem",
            f"pip uninstall them all, then {facts.install('trt')}",
        )
    if tensorrt is None:
        return
    version = tensorrt["version"]
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TENSORRT:
        yield _unfit(
            "TensorRT",
            f"{version} is older than 10.3, the oldest that obsdiff builds with",
            "problem",
            "pip install --upgrade tensorrt",
        )
    if not facts.gpus:
        yield _unfit(
            "TensorRT and the GPU",
            "TensorRT builds on the GPU that it serves, and none is visible",
            "warn",
            f"build on that machine, or ahead of time with '{facts.program}[rtx]'",
        )
    if facts.loaded("polygraphy") is None:
        yield _unfit(
            "TensorRT and Polygraphy",
            "engines are built through Polygraphy, which does not load",
            "problem",
            facts.install("trt"),
        )
    driver = (facts.loaded("gpus") or {}).get("cuda")
    built = next((found[1] for name in sorted(parts) if (found := re.search(r"-cu(\d+)", name))), None)
    if driver and built and int(built) > major(driver):
        yield _unfit(
            "TensorRT and the driver",
            f"TensorRT is built for CUDA {built}, the driver serves {driver}",
            "problem",
            _newer_driver(built, "tensorrt"),
        )


def _jetson(facts: Facts) -> Iterator[Check]:
    jetson, tensorrt = facts.host.jetson, facts.loaded("tensorrt")
    if jetson is None:
        return
    here = ".".join(facts.host.python.split(".")[:2])
    if tensorrt and major(tensorrt["version"]) > 10 and (jetson.jetpack or 0) <= 6:
        yield _unfit(
            "TensorRT and JetPack",
            f"JetPack of L4T {jetson.l4t} stays on TensorRT 10, {tensorrt['version']} is installed",
            "problem",
            "pip uninstall tensorrt, and use JetPack's own",
        )
    if tensorrt is None and jetson.tensorrt_pythons and here not in jetson.tensorrt_pythons:
        yield _unfit(
            "TensorRT and Python",
            f"JetPack's TensorRT is installed for Python {', '.join(jetson.tensorrt_pythons)}, this is {here}",
            "warn",
            "prune and export on a workstation; obsdiff-engines builds and obsdiff-runtime runs on JetPack's Python",
        )


def _rtx(facts: Facts) -> Iterator[Check]:
    if facts.loaded("tensorrt_rtx") is None:
        return
    if facts.loaded("polygraphy") is None:
        yield _unfit(
            "TensorRT-RTX and Polygraphy",
            "engines are built through Polygraphy, which does not load",
            "problem",
            facts.install("rtx"),
        )
    other = sorted({gpu["capability"] for gpu in facts.gpus} - set(KNOWN_TARGETS))
    if other:
        yield _unfit(
            "TensorRT-RTX and the GPU",
            f"TensorRT-RTX builds for {', '.join(KNOWN_TARGETS)}, not for "
            f"{', '.join(other)}: its engines do not run here",
            "warn",
            facts.install("trt"),
        )


def _running(facts: Facts) -> Iterator[Check]:
    """Engines are run through cuda-python."""
    builders = [name for name in ("tensorrt", "tensorrt_rtx") if facts.loaded(name) is not None]
    if not facts.gpus or not builders:
        return
    cuda = facts.loaded("cuda")
    if cuda is None:
        extra = "trt" if "tensorrt" in builders else "rtx"
        yield _unfit(
            "engines and cuda-python",
            "engines can be built but not run: that takes cuda-python, which does not load",
            "warn",
            facts.install(extra),
        )
    elif cuda["device"] is None:
        yield _unfit("cuda-python and the GPU", cuda["why"], "problem", "engines cannot be run like this")


def _unfit(name: str, finding: str, status: Status, advice: str) -> Check:
    return Check(group="fit", name=name, status=status, finding=finding, advice=advice)


def _newer_driver(cuda: str, package: str) -> str:
    needed = major(cuda)
    driver = f"update the driver to {_DRIVERS[needed]} or later" if needed in _DRIVERS else "update the driver"
    return f"{driver}, or install {package} for an older CUDA"


def _compiled_for(capability: str, architectures: list[str]) -> bool:
    """Whether kernels run: compiled for the same major and no later minor, or as portable code for anything earlier."""
    here = tuple(int(part) for part in capability.split("."))
    for kind, digits in (found.groups() for name in architectures if (found := re.match(r"(sm|compute)_(\d+)", name))):
        built = int(digits[:-1]), int(digits[-1])
        if built <= here and (kind == "compute" or built[0] == here[0]):
            return True
    return False
