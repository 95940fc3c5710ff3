"""TensorRT 10.3 to 11: engines for the GPU of this machine, with sparse tactics where they are faster.

What a release has is asked for by name: the numbers of enum members moved between 10 and 11. TensorRT 11 is always
strongly typed; 10 is told to be.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from obsdiff_export.builders.polygraph import build_plan, common_options, set_flags
from obsdiff_export.builders.request import Flags, Log, Request
from obsdiff_export.gpu import compute_capability
from obsdiff_runtime.errors import CompatibilityError
from obsdiff_runtime.gpus import find_gpus

_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings")


class TensorRt:
    name = "tensorrt"
    extra = "trt"
    environment: Mapping[str, str] = {}
    times_tactics = True

    def missing(self) -> str:
        absent = [package for package in ("tensorrt", "polygraphy") if find_spec(package) is None]
        if absent:
            return f"{' and '.join(absent)} not installed"
        return "" if compute_capability() else "no NVIDIA GPU is visible"

    def version(self) -> str:
        for package in _PACKAGES:
            try:
                return version(package)
            except PackageNotFoundError:
                continue
        return _version_in(find_spec("tensorrt"))

    def device(self) -> str:
        devices = find_gpus().devices
        return devices[0].name if devices else ""

    def targets(self, asked: Sequence[str]) -> tuple[str, ...]:
        here = compute_capability() or "none"
        if any(target != here for target in asked):
            raise CompatibilityError(
                f"TensorRT builds for the GPU of this machine ({here}), not for {', '.join(asked)}; "
                "build on the machine that serves, or take the tensorrt_rtx builder"
            )
        return (here,)

    def check(self, flags: Flags, targets: Sequence[str]) -> None:
        """Every flag can be served; a release that lacks one says so when it is set."""

    def compile(self, request: Request, log: Log) -> bytes | memoryview:
        import tensorrt as trt
        from polygraphy.backend.trt import CreateConfig

        common = CreateConfig(tf32=request.flags.tf32, **common_options(trt, request))

        def configure(builder: Any, network: Any) -> Any:
            config = common(builder, network)
            set_flags(trt, config, request.flags)
            return config

        plan = build_plan(trt, request, log, configure)
        told = inspect(trt, plan, request, log)
        if told is not None:
            Path(request.layers).write_text(told, encoding="utf-8")
        return plan


def inspect(trt: Any, plan: bytes | memoryview, request: Request, log: Log) -> str | None:
    """What TensorRT's inspector says of every layer, as JSON; None where it cannot say.

    A stripped plan is not asked: it has no weights to be loaded with.
    """
    if request.flags.refit == "stripped":
        log("INFO", "[obsdiff] a stripped plan is not inspected: it holds no weights")
        return None
    from polygraphy.backend.trt import util as polygraphy_util

    runtime = trt.Runtime(polygraphy_util.get_trt_logger())
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        log("WARNING", "[obsdiff] the engine could not be loaded to be inspected")
        return None
    inspector = engine.create_engine_inspector()
    told: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return told


def _version_in(spec: Any) -> str:
    """The version that a package states in its source: JetPack installs TensorRT without metadata."""
    source = Path(spec.origin).read_text(encoding="utf-8") if spec is not None and spec.origin else ""
    stated = [line.partition("=")[2] for line in source.splitlines() if line.startswith("__version__")]
    return stated[0].strip().strip("\"'") if stated else "unknown"
