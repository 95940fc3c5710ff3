"""TensorRT-RTX: engines ahead of time, without a GPU, for several architectures at once.

It takes the sparse flag and ignores it in such a build: plans with and without are equal byte for byte (1.7.1). It has
no timing cache (its calls are no-ops since 1.2), and only a machine with a GPU can make its engines refittable: without
one its compiler fails on the first weight that is marked so, and REFIT_INDIVIDUAL with none marked gives an engine of
which nothing can be refitted.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from obsdiff_export.builders.polygraph import build_plan, common_options, set_flags
from obsdiff_export.builders.request import Flags, Log, RefusalError, Request
from obsdiff_export.gpu import compute_capability
from obsdiff_runtime.errors import CompatibilityError

DEFAULT_TARGETS = ("8.6", "8.9", "12.0")
KNOWN_TARGETS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What 1.7 builds for."""


class Rtx:
    name = "tensorrt_rtx"
    extra = "rtx"
    environment: Mapping[str, str] = {"POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    times_tactics = False

    def missing(self) -> str:
        absent = [package for package in ("tensorrt_rtx", "polygraphy") if find_spec(package) is None]
        return f"{' and '.join(absent)} not installed" if absent else ""

    def version(self) -> str:
        for package in ("tensorrt-rtx", "tensorrt_rtx"):
            try:
                return version(package)
            except PackageNotFoundError:
                continue
        return "unknown"

    def device(self) -> str:
        return ""

    def targets(self, asked: Sequence[str]) -> tuple[str, ...]:
        for target in asked:
            if target not in KNOWN_TARGETS:
                raise CompatibilityError(_unknown(target, KNOWN_TARGETS))
        return tuple(dict.fromkeys(asked)) or DEFAULT_TARGETS

    def check(self, flags: Flags, targets: Sequence[str]) -> None:
        if flags.refit != "no" and (compute_capability() is None or len(targets) != 1):
            raise CompatibilityError(
                "TensorRT-RTX makes refittable engines on a machine with a GPU only, and for one target: "
                f"build without --refit, or there with --targets {targets[0]}"
            )

    def compile(self, request: Request, log: Log) -> bytes | memoryview:
        import tensorrt_rtx as trt
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        capabilities = [_capability(trt, target) for target in request.targets]
        common = CreateConfigRTX(**common_options(trt, request))

        def configure(builder: Any, network: Any) -> Any:
            config = common(builder, network)
            set_flags(trt, config, request.flags)
            config.num_compute_capabilities = len(capabilities)
            for index, (target, capability) in enumerate(zip(request.targets, capabilities, strict=True)):
                if not config.set_compute_capability(capability, index):
                    raise RefusalError("incompatible", _unknown(target, _members(trt)))
            return config

        return build_plan(trt, request, log, configure)


def _capability(trt: Any, target: str) -> Any:
    capability = getattr(trt.ComputeCapability, f"SM{target.replace('.', '')}", None)
    if capability is None:
        raise RefusalError("incompatible", _unknown(target, _members(trt)))
    return capability


def _members(trt: Any) -> list[str]:
    names = [name[2:] for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    return sorted((f"{name[:-1]}.{name[-1]}" for name in names), key=float)


def _unknown(target: str, known: Sequence[str]) -> str:
    return (
        f"TensorRT-RTX cannot build for compute capability {target}; it knows {', '.join(known)}. "
        "For other GPUs, such as H100 (9.0), install 'obsdiff[trt]' on a machine that has one and build there"
    )
