"""Pruning methods beside one another: what each does to the shipped pipeline, or to another one.

    python benchmarks/quality.py --num-samples 16 --eval-prompts 48

Every row prunes the same dense model with the same calibration prompts and is compared with it on the same held-out
prompts and noise. Prints a table; asserts nothing.
"""

import copy
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from obsdiff import pruning
from obsdiff.bundling import compare
from obsdiff.display import progress_on_stderr, quiet_libraries
from obsdiff.job import computable, load, open_job
from obsdiff.measurements import NotMeasured
from obsdiff.recipe import evaluation_prompts
from obsdiff.settings import Settings

ROWS = (
    ("2:4", "magnitude"),
    ("2:4", "wanda"),
    ("2:4", "obsdiff"),
    ("0.5", "magnitude"),
    ("0.5", "wanda"),
    ("0.5", "obsdiff"),
    ("structured:0.25", "magnitude"),
    ("structured:0.25", "obsdiff"),
)


def main(
    model: Annotated[str | None, typer.Option(help="Default: the pipeline shipped with the package.")] = None,
    num_samples: Annotated[int, typer.Option(help="Calibration prompts.")] = 16,
    eval_prompts: Annotated[int, typer.Option(help="Held-out prompts.")] = 48,
    batch_size: Annotated[int, typer.Option(help="Prompts per batch.")] = 8,
    align: Annotated[int, typer.Option(help="Rounding of kept FFN widths.")] = 64,
) -> None:
    quiet_libraries()
    table = Table("sparsity", "method", "velocity error", "latents", "PSNR dB", "SSIM", "obeyed", "prune s")
    for sparsity, method in ROWS:
        settings = Settings(
            model=model,
            sparsity=sparsity,
            method=method,
            num_samples=num_samples,
            eval_prompts=eval_prompts,
            batch_size=batch_size,
            align=align,
        )
        job, loaded = open_job(settings), load(settings)
        stored = computable(loaded)
        dense = copy.deepcopy(loaded.denoiser)
        with progress_on_stderr() as progress:
            started = time.perf_counter()
            pruned = pruning.prune(loaded.pipeline, loaded.family, job.recipe, stored=stored, progress=progress)
            seconds = time.perf_counter() - started
            prompts = evaluation_prompts(settings, job.defaults.prompts)
            found, _ = compare(job, pruned, dense, prompts, progress)
        if isinstance(found, NotMeasured):
            raise typer.BadParameter(found.why)
        dense_obedience, obeyed = found.dense_obedience, found.pruned_obedience
        table.add_row(
            sparsity,
            method,
            f"{found.velocity_error:.4f}",
            f"{found.latents_relative:.4f}",
            "" if found.psnr_db is None else f"{found.psnr_db:.1f}",
            f"{found.ssim:.3f}",
            "" if obeyed is None else f"{obeyed.obeyed} of {obeyed.prompts}",
            f"{seconds:.0f}",
        )
    Console(width=120).print(table)
    if dense_obedience is not None:
        print(f"dense: {dense_obedience.obeyed} of {dense_obedience.prompts} prompts obeyed")


if __name__ == "__main__":
    typer.run(main)
