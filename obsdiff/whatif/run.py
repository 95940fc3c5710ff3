"""The work of the verb `whatif`: what is asked about, what it is timed on, within a budget of minutes."""

import dataclasses
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Final

from obsdiff import whatif
from obsdiff.measurements import NotMeasured
from obsdiff.settings import Settings
from obsdiff.whatif import Step, WhatIf
from obsdiff.whatif import steps as whatif_steps
from obsdiff.whatif.backends import Place, dtype_of, place_of
from obsdiff.whatif.subject import Subject, subject_of
from obsdiff_export import roofline
from obsdiff_export.measuring import seconds_of
from obsdiff_runtime.progress import Progress, silent

LINEARS: Final = 0.6
"""Of the budget, for single linears; the rest is for whole calls."""

GRAPHED: Final = (
    "timed as CUDA graphs, as engines run; launched from Python one by one, 2:4 products in torch cost the host some "
    "half a millisecond each"
)


def run(
    settings: Settings,
    *,
    minutes: float = 5.0,
    shapes_only: bool = False,
    gpu: str | None = None,
    backend: str = "auto",
    threads: int | None = None,
    progress: Progress = silent,
) -> WhatIf:
    """Answers whether 2:4 is worth it, on which linears, and which widths are.

    Args:
        settings: the model or bundle, the size and the rest.
        minutes: to spend on timing; exporting and building engines take what they take.
        shapes_only: single linears alone: nothing is loaded, configurations suffice.
        gpu: estimate for this GPU from published peaks, and time nothing.
        backend: "auto", "tensorrt", "torch" or "cpu".
        threads: of ONNX Runtime; None: all cores.
        progress: told of the stages.

    Raises:
        ConfigError, ModelError, BundleError: what was asked for cannot be.
        CompatibilityError: the backend cannot run here.
        RunError: nothing could be timed.
    """
    seconds = seconds_of(minutes)
    if gpu is not None:
        card = roofline.gpu(gpu)
        dtype = dtype_of(settings, "fp16", "fp16", "bf16", "int8", "fp8")
        roofline.peak(card, dtype)
        return whatif.estimate(subject_of(settings), card, dtype)
    started = perf_counter()
    with tempfile.TemporaryDirectory(prefix="obsdiff-") as scratch:
        place = place_of(backend, settings, threads=threads, folder=Path(scratch))
        subject = subject_of(settings)
        own = seconds if shapes_only else LINEARS * seconds
        found = whatif.explore(subject, place.measurer, seconds=own, progress=progress)
        if place.measurer.backend == "torch":
            found = dataclasses.replace(found, notes=(*found.notes, GRAPHED))
        if shapes_only:
            return found
        left = max(seconds - (perf_counter() - started), (1 - LINEARS) * seconds)
        return _with_steps(found, _steps(subject, settings, place, left, progress))


def _steps(subject: Subject, settings: Settings, place: Place, seconds: float, progress: Progress) -> tuple[Step, ...]:
    if isinstance(place.runner, str):
        return (Step(name=whatif_steps.DENSE, ms=NotMeasured(why=place.runner)),)
    return whatif_steps.time_steps(subject, settings, place.runner, seconds=seconds, progress=progress)


def _with_steps(found: WhatIf, steps: tuple[Step, ...]) -> WhatIf:
    """The findings with whole calls, and how much of one the timed linears are."""
    notes = found.notes
    dense = next((step.ms for step in steps if step.name == whatif_steps.DENSE), None)
    times = [(row.dense_ms, row.linears) for row in found.rows]
    if isinstance(dense, float) and all(ms is not None for ms, _ in times):
        linears = sum((ms or 0.0) * count for ms, count in times)
        notes = (*notes, f"the linears, timed one by one, add up to {linears:.3g} ms of a call's {dense:.3g} ms")
    return dataclasses.replace(found, steps=steps, notes=notes)
