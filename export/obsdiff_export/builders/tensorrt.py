"""TensorRT 10.3 to 11: engines for the GPU of this machine, with sparse tactics where they are faster.

Enum members are asked for by name: their numbers moved between 10 and 11. TensorRT 11 is always strongly typed; 10 is
told to be.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from obsdiff_export.builders.polygraph import build_plan, profile_from
from obsdiff_export.builders.request import Log, Request
from obsdiff_export.gpu import compute_capability
from obsdiff_runtime.errors import CompatibilityError


class TensorRt:
    name = "tensorrt"
    extra = "trt"
    environment: Mapping[str, str] = {}

    def missing(self) -> str:
        absent = [package for package in ("tensorrt", "polygraphy") if find_spec(package) is None]
        if absent:
            return f"{' and '.join(absent)} not installed"
        return "" if compute_capability() else "no NVIDIA GPU is visible"

    def version(self) -> str:
        try:
            return version("tensorrt")
        except PackageNotFoundError:  # JetPack installs it without metadata
            return "unknown"

    def targets(self, asked: Sequence[str]) -> tuple[str, ...]:
        here = compute_capability() or "none"
        if any(target != here for target in asked):
            raise CompatibilityError(
                f"TensorRT builds for the GPU of this machine ({here}), not for {', '.join(asked)}; "
                "build on the machine that serves, or take the tensorrt_rtx builder"
            )
        return (here,)

    def compile(self, request: Request, log: Log) -> bytes:
        import tensorrt as trt
        from polygraphy.backend.trt import CreateConfig

        config = CreateConfig(
            tf32=False,
            sparse_weights=request.sparse,
            profiles=[profile_from(request.profile)],
            profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
        )
        return build_plan(trt, request, log, config)
