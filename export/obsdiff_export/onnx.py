"""Components become ONNX graphs: typed, dynamic where the component says so, with the weights' own names.

A weight is an initializer under its parameter's name; one that MatMul reads transposed is `<name>::T`, laid out
(in, out). Weights lie in one file beside the graph, `model.onnx.data`, each at a multiple of 4096 bytes. The same
component gives the same bytes.
"""

import json
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Final

import onnx_ir as ir
import torch

from obsdiff_export import passes
from obsdiff_export.capture import lower, read_later
from obsdiff_export.component import Component
from obsdiff_export.linears import TRANSPOSED
from obsdiff_export.ports import Port
from obsdiff_export.quantizing import LEAST_OPSET, Quantization, insert
from obsdiff_runtime.errors import ConfigError, ExportError, ResourceError
from obsdiff_runtime.version import __version__

GRAPH: Final = "model.onnx"
DATA: Final = "model.onnx.data"
_NAMES: Final = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_OPSETS: Final = {torch.float32: (18, 20), torch.float16: (18, 20), torch.bfloat16: (22, 22)}
_ALIGNMENT: Final = 4096
_INLINE_BYTES: Final = 1024


@dataclass(frozen=True, kw_only=True)
class OnnxModel:
    """An exported component.

    Attributes:
        name: the component's.
        path: the graph; its weights are `model.onnx.data` beside it.
        dtype: "float32", "float16" or "bfloat16": what the graph computes in.
        precision: "int8" or "fp8" where its linears do, else the dtype.
        opset: of the default domain.
        inputs, outputs: in order.
        weights: names of the initializers that come from the module.
        bytes: graph and weights on disk.
        seconds: how long the export took.
    """

    name: str
    path: Path
    dtype: str
    precision: str
    opset: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: tuple[str, ...]
    bytes: int
    seconds: float


def export(
    component: Component,
    folder: Path,
    *,
    dtype: torch.dtype,
    opset: int | None = None,
    quantization: Quantization | None = None,
) -> OnnxModel:
    """Writes model.onnx, model.onnx.data and config.json into `folder`.

    Args:
        component: what to export; its module is as before afterwards.
        folder: made where it is absent.
        dtype: float32, float16 or bfloat16: of the weights, and of floating inputs but `casting.FLOAT32_INPUTS`.
        opset: 18 or later, 22 or later for bfloat16, 19 or later with a quantization; None for 20, or 22.
        quantization: linears that compute in eight bits; their weights in the module are rounded already.

    Raises:
        ConfigError: a dtype or an opset that cannot be exported.
        ExportError: the module could not be captured or translated, or an axis that should change is fixed.
        ResourceError: not enough disk.
    """
    started = perf_counter()
    quantized = quantization is not None and bool(quantization.linears)
    opset = checked_opset(dtype, opset, quantized=quantized)
    _check(component)
    model, weights = lower(component, dtype, opset)
    passes.simplify(model, weights)
    passes.drop_still_transposes(model)
    passes.fold_transposes(model)
    passes.lower_doubles(model)
    passes.name_axes(model, component.dynamic_axes)
    if quantization is not None:
        insert(model, quantization)
    passes.strip(model, _provenance(component, dtype, opset))
    _check_axes(model, component)
    kept = tuple(name for name in model.graph.initializers if name.removesuffix(TRANSPOSED) in weights)
    size = _save(model, component, folder)
    return OnnxModel(
        name=component.name,
        path=folder / GRAPH,
        dtype=_NAMES[dtype],
        precision=quantization.format.name if quantization is not None and quantized else _NAMES[dtype],
        opset=opset,
        inputs=tuple(_port(value) for value in model.graph.inputs),
        outputs=tuple(_port(value) for value in model.graph.outputs),
        weights=kept,
        bytes=size,
        seconds=perf_counter() - started,
    )


