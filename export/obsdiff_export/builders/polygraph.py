"""What TensorRT and TensorRT-RTX share: Polygraphy's loaders, our logger, and what their errors mean.

Runs in the building process only. Polygraphy imports `tensorrt`, or `tensorrt_rtx` under POLYGRAPHY_USE_TENSORRT_RTX=1.
What a release may lack is looked up by its name: the numbers of enum members moved between TensorRT 10 and 11.
"""

import os
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from obsdiff_export.builders.request import Flags, Log, RefusalError, Request, Shapes

Configure = Callable[[Any, Any], Any]
"""(builder, network) -> the builder's configuration."""

_REFIT: Final[Mapping[str, tuple[str, ...]]] = {"no": (), "yes": ("REFIT",), "stripped": ("REFIT", "STRIP_PLAN")}
_MOST_ERRORS: Final = 3
_CODE: Final = re.compile(r"Error Code \w+: [\w ()]*?\((?P<text>.+?)\.?(?: In \w+ at [^)]*)?\)$")
_PLACE: Final = re.compile(r"^\[[^\]]*\]:?\s*|^In node \d+ .*?: ")
_QUOTED: Final = re.compile(r'&& "(?P<text>[^"]+)"')


def build_plan(trt: Any, request: Request, log: Log, configure: Configure) -> bytes | memoryview:
    """Parses and builds, strongly typed: the graph's types are the engine's.

    Args:
        trt: the vendor's module.
        request: which graph.
        log: takes every message of the builder.
        configure: makes the configuration.

    Raises:
        RefusalError: the builder said no.
    """
    from polygraphy.backend.trt import EngineBytesFromNetwork
    from polygraphy.backend.trt import util as polygraphy_util
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    errors: list[str] = []
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    logger = make_logger(trt, log, errors)
    polygraphy_util.TRT_LOGGER = logger
    try:
        parsed = _parse(trt, request.onnx, logger)
        plan = EngineBytesFromNetwork(parsed, config=configure, save_timing_cache=request.timing_cache)()
    except PolygraphyException as error:
        raise _refusal(errors or [str(error)], request) from error
    return memoryview(plan)


def common_options(trt: Any, request: Request) -> dict[str, Any]:
    """What both of Polygraphy's configurations are told."""
    return {
        "sparse_weights": request.flags.sparse,
        "profiles": [profile_from(shapes) for shapes in request.profiles],
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "builder_optimization_level": request.flags.optimization_level,
        "load_timing_cache": _readable(request.timing_cache),
    }


def set_flags(trt: Any, config: Any, flags: Flags) -> None:
    """Sets the flags that not every release has, by name.

    Raises:
        RefusalError: this release lacks one.
    """
    wanted = [*_REFIT[flags.refit], *(["WEIGHT_STREAMING"] if flags.weight_streaming else [])]
    for name in wanted:
        flag = getattr(trt.BuilderFlag, name, None)
        if flag is None:
            raise RefusalError("incompatible", f"{trt.__name__} {trt.__version__} has no builder flag {name}")
        config.set_flag(flag)
    if flags.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)


def profile_from(shapes: Mapping[str, Shapes]) -> Any:
    """One optimisation profile for all inputs."""
    from polygraphy.backend.trt import Profile

    profile = Profile()
    for name, sizes in shapes.items():
        profile.add(name, min=tuple(sizes["min"]), opt=tuple(sizes["opt"]), max=tuple(sizes["max"]))
    return profile


def reason_of(description: str) -> str:
    """The cause in what a parser or builder says, without its source files and without our missing driver."""
    kept = []
    for line in description.splitlines():
        if "cudaError" in line or not line.strip():
            continue
        found = _CODE.search(line) or _QUOTED.search(line)
        kept.append(found["text"] if found else _PLACE.sub("", line.strip()).removeprefix("Assertion failed: "))
    told = [line for line in kept if not line.startswith("Invalid Node")] or kept
    return "; ".join(dict.fromkeys(told)) or description.strip()


def told(error: Any) -> str:
    """A parser's error in one sentence: the node, its operator and the reason."""
    name, operator = (getattr(error, field, str)() for field in ("node_name", "node_operator"))
    index = error.node()
    if index < 0:
        return f"its parser does not take the file: {reason_of(error.desc())}"
    reason = reason_of(error.desc())
    if reason.startswith("Plugin not found"):
        reason = "it knows neither an operator nor a plugin of that name"
    return f"its parser refused node {name or index} ({operator or 'unknown operator'}): {reason}"


def make_logger(trt: Any, log: Log, errors: list[str]) -> Any:
    """A logger of the vendor's kind: every message goes to `log`, errors to `errors` too."""
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


def _parse(trt: Any, path: str, logger: Any) -> tuple[Any, Any, Any]:
    """(builder, network, parser).

    Raises:
        RefusalError: the parser does not take the graph; names the node.
    """
    from polygraphy.backend.trt import CreateNetwork

    builder, network = CreateNetwork(strongly_typed=True)()
    trt.init_libnvinfer_plugins(logger, "")
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(path) or parser.num_errors:
        found = [told(parser.get_error(index)) for index in range(parser.num_errors)]
        text = "; ".join(dict.fromkeys(found[:_MOST_ERRORS])) or "its parser gave no reason"
        raise RefusalError("memory" if _starved(text) else "refused", text)
    return builder, network, parser


def _readable(timing_cache: str | None) -> str | None:
    """The file, where there is something in it to read: Polygraphy warns of one that is absent."""
    return timing_cache if timing_cache is not None and Path(timing_cache).exists() else None


def _starved(text: str) -> bool:
    lowered = text.lower()
    # The last is a thread that could not be started: Myelin's words under a limit on memory.
    words = ("out of memory", "outofmemory", "bad_alloc", "resource temporarily unavailable")
    return any(word in lowered for word in words)


def _refusal(errors: list[str], request: Request) -> RefusalError:
    text = " | ".join(errors[:_MOST_ERRORS])
    lowered = text.lower()
    if "hw-specific datatypes" in lowered:
        where = ", ".join(request.targets) or "this GPU"
        return RefusalError(
            "incompatible",
            f"the graph has a number format that {where} lacks (bfloat16 needs 8.0, float8 8.9 or later): {text}",
        )
    if _starved(text):
        return RefusalError("memory", text)
    return RefusalError("refused", "; ".join(dict.fromkeys(reason_of(error) for error in errors[:_MOST_ERRORS])))
