"""Does a library load, and what does it say of itself? Run by `asking.ask`."""

import importlib
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def describe(name: str) -> dict[str, Any]:
    """Facts of one library: its version, and what is particular to it."""
    return {"gpus": _gpus, "torch": _torch, "onnxruntime": _onnxruntime, "cuda": _cuda}.get(
        name, lambda: _plain(name)
    )()


def _gpus() -> dict[str, Any]:
    from obsdiff_runtime.gpus import find_gpus

    return asdict(find_gpus())


def _torch() -> dict[str, Any]:
    import torch

    usable = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()) if usable else None,  # type: ignore[no-untyped-call]
        "usable": usable,
        "why": "" if usable or torch.version.cuda is None else _cuda_failure(),
        "architectures": torch.cuda.get_arch_list() if usable else [],
        "threads": torch.get_num_threads(),
        "cusparselt": bool(usable and torch.backends.cusparselt.is_available()),
    }


def _cuda_failure() -> str:
    import torch

    try:
        torch.zeros(1, device="cuda")
    except Exception as error:  # the driver's words, whatever class torch gives them
        return " ".join(str(error).split())
    return "torch does not say why"


def _onnxruntime() -> dict[str, Any]:
    import onnxruntime

    return {"version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers()}


def _cuda() -> dict[str, Any]:
    """cuda-python, through which engines are run, and what it says of the GPU."""
    importlib.import_module("cuda")
    from obsdiff_runtime import cuda
    from obsdiff_runtime.errors import CompatibilityError

    runtime = cuda.load()
    versions = [_version_of(name) for name in ("cuda-python", "cuda-bindings")]
    found = {"version": next(filter(None, versions), "unknown"), "device": None, "why": ""}
    try:
        return {**found, "device": asdict(runtime.device())}
    except CompatibilityError as error:
        return {**found, "why": str(error)}


def _version_of(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _plain(name: str) -> dict[str, Any]:
    module = importlib.import_module(name)
    return {"version": str(getattr(module, "__version__", "unknown"))}
