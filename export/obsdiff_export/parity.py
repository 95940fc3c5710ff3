"""Does a graph compute what torch computes? ONNX Runtime on the CPU against the module, at several sizes.

The reference is always the module in float32. ONNX Runtime has no bfloat16 kernels on the CPU: such a graph is checked
for validity, and the numbers are those of the same module exported in float32; the result says so.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from torch import Tensor

from obsdiff_export.casting import cast_to, inputs_in
from obsdiff_export.component import Component
from obsdiff_export.onnx import OnnxModel, export
from obsdiff_export.quantizing import Quantization, imitated
from obsdiff_runtime.backends.ort import EXACT_INTEGERS
from obsdiff_runtime.errors import ExportError, MissingPackageError

_Array = np.ndarray[Any, np.dtype[Any]]

TOLERANCES: Final[Mapping[str, float]] = {
    **{"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-4},
    **{"int8": 5e-2, "fp8": 5e-2},
}
"""Largest accepted error by precision, relative to the largest reference value.

float32: the contract. float16: its unit roundoff is 5e-4; rounding through some dozens of layers stays below 40 times
that, a wrong graph does not. bfloat16: measured on the float32 graph. int8, fp8: both sides round by the same scales,
but a last bit before the rounding can be a whole step after it; the most seen on tiny random networks was 8e-3.
"""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How close a graph is to torch.

    Attributes:
        max_relative_error: over all outputs and sizes, max |onnx - torch| / max |torch|.
        per_output: the same by output name.
        tolerance: what was allowed.
        shapes: the compared inputs: name -> shape, once per set.
        measured: dtype of the graph that was run; "float32" for a bfloat16 graph, which only was checked to be valid.
    """

    max_relative_error: float
    per_output: Mapping[str, float]
    tolerance: float
    shapes: tuple[Mapping[str, tuple[int, ...]], ...]
    measured: str


def compare(
    component: Component,
    model: OnnxModel,
    *,
    tolerance: float | None = None,
    quantization: Quantization | None = None,
) -> Parity:
    """Runs the component's inputs and `more_inputs` through torch and the graph.

    Args:
        component: what was exported.
        model: the export.
        tolerance: None for `TOLERANCES` of the graph's precision.
        quantization: of the export: torch rounds as the graph is to.

    Raises:
        ExportError: an output differs by more than the tolerance, is not finite, or has another shape; or the graph is
            invalid. Names the component, the output, the error and the tolerance.
        MissingPackageError: onnxruntime is not installed.
    """
    require_onnxruntime()
    allowed = TOLERANCES[model.precision] if tolerance is None else tolerance
    sets = [component.inputs, *component.more_inputs]
    if model.dtype == "bfloat16":
        _check_valid(model)
        with tempfile.TemporaryDirectory(prefix="obsdiff-") as folder:
            twin = export(component, Path(folder), dtype=torch.float32, opset=model.opset, quantization=quantization)
            errors = _errors(component, twin, sets, quantization)
    else:
        errors = _errors(component, model, sets, quantization)
    worst = {name: max(found[name] for found in errors) for name in component.outputs}
    for name, error in worst.items():
        if not error <= allowed:
            raise ExportError(
                f"{component.name}: output {name} of {model.path.name} in {model.dtype} differs from torch by "
                f"{error:.2g}, allowed is {allowed:.2g}; export it in float32 to tell rounding from a wrong graph"
            )
    return Parity(
        max_relative_error=max(worst.values()),
        per_output=worst,
        tolerance=allowed,
        shapes=tuple({name: tuple(tensor.shape) for name, tensor in inputs.items()} for inputs in sets),
        measured="float32" if model.dtype == "bfloat16" else model.dtype,
    )


def require_onnxruntime() -> None:
    """Raises MissingPackageError unless ONNX Runtime can be imported."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            "comparing graphs with torch needs onnxruntime: pip install 'obsdiff[cpu]' (or 'obsdiff[gpu]')"
        ) from error


def _errors(
    component: Component, model: OnnxModel, sets: Sequence[Mapping[str, Tensor]], quantization: Quantization | None
) -> list[dict[str, float]]:
    """Relative error by output name, per set of inputs; infinite where a value is not finite."""
    session = _session(component, model)
    errors = []
    for inputs in sets:
        with torch.no_grad(), cast_to(component.module, torch.float32), imitated(component.module, quantization):
            answer = component.module(**inputs_in(torch.float32, inputs))
        expected = (answer,) if isinstance(answer, Tensor) else tuple(answer)
        found = _run(session, component, model, inputs)
        errors.append(
            {
                name: _error(f"{component.name}: output {name}", want.float().numpy(), got.astype(np.float32))
                for name, want, got in zip(component.outputs, expected, found, strict=True)
            }
        )
    return errors


def _error(what: str, want: _Array, got: _Array) -> float:
    if want.shape != got.shape:
        raise ExportError(f"{what} has the shape {got.shape}, torch gives {want.shape}")
    difference = float(np.abs(got - want).max())
    scale = max(float(np.abs(want).max()), float(np.finfo(np.float32).tiny))
    return difference / scale if math.isfinite(difference) else math.inf


def _session(component: Component, model: OnnxModel) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry(*EXACT_INTEGERS)
    try:
        return onnxruntime.InferenceSession(str(model.path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"{component.name}: ONNX Runtime cannot load {model.path}: {error}") from error


def _run(session: Any, component: Component, model: OnnxModel, inputs: Mapping[str, Tensor]) -> Sequence[_Array]:
    typed = inputs_in(getattr(torch, model.dtype), inputs)
    try:
        found: Sequence[_Array] = session.run(None, {name: tensor.numpy() for name, tensor in typed.items()})
    except Exception as error:
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        raise ExportError(f"{component.name}: ONNX Runtime cannot run {model.path} at {shapes}: {error}") from error
    return found


def _check_valid(model: OnnxModel) -> None:
    try:
        onnx.checker.check_model(str(model.path), full_check=True)
    except Exception as error:
        raise ExportError(f"{model.name}: {model.path} is no valid {model.dtype} graph: {error}") from error