def reweigh(model: OnnxModel, component: Component, folder: Path) -> OnnxModel:
    """Writes what `export` would of a component that differs from an exported one in its weights' values alone.

    Args:
        model: that one's, in floats: its graph is taken as it is, so that nothing is captured.
        component: the other.
        folder: made where it is absent.

    Raises:
        ExportError: a weight has another shape in the graph.
        ResourceError: not enough disk.
    """
    started = perf_counter()
    found = ir.load(model.path)
    parameters = dict(component.module.named_parameters(remove_duplicate=False))
    for name, value in found.graph.initializers.items():
        weight = name.removesuffix(TRANSPOSED)
        if weight not in parameters:
            continue
        tensor: ir.TensorProtocol = read_later(weight, parameters[weight], getattr(torch, model.dtype))
        value.const_value = tensor if weight == name else passes.transposed(tensor, name).const_value
        if value.const_value is None or value.const_value.shape != value.shape:
            raise ExportError(f"{component.name}: {weight} has another shape in {model.path}: they are not alike")
    size = _save(found, component, folder)
    return replace(model, name=component.name, path=folder / GRAPH, bytes=size, seconds=perf_counter() - started)


def checked_opset(dtype: torch.dtype, opset: int | None, *, quantized: bool = False) -> int:
    """The opset of a graph; raises ConfigError for a dtype or an opset that cannot be exported."""
    if dtype not in _OPSETS:
        raise ConfigError(f"cannot export {dtype}; known are float32, float16 and bfloat16")
    least, default = _OPSETS[dtype]
    if opset is not None and opset < least:
        raise ConfigError(
            f"opset {opset} has no {_NAMES[dtype]} graphs; take {least} or later, {default} is the default"
        )
    if quantized and opset is not None and opset < LEAST_OPSET:
        raise ConfigError(f"opset {opset} has no 8-bit graphs; take {LEAST_OPSET} or later, {default} is the default")
    return opset or default


def _check(component: Component) -> None:
    """Raises ExportError where the component could only be exported wrongly."""
    if component.module.training:
        raise ExportError(f"{component.name}: the module is in training mode; call .eval() before exporting it")
    for name, axes in component.dynamic_axes.items():
        if name not in component.inputs:
            raise ExportError(f"{component.name}: dynamic axes are given for {name}, which is no input")
        for axis, symbol in axes.items():
            if component.inputs[name].shape[axis] < 2:
                raise ExportError(f"{component.name}: the example of {name} has {symbol} < 2, which would be baked in")


def _check_axes(model: ir.Model, component: Component) -> None:
    for value in model.graph.inputs:
        for axis, symbol in component.dynamic_axes.get(str(value.name), {}).items():
            if _port(value).shape[axis] != symbol:
                raise ExportError(
                    f"{component.name}: axis {axis} of {value.name} should be '{symbol}' but is "
                    f"{_port(value).shape[axis]}: the module fixes that size"
                )


def _provenance(component: Component, dtype: torch.dtype, opset: int) -> dict[str, str]:
    packages = ("torch", "onnxscript", "onnx-ir")
    return {
        "obsdiff.component": component.name,
        "obsdiff.class": str(component.config.get("_class_name") or type(component.module).__name__),
        "obsdiff.dtype": _NAMES[dtype],
        "obsdiff.opset": str(opset),
        "obsdiff.version": __version__,
        **{f"obsdiff.{package}": version(package) for package in packages},
    }


def _save(model: ir.Model, component: Component, folder: Path) -> int:
    """Streams the weights, one at a time; returns the bytes of graph and weights."""
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(f"{component.name}: {folder} has {free:,} bytes free, the weights need {needed:,}")
    path = folder / GRAPH
    ir.save(
        model,
        path,
        external_data=DATA,
        size_threshold_bytes=_INLINE_BYTES,
        alignment=_ALIGNMENT,
        align_threshold=_INLINE_BYTES,
    )
    config = json.dumps(dict(component.config), indent=2, sort_keys=True)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    data = folder / DATA
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def _port(value: ir.Value) -> Port:
    shape = value.shape if value.shape is not None else ()
    sizes = tuple(size if isinstance(size, int) else str(size.value) for size in shape)
    return Port(name=str(value.name), dtype=str(value.dtype and value.dtype.name).lower(), shape=sizes)
