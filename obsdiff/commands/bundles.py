"""The verb generate; it never imports torch."""

from pathlib import Path
from typing import Annotated

import typer

from obsdiff.command import Run, options, verb
from obsdiff_runtime.flags import GENERATE
from obsdiff_runtime.server.options import read_tiling


@verb(
    "generate",
    ("steps", "guidance_scale", "guidance_scale_2", "height", "width", "num_frames", "max_sequence_length", "seed"),
    bundle=(Annotated[Path, typer.Argument(help="A bundle.")], ...),
    prompt=(Annotated[str, typer.Argument(help="What to draw.")], ...),
    **options(*GENERATE),
)
def generate(run: Run) -> None:
    """An image, or a film, through the runtime, without torch."""
    from obsdiff_runtime import verbs

    settings, given = run.settings, run.options
    seconds = verbs.generate(
        given["bundle"],
        given["prompt"],
        given["output"],
        image=given["image"],
        last_image=given["last_image"],
        mask=given["mask"],
        control=given["control"],
        control_scale=given["control_scale"],
        references=given["reference"] or (),
        own_size=given["own_size"],
        height=settings.height,
        width=settings.width,
        num_frames=settings.num_frames,
        fps=given["fps"],
        backend=given["backend"],
        threads=given["threads"],
        vae_tiling=read_tiling(given),
        progress=run.progress,
        negative_prompt=given["negative_prompt"],
        strength=given["strength"],
        eta=given["eta"],
        noise_source=given["noise"],
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        guidance_scale_2=settings.guidance_scale_2,
        max_sequence_length=settings.max_sequence_length,
        seed=settings.seed or 0,
    )
    output = str(given["output"])
    run.print_result({"image": output, "seconds": seconds}, lambda: print(output))
