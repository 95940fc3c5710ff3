"""The verb bench. It imports torch only where a candidate needs it."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from obsdiff.command import Run, option, options, verb
from obsdiff_runtime.errors import ConfigError, require_file
from obsdiff_runtime.flags import BACKEND, ROUNDS, THREADS, TILING
from obsdiff_runtime.server.options import read_tiling


@verb(
    "bench",
    (
        *("steps", "guidance_scale", "guidance_scale_2", "height", "width", "num_frames", "max_sequence_length"),
        *("seed", "device"),
    ),
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
    **options(*ROUNDS),
    dtype=option(
        str | None, "--dtype", text="Of pipelines in torch: fp32, fp16 or bf16; default: as stored, fp32 on a CPU."
    ),
    html=option(Path | None, "--html", text="Also write a page with charts."),
    **options(BACKEND, THREADS, *TILING),
)
def bench(run: Run) -> None:
    """Time, throughput, memory and energy of bundles and pipelines, by turns; what is noise is called so."""
    from obsdiff.candidates import Terms, open_candidates
    from obsdiff_runtime.benchmark import bench, table

    settings, given = run.settings, run.options
    named = given["candidates"] or []
    if not named:
        raise ConfigError("name what to measure: a bundle's folder, or diffusers: for the shipped pipeline in torch")
    if given["html"] is not None:
        require_file("--html", given["html"])
    texts = [*named, *([] if given["against"] is None else [given["against"]])]
    terms = Terms(
        backend=given["backend"],
        dtype=given["dtype"],
        device=settings.device,
        threads=given["threads"],
        vae_tiling=read_tiling(given),
    )
    runners = open_candidates(texts, terms)
    report = bench(
        *runners[: len(named)],
        against=runners[-1] if given["against"] is not None else None,
        **{name: given[name] for name in ("iterations", "warmup", "num_images", "threads")},
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        guidance_scale_2=settings.guidance_scale_2,
        num_frames=settings.num_frames,
        max_sequence_length=settings.max_sequence_length,
        seed=settings.seed or 0,
        progress=run.progress,
    )
    if given["html"] is not None:
        from obsdiff.bench_page import page

        given["html"].parent.mkdir(parents=True, exist_ok=True)
        given["html"].write_text(page(report, shlex.join(["obsdiff", *sys.argv[1:]])), encoding="utf-8")
    run.print_result(report.to_json(), lambda: print(table(report)))
