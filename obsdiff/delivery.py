"""From a pipeline to a bundle's content: ONNX folders, engines, manifest entries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from torch import nn

from obsdiff import encoders
from obsdiff.checkpoint import save_index
from obsdiff.families import Family, exporting, references, rows
from obsdiff.measurements import ExportedComponent, LatencyPair, NotMeasured
from obsdiff.recipe import Sampling
from obsdiff.settings import Settings
from obsdiff.sparsity import NM
from obsdiff.weights import main_dtype
from obsdiff_export import onnx, parity, pattern
from obsdiff_export.build import Engine
from obsdiff_export.component import Component
from obsdiff_export.engines import engine_entry
from obsdiff_export.onnx import OnnxModel
from obsdiff_export.pattern import PatternReport
from obsdiff_export.quantizing import Quantization
from obsdiff_export.stored import is_stored
from obsdiff_runtime.backends.ort import open_graph
from obsdiff_runtime.bundle import ComponentEntry, TensorEntry
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.timing import time_interleaved

DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RUNS: Final = 40
"""Timed denoiser calls of each model."""

UNCOMPARED: Final = NotMeasured(why="--low-memory runs no network")


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """A component in the bundle."""

    component: Component
    model: OnnxModel
    max_error: float | NotMeasured
    patterns: tuple[PatternReport, ...]
    engines: tuple[Engine, ...] = ()

    def report(self) -> ExportedComponent:
        return ExportedComponent(
            name=self.model.name,
            dtype=in_words(self.model),
            bytes_on_disk=self.model.bytes,
            max_error=self.max_error,
        )

    def entry(self, root: Path) -> ComponentEntry:
        return ComponentEntry(
            onnx=self.model.path.relative_to(root).as_posix(),
            dtype=self.model.dtype,
            precision=self.model.precision,
            inputs=tuple(TensorEntry(name=port.name, dtype=port.dtype, shape=port.shape) for port in self.model.inputs),
            outputs=tuple(
                TensorEntry(name=port.name, dtype=port.dtype, shape=port.shape) for port in self.model.outputs
            ),
            engines=tuple(engine_entry(engine, root) for engine in self.engines),
        )


def notes(delivered: Sequence[Delivered]) -> tuple[str, ...]:
    """What a user should know of components that were not compared with torch."""
    names = [each.model.name for each in delivered if isinstance(each.max_error, NotMeasured)]
    if not names:
        return ()
    return (f"--low-memory: the graphs of {', '.join(names)} were not compared with torch, and nothing was timed",)


def in_words(model: OnnxModel) -> str:
    """What a graph computes in: "float16", or "fp8 in float16" where only its linears have eight bits."""
    return model.dtype if model.precision == model.dtype else f"{model.precision} in {model.dtype}"


def dtype_of(component: str, settings: Settings, stored: nn.Module | None = None) -> torch.dtype:
    """The precision of a component's graph.

    auto: float16 where engines are built, because sparse kernels exist for it and not for float32; but the VAE
    stays float32, because several overflow in float16. Weights that go from file to file (`stored`) stay as they are.
    """
    asked = settings.dtype or "auto"
    if asked == "auto" and stored is not None:
        kept = main_dtype(stored)
        asked = next((name for name, dtype in DTYPES.items() if dtype == kept), "fp32")
    elif asked == "auto":
        asked = "fp16" if settings.trt and not component.startswith("vae") else "fp32"
    if asked not in DTYPES:
        raise ConfigError(f"--dtype {asked}: there are auto, {', '.join(DTYPES)}")
    return DTYPES[asked]


def deliver(
    pipeline: DiffusionPipeline,
    family: Family,
    folder: Path,
    sampling: Sampling,
    settings: Settings,
    *,
    pruned: Mapping[str, Sequence[str]],
    expected: NM | None,
    quantizations: Mapping[str, Quantization],
    progress: Progress = silent,
) -> tuple[Delivered, ...]:
    """Exports every component, compares it with torch, and checks the pattern in the denoiser's graph.

    Args:
        pipeline: with the pruned denoiser.
        family: of the denoiser.
        folder: the bundle being written.
        sampling: the served size.
        settings: dtype and opset.
        pruned: linears whose weights must hold the pattern, by denoiser.
        expected: the pattern, where there is one.
        quantizations: of denoisers whose weights are rounded, by name.
        progress: told component by component.

    Raises:
        ExportError: a graph that cannot be made, differs from torch, or does not hold the pattern.
    """
    components = exporting.components(family, pipeline, height=sampling.height, width=sampling.width)
    delivered = []
    for index, component in enumerate(components):
        progress("export", index, len(components), component.name)
        left = is_stored(component.module) and not encoders.is_settled(component.module)
        dtype = dtype_of(component.name, settings, component.module if left else None)
        rounding = quantizations.get(component.name)
        model = onnx.export(
            component, folder / component.name, dtype=dtype, opset=settings.opset, quantization=rounding
        )
        error = UNCOMPARED if left else parity.compare(component, model, quantization=rounding).max_relative_error
        reports: list[PatternReport] = []
        if component.name in pruned and expected is not None:
            names = [f"{name}.weight" for name in pruned[component.name]]
            reports = pattern.check(model.path, expected.n, expected.m, names)
        delivered.append(Delivered(component=component, model=model, max_error=error, patterns=tuple(reports)))
    progress("export", len(components), len(components))
    return tuple(delivered)


def copy_rest(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Writes what the runtime needs beside the networks: model_index.json, tokenizers, processors, the scheduler.

    A tokenizer's side of padding is written, too, which transformers leaves to the class that reads it.
    """
    save_index(pipeline, folder)
    for name, component in pipeline.components.items():
        if component is not None and (name.startswith("tokenizer") or name in ("scheduler", "image_processor")):
            tokenizer = getattr(component, "tokenizer", component)  # of a processor, which reads images, too
            if hasattr(tokenizer, "padding_side"):
                tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side
            component.save_pretrained(folder / name)


