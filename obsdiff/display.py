"""What a person at the terminal sees: progress with the time left on stderr, tables on stdout."""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from obsdiff_runtime.progress import Lines, Progress, silent

if TYPE_CHECKING:
    from rich.table import Table

    from obsdiff.planning import Plan
    from obsdiff.results import LayerResult


def quiet_libraries() -> None:
    """Keeps what diffusers and transformers tell their own users off stderr; call it before they are imported."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")


@contextmanager
def progress_on_stderr(*, quiet: bool = False) -> Iterator[Progress]:
    """A progress callback: bars on a terminal, a line per finished stage where stderr goes to a file or a pipe."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield bars
    else:
        yield Lines()


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, int] = {}

        def show(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, note=note)
            progress.update(tasks[stage], completed=done, total=total, note="" if done >= total else note)  # type: ignore[arg-type]

        yield show


def show_plan(plan: "Plan", *, verbose: bool = False) -> None:
    """Prints a plan on stdout: what changes, what it costs, and what may surprise; every layer where verbose."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from obsdiff.wording import seconds, size

    console = Console()
    table = Table(title=f"plan  {plan.sparsity}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("", "before", "after", "after / before"):
        table.add_column(name, justify="left" if not name else "right")
    after, zeros = plan.parameters_after, plan.zeros
    table.add_row("parameters stored", *_pair(plan.parameters_before, after))
    table.add_row("parameters not zero", *_pair(plan.parameters_before, after - zeros))
    what = "one call of each denoiser" if plan.turns else "one denoiser call"
    table.add_row(f"MACs of {what}, one image", *_pair(plan.macs_before, plan.macs_after))
    for name, turn in plan.turns.items():
        table.add_row(f"parameters of {name}", *_pair(turn.parameters_before, turn.parameters_after))
        table.add_row(f"MACs of one call of {name}", *_pair(turn.macs_before, turn.macs_after))
    console.print(table)
    for kind in ("heads", "ffn"):
        cuts = [cut for cut in plan.cuts if cut.kind == kind and cut.kept < cut.units]
        if cuts:
            sizes = sorted({f"{cut.kept} of {cut.units}" for cut in cuts})
            console.print(f"{kind:<12}{len(cuts)} groups keep {', '.join(sizes)}", highlight=False)
    patterned = [layer for layer in plan.layers if layer.pattern is not None]
    if patterned:
        console.print(f"{'linears':<12}{len(patterned)} get the pattern {patterned[0].pattern}", highlight=False)
    console.print(f"{'calibration':<12}{_calibration(plan)}", highlight=False)
    estimates = plan.estimates
    host = estimates.host_bytes
    memory = f"of the GPU's memory and {size(host)} of its host's" if host else "of memory"
    console.print(
        f"{'estimates':<12}{size(estimates.memory_bytes)} {memory}, {size(estimates.checkpoint_bytes)} checkpoint, "
        f"{seconds(estimates.calibration_seconds)} calibration and {seconds(estimates.solver_seconds)} solving "
        "on this machine; estimates, not measurements",
        highlight=False,
    )
    if plan.decoding is not None:
        whole, tiled = plan.decoding.whole_bytes, plan.decoding.tile_bytes
        tiles = "" if tiled == whole else f", {size(tiled)} in tiles of {plan.decoding.tile}"
        console.print(f"{'decoding':<12}{size(whole)}{tiles}, by ONNX Runtime on a CPU; estimates", highlight=False)
    for note in plan.notes:
        console.print(f"[yellow]note[/] {note}", highlight=False)
    if verbose:
        console.print(_plan_layers(plan))


def _calibration(plan: "Plan") -> str:
    from obsdiff.wording import size

    streams = plan.streams
    if streams is None:
        grams = ", ".join(f"{package.grams} ({size(package.gram_bytes)})" for package in plan.packages)
        return f"{plan.denoiser_calls} denoiser calls; grams by package: {grams or 'none'}"
    where = "in the host's memory" if plan.estimates.host_bytes else "on the disk"
    backwards = (
        f"gradients, the work of {streams.gradient_calls}, which hold {size(streams.gradient_bytes)}; "
        if streams.gradient_calls
        else ""
    )
    return (
        f"{plan.denoiser_calls} denoiser calls, of which {streams.kept_calls} are walked through {streams.blocks} "
        f"blocks twice, dense and pruned: {streams.block_calls} block calls, in all the work of "
        f"{streams.denoiser_calls:.0f} denoiser calls; {backwards}"
        f"{streams.grams} grams, at most {size(streams.moment_bytes)} at a time; "
        f"{size(streams.waiting_bytes)} of hidden states, which wait {where}"
    )


def _pair(before: int, after: int) -> tuple[str, str, str]:
    from obsdiff.wording import count

    return count(before), count(after), f"{after / before:.3f}"


def _plan_layers(plan: "Plan") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("linear", "inputs", "outputs", "pattern", "left dense because"):
        table.add_column(name)
    for layer in plan.layers:
        inputs = str(layer.inputs) if layer.kept_inputs == layer.inputs else f"{layer.inputs} -> {layer.kept_inputs}"
        outputs = (
            str(layer.outputs) if layer.kept_outputs == layer.outputs else f"{layer.outputs} -> {layer.kept_outputs}"
        )
        table.add_row(layer.name, inputs, outputs, layer.pattern or "", layer.reason or "")
    return table


def layers_table(layers: "Sequence[LayerResult]") -> "Table":
    """What became of each linear."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("linear", overflow="fold")
    table.add_column("pattern", no_wrap=True)
    table.add_column("zeros", justify="right", no_wrap=True)
    table.add_column("loss", justify="right")
    explained = any(layer.reason for layer in layers)
    if explained:
        table.add_column("left dense because")
    for layer in layers:
        loss = "not measured" if layer.loss is None else f"{layer.loss:.2e}"
        reason = [layer.reason or ""] if explained else []
        table.add_row(layer.name, layer.pattern, f"{layer.zeros:.0%}", loss, *reason)
    return table
