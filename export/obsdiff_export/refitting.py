"""New weights into a built engine, without building it again: a LoRA that was merged into the same graph.

The engine was built with `--refit yes` or `--refit stripped`. Weights are matched by the names they have in the graph,
so the new graph is an export of the same model at the same widths. An engine that runs linears on sparse kernels takes
weights for them that are 2:4 and no others.
"""

import importlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from obsdiff_export import pattern
from obsdiff_export.builders.polygraph import make_logger, told
from obsdiff_export.content import content_hash, sha256_of
from obsdiff_export.pattern import PatternReport
from obsdiff_export.proof import receipt
from obsdiff_export.proof.receipt import Receipt
from obsdiff_runtime.bundle import sha256
from obsdiff_runtime.errors import BuildError, CompatibilityError, ConfigError, MissingPackageError

_EXTRAS: Final = {"tensorrt": "trt", "tensorrt_rtx": "rtx"}
_HARDWARE: Final = (2, 4)
_SHOWN: Final = 3


@dataclass(frozen=True, kw_only=True)
class Refitted:
    """An engine with other weights.

    Attributes:
        path: of its plan.
        receipt_path: beside it.
        weights: how many were replaced.
        bytes: of the plan.
        seconds: it took.
    """

    path: Path
    receipt_path: Path
    weights: int
    bytes: int
    seconds: float


def refit(plan: Path, model: Path, out: Path, *, vendor: Any | None = None) -> Refitted:
    """Writes a copy of an engine with the weights of another graph. Needs the GPU that the engine is for.

    Args:
        plan: `<key>.plan`, its receipt beside it.
        model: the graph with the new weights.
        out: the new plan, which holds its weights and can be refitted again; its receipt is written beside it.
        vendor: the module tensorrt or tensorrt_rtx; None to import the one that built the engine.

    Raises:
        ConfigError: the engine was not built to be refitted, or `out` is the plan itself.
        BuildError: the graph does not fit the engine; or its weights are not 2:4 where the engine needs them to be.
        CompatibilityError: the engine cannot be loaded here.
        MissingPackageError: what built it is not installed.
        BundleError: the receipt cannot be read.
        ExportError: the graph cannot be read.
    """
    started = perf_counter()
    known = receipt.load(plan.with_suffix(".json"))
    if out.resolve() == plan.resolve():
        raise ConfigError(f"{out}: name another file; the engine that is refitted stays as it is")
    if known.flags.get("refit", "no") == "no":
        raise ConfigError(f"{plan} was built without --refit: its weights are fixed; build it again with --refit yes")
    patterns = pattern.check(model, *_HARDWARE)
    _require_sparse_where_needed(known, patterns)
    trt = vendor if vendor is not None else _vendor(known.backend)
    errors: list[str] = []
    logger = make_logger(trt, lambda severity, message: None, errors)
    engine = _load(trt, logger, plan, known, errors)
    count = _replace(trt, logger, engine, model, errors)
    _write(out, _serialised(trt, engine))
    made = _receipt(known, plan, model, out, patterns, perf_counter() - started)
    made.save(out.with_suffix(".json"))
    return Refitted(
        path=out,
        receipt_path=out.with_suffix(".json"),
        weights=count,
        bytes=made.plan_bytes,
        seconds=perf_counter() - started,
    )


def _require_sparse_where_needed(known: Receipt, patterns: Sequence[PatternReport]) -> None:
    """Raises BuildError where a linear that may run on a sparse kernel would get weights that are not 2:4."""
    if known.proof.verdict in ("ignored", "not requested"):
        return
    sparse = {layer.weight for layer in known.proof.layers if layer.verdict in ("active", "unknown")}
    broken = [report for report in patterns if report.name in sparse and not report.holds]
    if broken:
        shown = "; ".join(f"{report.name}: {report.reason}" for report in broken[:_SHOWN])
        more = f"; and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        raise BuildError(
            f"{len(broken)} linears of this engine run, or may run, on sparse kernels, and their new weights are not "
            f"2:4: {shown}{more}. Merge the LoRA by obsdiff lora: it keeps zeros, or refit one without sparse kernels"
        )


def _vendor(backend: str) -> Any:
    if backend not in _EXTRAS:
        raise ConfigError(f"engines of {backend} cannot be refitted; those of {' and '.join(_EXTRAS)} can")
    try:
        return importlib.import_module(backend)
    except ImportError as error:
        raise MissingPackageError(f"refitting needs {backend}: pip install 'obsdiff[{_EXTRAS[backend]}]'") from error


def _load(trt: Any, logger: Any, plan: Path, known: Receipt, errors: Sequence[str]) -> Any:
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise CompatibilityError(
            f"{plan} cannot be loaded by {known.backend} {trt.__version__} here; it was built by {known.backend} "
            f"{known.backend_version} for {', '.join(known.targets)}: {_last(errors)}"
        )
    if not engine.refittable:
        raise ConfigError(f"{plan} says that it cannot be refitted; build it again with --refit yes")
    return engine


def _replace(trt: Any, logger: Any, engine: Any, model: Path, errors: Sequence[str]) -> int:
    """How many weights of the engine were replaced: all that it has."""
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(model.resolve())):
        found = [told(parser.get_error(index)) for index in range(parser.num_errors)]
        missing = list(refitter.get_missing_weights())
        lacking = f"; {len(missing)} weights are missing: {', '.join(missing[:_SHOWN])}" if missing else ""
        raise BuildError(f"{model} does not fit the engine: {'; '.join(found) or _last(errors)}{lacking}")
    missing = list(refitter.get_missing_weights())
    if missing:
        raise BuildError(
            f"{model} lacks {len(missing)} weights of the engine, such as {', '.join(missing[:_SHOWN])}; "
            "export the same model at the same widths"
        )
    if not refitter.refit_cuda_engine():
        raise BuildError(f"TensorRT {trt.__version__} did not take the weights of {model}: {_last(errors)}")
    return len(refitter.get_all_weights())


def _serialised(trt: Any, engine: Any) -> memoryview:
    """The plan with its weights in it; refittable again where this release can keep it so."""
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    again = getattr(trt.SerializationFlag, "INCLUDE_REFIT", None)
    if again is not None:
        config.set_flag(again)
    return memoryview(engine.serialize_with_config(config))


def _write(out: Path, plan: memoryview) -> None:
    """Beside, then renamed: whole or absent."""
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(plan)
        Path(name).replace(out)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _receipt(
    known: Receipt, plan: Path, model: Path, out: Path, patterns: Sequence[PatternReport], seconds: float
) -> Receipt:
    """That of the engine, with the new weights as witnesses: the kernels are those it was built with."""
    log, layers = plan.with_suffix(".log"), plan.with_suffix(".layers.json")
    content = content_hash(model)
    return receipt.of(
        key=sha256_of(f"{known.key} {content}".encode())[: len(known.key)],
        component=known.component,
        backend=known.backend,
        backend_version=known.backend_version,
        targets=known.targets,
        onnx_sha256=content,
        plan_sha256=sha256(out),
        plan_bytes=out.stat().st_size,
        profiles=known.profiles,
        sparse_requested=known.sparse_requested,
        patterns=patterns,
        log=log.read_text(encoding="utf-8", errors="replace") if log.exists() else "",
        inspector=layers.read_text(encoding="utf-8", errors="replace") if layers.exists() else None,
        seconds=seconds,
        flags={**known.flags, "refit": "yes", "refitted_from": known.key},
    )


def _last(errors: Sequence[str]) -> str:
    return errors[-1] if errors else "it gave no reason"