def export_denoiser(
    pipeline: DiffusionPipeline,
    family: Family,
    denoiser: nn.Module,
    folder: Path,
    sampling: Sampling,
    *,
    like: Delivered,
    opset: int | None,
) -> OnnxModel:
    """Writes the graph of another denoiser, the dense one say, to `folder`; in the dtype of one that was delivered.

    Where nothing was cut, and that one computes in floats, the graphs are the same but for the weights' values.
    """
    component = exporting.denoiser(pipeline, family, denoiser, height=sampling.height, width=sampling.width)
    model = like.model
    if model.precision == model.dtype and _shapes(component.module) == _shapes(like.component.module):
        return onnx.reweigh(model, component, folder)
    return onnx.export(component, folder, dtype=getattr(torch, model.dtype), opset=opset)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def time_denoisers(
    family: Family,
    denoiser: nn.Module,
    dense: OnnxModel,
    pruned: OnnxModel,
    sampling: Sampling,
    index: Mapping[str, Any],
    *,
    text_tokens: int,
    vae_scale: int,
    what: str,
    progress: Progress = silent,
) -> LatencyPair | NotMeasured:
    """One call of the dense and of the pruned graph through ONNX Runtime on the CPU, in turn.

    Args:
        family: of both.
        denoiser: either; says what the inputs look like.
        dense: the graph of the denoiser before pruning.
        pruned: the graph in the bundle, in the same dtype.
        sampling: the served size.
        index: of their pipeline, as in model_index.json; where it is told pictures, the calls are told none.
        text_tokens: of one prompt.
        vae_scale: pixels per side of a latent pixel.
        what: is timed, in words.
        progress: told of the runs.
    """
    if pruned.dtype == "bfloat16":
        return NotMeasured(why="ONNX Runtime has no bfloat16 kernels on the CPU; build engines and time those")
    images = rows(family, denoiser, sampling.guidance_scale)
    sessions = {"dense": open_graph(dense.path), "pruned": open_graph(pruned.path)}
    example = family.example(
        denoiser,
        batch=images,
        size=sampling.latents(vae_scale),
        text_tokens=text_tokens,
        pixels=(sampling.height, sampling.width),
    )
    inputs = {
        name: each.float().numpy() for name, each in references.alone(example, denoiser, index, vae_scale).items()
    }
    timings = time_interleaved(
        {name: lambda session=session: session.run(inputs) for name, session in sessions.items()},  # type: ignore[misc]
        RUNS,
        3,
        lambda stage, done, total, note="": progress("time", done, total, note),
    )
    return LatencyPair.of(
        timings,
        what=what,
        backend=f"ONNX Runtime on the CPU, {in_words(pruned)}",
        shape=f"{images} x {sampling.height}x{sampling.width} pixels, {text_tokens} text tokens",
    )
