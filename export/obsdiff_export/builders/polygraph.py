"""What TensorRT and TensorRT-RTX share: Polygraphy's loaders, our logger, and what their errors mean.

Runs in the building process only. Polygraphy imports `tensorrt`, or `tensorrt_rtx` under POLYGRAPHY_USE_TENSORRT_RTX=1.
"""

import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

from obsdiff_export.builders.request import Log, RefusalError, Request, Shapes

Configure = Callable[[Any, Any], Any]
"""(builder, network) -> the builder's configuration."""


def build_plan(trt: Any, request: Request, log: Log, configure: Configure) -> bytes:
    """Parses and builds, strongly typed: the graph's types are the engine's.

    Args:
        trt: the vendor's module.
        request: which graph.
        log: takes every message of the builder.
        configure: makes the configuration.

    Raises:
        RefusalError: the builder said no.
    """
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath
    from polygraphy.backend.trt import util as polygraphy_util
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    errors: list[str] = []
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    polygraphy_util.TRT_LOGGER = _logger(trt, log, errors)
    try:
        network = NetworkFromOnnxPath(request.onnx, strongly_typed=True)
        with EngineBytesFromNetwork(network, config=configure)() as plan:
            return bytes(plan)
    except PolygraphyException as error:
        raise _refusal(errors or [str(error)], request) from error


def profile_from(shapes: Mapping[str, Shapes]) -> Any:
    """One optimisation profile for all inputs."""
    from polygraphy.backend.trt import Profile

    profile = Profile()
    for name, sizes in shapes.items():
        profile.add(name, min=tuple(sizes["min"]), opt=tuple(sizes["opt"]), max=tuple(sizes["max"]))
    return profile


def _logger(trt: Any, log: Log, errors: list[str]) -> Any:
    names = {
        trt.ILogger.Severity.INTERNAL_ERROR: "ERROR",
        trt.ILogger.Severity.ERROR: "ERROR",
        trt.ILogger.Severity.WARNING: "WARNING",
        trt.ILogger.Severity.INFO: "INFO",
    }

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            try:
                name = names.get(severity, "VERBOSE")
                if name == "ERROR":
                    errors.append(message)
                log(name, message)
            except BaseException:  # called from C++, where nothing may be raised
                os.kill(os.getpid(), signal.SIGTERM)

    return Logger()


def _refusal(errors: list[str], request: Request) -> RefusalError:
    text = " | ".join(errors[:3])
    lowered = text.lower()
    if "hw-specific datatypes" in lowered:
        where = ", ".join(request.targets) or "this GPU"
        return RefusalError(
            "incompatible",
            f"the graph has a number format that {where} lacks (bfloat16 needs 8.0, float8 8.9 or later): {text}",
        )
    if "out of memory" in lowered or "outofmemory" in lowered or "bad_alloc" in lowered:
        return RefusalError("memory", text)
    return RefusalError("refused", text)
