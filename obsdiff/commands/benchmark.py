"""The verb bench. It imports torch only where a candidate needs it."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from obsdiff.command import Run, option, verb
from obsdiff.commands.bundles import BACKEND, THREADS
from obsdiff_runtime.errors import ConfigError


@verb(
    "bench",
    ("steps", "guidance_scale", "height", "width", "max_sequence_length", "seed", "device"),
    candidates=(
        Annotated[
            list[str] | None,
            typer.Argument(
                help="Bundles: FOLDER or FOLDER@BACKEND. Pipelines in torch: diffusers:MODEL, or compiled:MODEL for "
                "its blocks by torch.compile; MODEL is a diffusers folder, a pruned one, a Hub id, or nothing for the "
                "shipped pipeline."
            ),
        ],
        None,
    ),
    against=option(str | None, "--against", text="What each is compared with; default: the first."),
    iterations=option(int, "--iterations", text="Measured rounds; each candidate draws once in each.", default=10),
    warmup=option(int, "--warmup", text="Rounds before measuring.", default=2),
    num_images=option(int, "--num-images", text="Images drawn in one call.", default=1),
    dtype=option(
        str | None, "--dtype", text="Of pipelines in torch: fp32, fp16 or bf16; default: as stored, fp32 on a CPU."
    ),
    html=option(Path | None, "--html", text="Also write a page with charts."),
    backend=BACKEND,
    threads=THREADS,
)
def bench(run: Run) -> None:
    """Time, throughput, memory and energy of bundles and pipelines, by turns; what is noise is called so."""
    from obsdiff.candidates import Terms, open_candidates
    from obsdiff_runtime.benchmark import bench, table

    settings, options = run.settings, run.options
    named = options["candidates"] or []
    if not named:
        raise ConfigError("name what to measure: a bundle's folder, or diffusers: for the shipped pipeline in torch")
    texts = [*named, *([] if options["against"] is None else [options["against"]])]
    terms = Terms(
        backend=options["backend"], dtype=options["dtype"], device=settings.device, threads=options["threads"]
    )
    runners = open_candidates(texts, terms)
    report = bench(
        *runners[: len(named)],
        against=runners[-1] if options["against"] is not None else None,
        **{name: options[name] for name in ("iterations", "warmup", "num_images", "threads")},
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        max_sequence_length=settings.max_sequence_length,
        seed=settings.seed or 0,
        progress=run.progress,
    )
    if options["html"] is not None:
        from obsdiff.bench_page import page

        options["html"].parent.mkdir(parents=True, exist_ok=True)
        options["html"].write_text(page(report, shlex.join(["obsdiff", *sys.argv[1:]])), encoding="utf-8")
    run.print_result(report.to_json(), lambda: print(table(report)))
