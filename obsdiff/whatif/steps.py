"""One denoiser call end to end, before any calibration: as it is, with 2:4 forced, and with units cut by magnitude.

Forced weights draw nothing that is worth seeing; they only make kernels choosable. The cut model is cut for real, so
that its graph has the widths that pruning would give it.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Protocol

import torch
from torch import nn

from obsdiff import job, pruning, turns
from obsdiff.defaults import vae_scale
from obsdiff.families import exporting, references
from obsdiff.measurements import NotMeasured
from obsdiff.resolving import resolve
from obsdiff.settings import Settings
from obsdiff.sizes import sizes_of
from obsdiff.sparsity import parse
from obsdiff.whatif import Step
from obsdiff.whatif.subject import Subject
from obsdiff_export import forcing, onnx
from obsdiff_export.measuring import FEWEST
from obsdiff_export.profiles import Size
from obsdiff_runtime.backends.ort import open_graph
from obsdiff_runtime.errors import ObsdiffError
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.timing import compare, interleaved, latency

DENSE: Final = "dense"
FORCED: Final = "2:4 forced"
CUT: Final = 0.25
"""Of the units: what is cut where --sparsity names none."""

ROUNDS: Final = 30


class Runner(Protocol):
    """What runs a whole graph."""

    @property
    def dtype(self) -> torch.dtype:
        """Graphs are exported in it."""
        ...

    @property
    def sparse(self) -> str:
        """Why 2:4 is of no use to it, "" where it has kernels."""
        ...

    def open(
        self, name: str, graph: Path, sizes: Mapping[str, Size], inputs: Mapping[str, Any], *, sparse: bool
    ) -> AbstractContextManager[Callable[[], object]]:
        """What runs the graph once, for as long as the context is open.

        Raises:
            ObsdiffError: it cannot run here; says why.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class OrtRunner:
    """ONNX Runtime on the CPU."""

    threads: int | None = None
    dtype: torch.dtype = torch.float32
    sparse: str = "ONNX Runtime has no sparse kernels on the CPU"

    @contextmanager
    def open(
        self, name: str, graph: Path, sizes: Mapping[str, Size], inputs: Mapping[str, Any], *, sparse: bool
    ) -> Iterator[Callable[[], object]]:
        session = open_graph(graph, name=name, threads=self.threads)
        yield lambda: session.run(inputs)


def time_steps(
    subject: Subject, settings: Settings, runner: Runner, *, seconds: float, progress: Progress = silent
) -> tuple[Step, ...]:
    """Times one denoiser call of each kind by turns.

    Args:
        subject: a bundle, or a model, which is loaded (and fetched, where it is on the Hub).
        settings: as given; the units of its sparsity are cut, or a quarter where it names none.
        runner: what runs the graphs.
        seconds: for timing; exporting and loading take what they take.
        progress: told of stage "end to end".
    """
    share = seconds / len(subject.components)
    return turns.told_apart(
        {component: _steps(subject, component, settings, runner, share, progress) for component in subject.components}
    )


def _steps(
    subject: Subject, component: str, settings: Settings, runner: Runner, seconds: float, progress: Progress
) -> tuple[Step, ...]:
    """Of one denoiser."""
    with tempfile.TemporaryDirectory(prefix="obsdiff-") as scratch:
        progress("end to end", 0, 3, "export")
        made = _graphs(subject, component, settings, runner, Path(scratch))
        progress("end to end", 1, 3, "load")
        sizes = sizes_of(
            subject.job.recipe.sampling,
            subject.job.pipeline_class,
            subject.job.configs[subject.job.family.denoiser],
            rows=subject.job.rows,
            text_tokens=subject.job.text_tokens,
            vae_scale=vae_scale(subject.job.configs),
        )
        found = _time(made, sizes, runner, seconds, progress)
    progress("end to end", 3, 3)
    return (*found, *(Step(name=name, ms=NotMeasured(why=why)) for name, why in made.absent.items()))


def _time(made: "_Graphs", sizes: Mapping[str, Size], runner: Runner, seconds: float, progress: Progress) -> list[Step]:
    runs: dict[str, Callable[[], object]] = {}
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        for name, graph in made.graphs.items():
            try:
                run = runner.open(name, graph, sizes, made.inputs, sparse=name == FORCED)
                runs[name] = stack.enter_context(run)
            except ObsdiffError as error:
                failures[name] = str(error)
        progress("end to end", 2, 3, "time")
        times = _interleaved(runs, seconds, failures)
    found = []
    for name in made.graphs:
        if name in times:
            against = compare(name, times[name], DENSE, times[DENSE]) if name != DENSE and DENSE in times else None
            found.append(Step(name=name, ms=latency(times[name]).p50_ms, comparison=against))
        else:
            found.append(Step(name=name, ms=NotMeasured(why=failures[name])))
    return found


