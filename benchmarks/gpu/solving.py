"""The pruner's solve on the GPU: beside column-by-column OBS, and against its result on the CPU.

Layers and solvers are those of benchmarks/solver.py. Seconds are of one run after a small one that loads the
libraries; peak bytes are the allocator's, above what the layer itself takes.
"""

import dataclasses
import time

import torch

import solver
from gpu import clock
from gpu.rows import Options, Sheet
from obsdiff.core.linalg import Factor
from obsdiff.core.refit import row_losses
from obsdiff.core.solver import LEAN, SWEPT, solve
from obsdiff.sparsity import Pattern, parse

SIZES = ("1536x6144", "2432x9728", "3072x12288")
"""out x in: what SD3-medium, SD3.5-large and FLUX read from their neurons."""

SOLVERS = ("plain", "sweep", "full", "lean", "weighed", "fast")
AGREEING = "512x1536"


def run(sheet: Sheet, options: Options) -> None:
    device = torch.device(options.device)
    solver.give_freed_memory_back()
    pattern = parse("2:4").pattern
    if pattern is None:
        raise ValueError("2:4 is a pattern of single weights")
    solver.measure(*solver.layer(16, 32, device, 0), pattern, list(SOLVERS), 1)
    with sheet.case(layer="32x64" if options.tiny else AGREEING, what=f"{options.device} against cpu") as row:
        row.figures |= _agreement(str(row.case["layer"]), options.device, pattern)
    sizes = ("32x64",) if options.tiny else SIZES[:1] if options.quick else SIZES
    waiting = [(size, name) for size in sizes for name in SOLVERS]
    made: dict[str, tuple[torch.Tensor, Factor]] = {}
    while waiting and sheet.left() > 0:
        size, name = waiting.pop(0)
        with sheet.case(layer=size, solver=name, pattern="2:4") as row:
            if size not in made:
                made = {size: solver.layer(*_parse(size), device, 0)}
            found = solver.measure(*made[size], pattern, [name], 1)[name]
            row.figures |= {"seconds": found.seconds, "peak_bytes": found.peak_bytes, "relative_loss": found.loss}
    sheet.not_reached(len(waiting))


def _agreement(size: str, device: str, pattern: Pattern) -> dict[str, float]:
    """The same layer solved here and there: seconds of both, and how far apart the results are."""
    weight, factor = solver.layer(*_parse(size), torch.device("cpu"), 0)
    moved = dataclasses.replace(
        factor, gram=factor.gram.to(device), lower=factor.lower.to(device), dead=factor.dead.to(device)
    )
    found: dict[str, float] = {}
    for name, effort in (("sweep", SWEPT), ("lean", LEAN)):
        solve(weight.to(device), moved, pattern, effort=effort)
        clock.wait(device)
        started = time.perf_counter()
        there = solve(weight.to(device), moved, pattern, effort=effort)
        clock.wait(device)
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        here = solve(weight, factor, pattern, effort=effort)
        cpu_seconds = time.perf_counter() - started
        losses = [float(row_losses(x.weight.cpu(), weight, factor.gram).sum()) for x in (there, here)]
        found |= {
            f"{name}_device_seconds": seconds,
            f"{name}_cpu_seconds": cpu_seconds,
            f"{name}_loss_ratio": losses[0] / losses[1],
            f"{name}_support_difference": float((there.keep.cpu() ^ here.keep).float().mean()),
            f"{name}_max_difference": float((there.weight.cpu() - here.weight).abs().max()),
        }
    return found


def _parse(size: str) -> tuple[int, int]:
    rows, columns = size.split("x")
    return int(rows), int(columns)
