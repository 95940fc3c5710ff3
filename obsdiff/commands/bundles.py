"""The verb generate; it never imports torch."""

from pathlib import Path
from typing import Annotated

import typer

from obsdiff.command import Run, option, verb
from obsdiff_runtime.errors import ConfigError

BACKEND = option(
    str,
    "--backend",
    text="What runs it: onnxruntime, onnxruntime_cuda, tensorrt or tensorrt_rtx (their engines).",
    default="onnxruntime",
)
THREADS = option(int | None, "--threads", text="Threads of the host; default: all cores.")


@verb(
    "generate",
    ("steps", "guidance_scale", "height", "width", "max_sequence_length", "seed"),
    bundle=(Annotated[Path, typer.Argument(help="A bundle.")], ...),
    prompt=(Annotated[str, typer.Argument(help="What to draw.")], ...),
    output=option(Path, "--output", "-o", text="Image file.", default=Path("image.png")),
    negative_prompt=option(str, "--negative-prompt", text="What not to draw.", default=""),
    image=option(Path | None, "--image", text="Image to change instead of drawing one from nothing."),
    strength=option(float | None, "--strength", text="How much of it to change, up to 1; default: 0.8."),
    noise=option(str, "--noise", text="numpy, or torch: the noise that diffusers draws for the seed.", default="numpy"),
    backend=BACKEND,
    threads=THREADS,
)
def generate(run: Run) -> None:
    """An image, through the runtime, without torch."""
    from PIL import Image

    from obsdiff_runtime import Pipeline
    from obsdiff_runtime.pictures import read_picture

    settings, output, start = run.settings, run.options["output"], run.options["image"]
    if output.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"-o {output}: no image format of that name; use .png or .jpg")
    pipeline = Pipeline(run.options["bundle"], backend=run.options["backend"], threads=run.options["threads"])
    image = None if start is None else read_picture(start, pipeline.size_step, settings.height, settings.width)
    images = pipeline(
        run.options["prompt"],
        negative_prompt=run.options["negative_prompt"],
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        height=settings.height,
        width=settings.width,
        max_sequence_length=settings.max_sequence_length,
        seed=settings.seed or 0,
        noise_source=run.options["noise"],
        image=image,
        strength=run.options["strength"],
        progress=run.progress,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(images.arrays[0]).save(output)
    run.print_result({"image": str(output), "seconds": images.seconds}, lambda: print(output))