def _interleaved(
    runs: Mapping[str, Callable[[], object]], seconds: float, failures: dict[str, str]
) -> dict[str, list[float]]:
    """Seconds by name; adds what did not run, or not in time, to `failures`."""
    started, fitting, round_seconds = perf_counter(), dict(runs), 0.0
    for name, run in runs.items():
        try:
            run()
            begun = perf_counter()
            run()
            took = perf_counter() - begun
        except ObsdiffError as error:
            failures[name] = str(error)
            del fitting[name]
            continue
        if (round_seconds + took) * FEWEST > seconds - (perf_counter() - started):
            failures[name] = f"a call takes {took:.1f} s; give it more --minutes"
            del fitting[name]
            continue
        round_seconds += took
    if not fitting:
        return {}
    left = seconds - (perf_counter() - started)
    rounds = int(min(max(left / round_seconds, FEWEST), ROUNDS))
    return interleaved(fitting, rounds, 1, silent)


@dataclass(frozen=True, kw_only=True)
class _Graphs:
    """What is timed: graphs by name, why others are absent, and the inputs of all of them."""

    graphs: dict[str, Path]
    absent: dict[str, str]
    inputs: dict[str, Any]


def _graphs(subject: Subject, component: str, settings: Settings, runner: Runner, folder: Path) -> _Graphs:
    if subject.bundle is not None:
        absent = {f"structured:{CUT}": "a bundle does not hold what belongs to a unit; give the model instead"}
        dense = subject.bundle.onnx(component)
        told = {port.name for port in subject.bundle.component(component).inputs}  # older ones are told less
        inputs = {name: value for name, value in _inputs(subject, subject.job.denoiser).items() if name in told}
        found = _Graphs(graphs={DENSE: dense}, absent=absent, inputs=inputs)
    else:
        found = _of_model(subject, settings, runner, folder)
    if runner.sparse:
        found.absent[FORCED] = runner.sparse
    else:
        fitting = [linear.name for linear in subject.components[component] if linear.shape.k % 4 == 0]
        forcing.force(found.graphs[DENSE], folder / "forced", 2, 4, linears=fitting)
        found.graphs[FORCED] = folder / "forced" / found.graphs[DENSE].name
    return found


def _of_model(subject: Subject, settings: Settings, runner: Runner, folder: Path) -> _Graphs:
    """Loads the model; exports its denoiser as it is, and once more without the units of least magnitude."""
    loaded = job.load(settings, steered=True)
    job.computable(loaded)

    def export(name: str) -> Path:
        sampled = subject.job.recipe.sampling
        denoiser = exporting.denoiser(
            loaded.pipeline, subject.job.family, loaded.denoiser, height=sampled.height, width=sampled.width
        )
        return onnx.export(denoiser, folder / name, dtype=runner.dtype, opset=settings.opset).path

    found = _Graphs(graphs={DENSE: export("dense")}, absent={}, inputs=_inputs(subject, loaded.denoiser))
    asked = subject.job.recipe.sparsity
    has_heads = any(group.kind == "heads" for group in subject.job.family.groups(loaded.denoiser))
    usual = parse(f"{'structured' if has_heads else 'ffn'}:{CUT}")
    units = replace(asked, pattern=None) if asked.structured else usual
    recipe = resolve(
        replace(settings, sparsity=str(units), method="magnitude", allocation=None, dense_share=None, fast=None),
        model=subject.model,
        family=subject.job.family,
        defaults=subject.job.defaults,
        prompts=subject.job.recipe.prompts[:1],  # none is drawn
    )
    name = f"{units} by magnitude"
    if pruning.prune(loaded.pipeline, subject.job.family, recipe).kept:
        found.graphs[name] = export("cut")
    else:
        found.absent[name] = "rounding leaves every group whole; lower --align"
    return found


def _inputs(subject: Subject, denoiser: nn.Module) -> dict[str, Any]:
    """Seeded inputs at the size that is asked about, by ONNX name."""
    call, scale = subject.call, vae_scale(subject.job.configs)
    example = subject.job.family.example(
        denoiser,
        batch=call["rows"],
        size=(call["height"] // scale, call["width"] // scale),
        text_tokens=call["text_tokens"],
        pixels=(call["height"], call["width"]),
    )
    told = references.alone(example, denoiser, subject.job.index, scale)
    return {name: tensor.float().numpy() for name, tensor in told.items()}
