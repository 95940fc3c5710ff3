"""The solver at real widths: seconds, peak memory and loss, beside a plain column-by-column OBS on the same tensors.

    python benchmarks/solver.py --sizes 1536x6144,2432x9728,3072x12288

Weights and inputs are random with the features that matter (a power-law spectrum, channels ten times as loud as the
others). Every round runs each solver once, in turn, so that a busy machine slows all of them; the fastest round
counts. `busy s` is the process's time on the CPU, which other processes hardly change; the ratio to the sweep is of
busy seconds on a CPU and of seconds on a GPU. Prints a table; asserts nothing.

plain       OBS one column at a time, each removal written into all columns to its right: no lazy blocks
sweep       obsdiff.core.support.sweep: the same with lazy blocks
full        obsdiff.core.solver.solve: ADMM and sweep, both refitted, the better of each row or layer
lean        the same without the sweep: no loop over columns
weighed     lean, with a metric of the outputs as gradients give it; `loss` counts all directions alike
fast        half of its products
"""

import ctypes
import functools
import platform
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from obsdiff.core import linalg
from obsdiff.core.linalg import Factor
from obsdiff.core.metric import GradientMoments, Metric
from obsdiff.core.refit import row_losses
from obsdiff.core.solver import FAST, FULL, LEAN, solve
from obsdiff.core.support import check_groups, count, smallest, sweep
from obsdiff.sparsity import NM, Pattern, parse
from obsdiff_runtime.errors import ObsdiffError

Solver = Callable[[Tensor, Factor, Pattern], Tensor]


@dataclass
class Result:
    """Of one solver on one layer; the best of its rounds."""

    seconds: float
    busy_seconds: float
    peak_bytes: int
    loss: float


def plain(weight: Tensor, factor: Factor, pattern: Pattern) -> Tensor:
    """OBS as it is written in the papers, with the supports chosen as `sweep` chooses them."""
    weight, upper = weight.clone(), factor.upper.to(weight.dtype)
    rows, columns = weight.shape
    energy = upper.diagonal().square()
    drop = torch.zeros_like(weight, dtype=torch.bool)
    for j in range(columns):
        if isinstance(pattern, NM) and j % pattern.m == 0:
            group = slice(j, j + pattern.m)
            drop[:, group] = smallest(weight[:, group].square() / energy[group], pattern.n)
        elif not isinstance(pattern, NM) and j % 128 == 0:
            score = weight[:, j : j + 128].square() / energy[j : j + 128]
            drop[:, j : j + 128] = smallest(score.flatten(), count(score.numel(), pattern.ratio)).view(rows, -1)
        error = weight[:, j].masked_fill(~drop[:, j], 0) / upper[j, j]
        weight[:, j:] -= torch.outer(error, upper[j, j:])
        weight[:, j].masked_fill_(drop[:, j], 0)
    return weight


@functools.cache
def metric(out: int, device: torch.device) -> Metric | None:
    """Of gradients with a power-law spectrum."""
    random = torch.Generator().manual_seed(1)
    few = torch.randn(64, out, generator=random) * torch.arange(1, 65).float().pow(-1)[:, None]
    sums = GradientMoments(out, device)
    sums.add(torch.randn(4096, 64, generator=random) @ few + 0.1 * torch.randn(4096, out, generator=random))
    return sums.metric()


SOLVERS: dict[str, Solver] = {
    "plain": plain,
    "sweep": lambda weight, factor, pattern: sweep(weight, factor.upper, pattern)[0],
    "full": lambda weight, factor, pattern: solve(weight, factor, pattern, effort=FULL).weight,
    "lean": lambda weight, factor, pattern: solve(weight, factor, pattern, effort=LEAN).weight,
    "weighed": lambda weight, factor, pattern: (
        solve(weight, factor, pattern, metrics=[metric(len(weight), weight.device)], effort=LEAN).weight
    ),
    "fast": lambda weight, factor, pattern: solve(weight, factor, pattern, effort=FAST).weight,
}


