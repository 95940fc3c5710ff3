"""Pruning methods beside one another: what each does to a pipeline, and what it costs.

    python benchmarks/quality.py                                   the methods, on the shipped pipeline, 3 seeds
    python benchmarks/quality.py --rows ablations --seeds 0,1,2    the default method without each of its parts
    python benchmarks/quality.py --model digits --prompts-file digits/calibration_prompts.txt \
        --eval-prompts-file digits/evaluation_prompts.txt

Every run prunes the same dense model in a process of its own, calibrated on the same prompts with noise of its seed,
and is compared with the dense model on prompts and noise that calibration never saw. Ratios are to `obsdiff`, the
paper's method, at the same sparsity. Prints a table; asserts nothing.
"""

import dataclasses
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from obsdiff.settings import Settings

SPARSITIES = ("2:4", "0.6", "0.7", "structured:0.25", "structured:0.4")
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "dsnot": {"method": "dsnot"},
    "sparsegpt": {"method": "sparsegpt"},
    "obsdiff": {"method": "obsdiff"},
    "streamed --fast": {"method": "streamed", "fast": True},
    "streamed": {"method": "streamed"},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "obsdiff": {"method": "obsdiff"},
    "streamed": {},
    "without repair of the streams": {"method_options": {"repair": 0}},
    "guided combinations not counted": {"method_options": {"guided": 0}},
    "guided combinations count as much": {"method_options": {"guided": 1}},
    "errors of outputs count alike": {"method_options": {"metric": 0}},
    "without permutation": {"method_options": {"permute": 0}},
    "without ADMM: OBS supports": {"method_options": {"joint": 0}},
    "own outputs as targets": {"method_options": {"dense_targets": 0, "repair": 0}},
    "one picture a prompt": {"draws": 1, "kept_steps": 6},
    "pictures drawn in all steps": {"trajectory_steps": 20, "kept_steps": 2},
    "all steps weigh alike": {"time_weights": "uniform"},
    "the same share everywhere": {"allocation": "uniform"},
}
REFERENCE = "obsdiff"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One pruning and what came of it.

    Attributes:
        image_mse_median: over the pictures; a few that became other pictures make up much of the mean.
        calls: denoiser-equivalents: what the blocks' linears computed, over what they compute in one call of a batch.
        peak_bytes: largest resident size of the process until the model was pruned.
    """

    sparsity: str
    row: str
    seed: int
    velocity_error: float
    latents_relative: float
    image_mse: float
    image_mse_median: float
    obeyed: float | None
    dense_obeyed: float | None
    calls: float
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    macs: int


def main(
    model: Annotated[str | None, typer.Option(help="Default: the pipeline shipped with the package.")] = None,
    rows: Annotated[str, typer.Option(help="methods, ablations, or names of rows, separated by commas.")] = "methods",
    sparsities: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(SPARSITIES),
    seeds: Annotated[str, typer.Option(help="Of calibration, separated by commas.")] = "0,1,2",
    num_samples: Annotated[int, typer.Option(help="Calibration prompts.")] = 24,
    eval_prompts: Annotated[int, typer.Option(help="Held-out prompts.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Prompts per batch.")] = 8,
    align: Annotated[int, typer.Option(help="Rounding of kept FFN widths.")] = 64,
    jobs: Annotated[int, typer.Option(help="Runs side by side, one thread each.")] = 1,
    prompts_file: Annotated[Path | None, typer.Option(help="Calibration prompts.")] = None,
    eval_prompts_file: Annotated[Path | None, typer.Option(help="Held-out prompts.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the runs go as JSON, one a line.")] = None,
) -> None:
    common: dict[str, Any] = {
        "model": model,
        "num_samples": num_samples,
        "eval_prompts": eval_prompts,
        "batch_size": batch_size,
        "align": align,
        "prompts_file": None if prompts_file is None else str(prompts_file),
        "eval_prompts_file": None if eval_prompts_file is None else str(eval_prompts_file),
    }
    wanted = [
        (sparsity, row, int(seed), {**common, **settings, "sparsity": sparsity, "seed": 1000 * int(seed)})
        for seed in seeds.split(",")
        for sparsity in sparsities.split(",")
        for row, settings in _rows(rows).items()
        if not (row == "dsnot" and sparsity.startswith("structured"))
    ]
    runs: list[Run] = []
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        for run in track(pool.imap_unordered(_measure, wanted), total=len(wanted), console=Console(stderr=True)):
            runs.append(run)
            if out is not None:
                with out.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(dataclasses.asdict(run)) + "\n")
    Console(width=180).print(_table(runs, list(_rows(rows))))


def _rows(text: str) -> Mapping[str, dict[str, Any]]:
    if text == "methods":
        return METHODS
    if text == "ablations":
        return ABLATIONS
    known = METHODS | ABLATIONS
    return {name: known[name] for name in text.split(",")}


def _measure(wanted: tuple[str, str, int, dict[str, Any]]) -> Run:
    """Prunes and compares, in this process."""
    sparsity, row, seed, fields = wanted
    import copy

    import torch

    from obsdiff import pruning
    from obsdiff.bundling import compare
    from obsdiff.display import quiet_libraries
    from obsdiff.job import computable, load, open_job
    from obsdiff.measurements import NotMeasured
    from obsdiff.recipe import evaluation_prompts
    from obsdiff_runtime.progress import silent

    quiet_libraries()
    torch.set_num_threads(1)
    settings = Settings(**fields)
    job, loaded = open_job(settings), load(settings)
    stored = computable(loaded)
    dense = copy.deepcopy(loaded.denoisers)
    with _counted(loaded, job) as counter:
        started, busy = time.perf_counter(), time.process_time()
        pruned = pruning.prune(loaded.pipeline, loaded.family, job.recipe, stored=stored)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found, _ = compare(
        job,
        pruned,
        dense,
        evaluation_prompts(settings, job.defaults.prompts, job.defaults.labels),
        silent,
        keep_images=0,
    )
    if isinstance(found, NotMeasured):
        raise typer.BadParameter(found.why)
    return Run(
        sparsity=sparsity,
        row=row,
        seed=seed,
        velocity_error=found.velocity_error,
        latents_relative=found.latents_relative,
        image_mse=found.image_mse,
        image_mse_median=statistics.median(result.image_mse for result in found.per_prompt),
        obeyed=None if found.pruned_obedience is None else found.pruned_obedience.share,
        dense_obeyed=None if found.dense_obedience is None else found.dense_obedience.share,
        calls=counter[0],
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        peak_bytes=peak,
        macs=_macs(job, pruned.denoiser),
    )


def _macs(job: Any, denoiser: Any) -> int:
    """Multiply-accumulates of the linears of one call on one image, at the widths that are left."""
    from obsdiff import costs

    return costs.macs(denoiser, job.positions(denoiser))


@contextmanager
def _counted(loaded: Any, job: Any) -> Iterator[list[float]]:
    """Counts the denoiser's calls: the multiply-accumulates that its blocks' linears ran, over those of one call.

    So a block that is stopped half-way counts half. Calls of a full batch are what is counted in.
    """
    import torch

    linears = loaded.family.linears(loaded.denoiser)
    rows = job.recipe.sampling.batch_size * job.rows
    positions = job.positions(loaded.denoiser)
    whole = rows * sum(each.in_features * each.out_features * positions[each.name] for each in linears)
    counter = [0.0]

    def count(module: Any, args: Any, _: Any) -> None:
        if "forward" in vars(module):  # stood in for: it does not run
            return
        backwards = torch.is_grad_enabled()  # it will be differentiated, which takes as many
        counter[0] += (2 if backwards else 1) * args[0].numel() * module.out_features / whole

    handles = [loaded.denoiser.get_submodule(each.name).register_forward_hook(count) for each in linears]
    try:
        yield counter
    finally:
        for handle in handles:
            handle.remove()


def _table(runs: Sequence[Run], order: Sequence[str]) -> Table:
    table = Table(
        *(
            "sparsity",
            "row",
            "velocity error",
            "ratio",
            "image MSE",
            "ratio",
            "median",
            "ratio",
            "obeyed",
            "MACs",
            "calls",
            "ratio",
        ),
        *("CPU s", "ratio", "peak MB", "ratio"),
    )
    for sparsity in dict.fromkeys(run.sparsity for run in runs):
        base = [run for run in runs if run.sparsity == sparsity and run.row == REFERENCE]
        for row in order:
            mine = [run for run in runs if run.sparsity == sparsity and run.row == row]
            if not mine:
                continue
            table.add_row(
                sparsity,
                row,
                _spread([run.velocity_error for run in mine], ".4f"),
                _ratio(mine, base, "velocity_error"),
                _spread([run.image_mse for run in mine], ".5f"),
                _ratio(mine, base, "image_mse"),
                _spread([run.image_mse_median for run in mine], ".5f"),
                _ratio(mine, base, "image_mse_median"),
                _obeyed(mine),
                f"{statistics.mean(run.macs for run in mine) / 1e6:.0f} M",
                f"{statistics.mean(run.calls for run in mine):.0f}",
                _ratio(mine, base, "calls"),
                f"{statistics.mean(run.cpu_seconds for run in mine):.0f}",
                _ratio(mine, base, "cpu_seconds"),
                f"{statistics.mean(run.peak_bytes for run in mine) / 1e6:.0f}",
                _ratio(mine, base, "peak_bytes"),
            )
        table.add_section()
    return table


def _spread(values: Sequence[float], how: str) -> str:
    text = format(statistics.mean(values), how)
    return text if len(values) < 2 else f"{text} ± {format(statistics.stdev(values), how)}"


def _ratio(mine: Sequence[Run], base: Sequence[Run], name: str) -> str:
    """Of the means over the seeds."""
    if not base:
        return ""
    over, under = (statistics.mean(getattr(run, name) for run in runs) for runs in (mine, base))
    return f"{over / under:.2f}"


def _obeyed(runs: Sequence[Run]) -> str:
    if runs[0].obeyed is None:
        return ""
    mine, dense = (statistics.mean(getattr(run, name) for run in runs) for name in ("obeyed", "dense_obeyed"))
    return f"{100 * mine:.1f} % (dense {100 * dense:.1f})"


if __name__ == "__main__":
    typer.run(main)