class Peak:
    """The most memory above what was in use at entry: of the allocator on CUDA, else of the process, sampled."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._before = psutil.Process().memory_info().rss
            self._sampler.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self._done.set()
            self._sampler.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, process.memory_info().rss - self._before)


def layer(rows: int, columns: int, device: torch.device, seed: int) -> tuple[Tensor, Factor]:
    """A weight, float32, and the factor of a gram, in which mixed channels meet a few loud ones."""
    generator = torch.Generator(device).manual_seed(seed)
    gram = torch.zeros(columns, columns, dtype=torch.float64, device=device)
    mix = torch.randn(columns, columns, generator=generator, device=device) / columns**0.5
    spectrum = torch.arange(1, columns + 1, device=device) ** -0.6 * columns**0.6
    loud = torch.ones(columns, device=device)
    loud[torch.randperm(columns, generator=generator, device=device)[: columns // 50]] = 10
    tokens = 3 * columns
    for start in range(0, tokens, 4096):
        x = torch.randn(min(4096, tokens - start), columns, generator=generator, device=device)
        x = (x * spectrum) @ mix * loud
        gram += (x.mT @ x).double() / tokens
    weight = torch.randn(rows, columns, generator=generator, device=device) / loud
    factor = linalg.factorise(gram)
    _ = factor.upper  # which the sweep goes by; made when it is asked for first
    return weight, factor


def measure(weight: Tensor, factor: Factor, pattern: Pattern, names: list[str], rounds: int) -> dict[str, Result]:
    """Each solver, interleaved; the lowest time and the highest peak of its rounds."""
    results: dict[str, Result] = {}
    energy = float(row_losses(torch.zeros_like(weight), weight, factor.gram).sum())
    for _ in range(rounds):
        for name in names:
            with Peak(weight.device) as peak:
                started, busy = time.perf_counter(), time.process_time()
                found = SOLVERS[name](weight, factor, pattern)
                if weight.is_cuda:
                    torch.cuda.synchronize()
                seconds, busy = time.perf_counter() - started, time.process_time() - busy
            loss = float(row_losses(found, weight, factor.gram).sum()) / energy
            best = results.setdefault(name, Result(seconds, busy, peak.bytes, loss))
            best.seconds, best.busy_seconds = min(best.seconds, seconds), min(best.busy_seconds, busy)
            best.peak_bytes = max(best.peak_bytes, peak.bytes)
    return results


def give_freed_memory_back() -> None:
    """Lets glibc unmap every freed tensor, so that the process's size follows what is in use; elsewhere peaks of
    later solvers read low."""
    if sys.platform == "linux":
        mmap_threshold = -3  # M_MMAP_THRESHOLD of <malloc.h>; setting it also stops it from growing
        ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 16)


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        what = torch.cuda.get_device_name(device)
    else:
        what = f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    return f"{what}; torch {torch.__version__}, Python {platform.python_version()}"


def main(
    sizes: Annotated[
        str | None,
        typer.Option(
            help="Layers, out x in, such as 1536x6144,2432x9728,3072x12288 (the default on a GPU). On a CPU the "
            "default is 512x2048 and 1536x1536, ten to twenty minutes on one busy core."
        ),
    ] = None,
    sparsities: Annotated[str, typer.Option(help="Patterns: N:M or unstructured ratios.")] = "2:4,0.6",
    solvers: Annotated[
        str, typer.Option(help=f"Of {', '.join(SOLVERS)}; sweep is what the others are compared with.")
    ] = (",".join(SOLVERS)),
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved; the fastest counts.")] = 2,
    threads: Annotated[int | None, typer.Option(help="Of torch on the CPU.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and inputs.")] = 0,
) -> None:
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if threads is not None:
        torch.set_num_threads(threads)
    give_freed_memory_back()
    widths = sizes or ("1536x6144,2432x9728,3072x12288" if where.type == "cuda" else "512x2048,1536x1536")
    names = solvers.split(",")
    unknown = [name for name in [*names] if name not in SOLVERS]
    if unknown or "sweep" not in names:
        raise typer.BadParameter(f"--solvers are {', '.join(SOLVERS)}, sweep among them; not {solvers}")
    table = Table(
        "layer",
        "sparsity",
        "solver",
        "s",
        "busy s",
        "time / sweep",
        "peak MiB",
        "loss",
        "loss / sweep",
        title=machine(where),
    )
    try:
        for width in widths.split(","):
            rows, columns = (int(number) for number in width.split("x"))
            weight, factor = layer(rows, columns, where, seed)
            for sparsity in sparsities.split(","):
                pattern = parse(sparsity).pattern
                if pattern is None:
                    raise typer.BadParameter(f"{sparsity} is no pattern of single weights")
                check_groups(columns, pattern)
                results = measure(weight, factor, pattern, names, rounds)
                for name, found in results.items():
                    table.add_row(width, sparsity, name, *_cells(found, results["sweep"], where))
    except ObsdiffError as failure:
        raise typer.BadParameter(str(failure)) from failure
    Console(width=120).print(table)


def _cells(found: Result, sweep_result: Result, device: torch.device) -> list[str]:
    if device.type == "cuda":
        ratio = found.seconds / sweep_result.seconds
    else:
        ratio = found.busy_seconds / sweep_result.busy_seconds
    return [
        f"{found.seconds:.2f}",
        f"{found.busy_seconds:.2f}",
        f"{ratio:.2f}",
        f"{found.peak_bytes / 2**20:.0f}",
        f"{found.loss:.5f}",
        f"{found.loss / sweep_result.loss:.3f}",
    ]


if __name__ == "__main__":
    typer.run(main)
