"""The verb that writes what Triton Inference Server serves. It never imports torch."""

import re
from pathlib import Path
from typing import Annotated

import typer

from obsdiff.command import Run, option, options, verb
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.flags import BOUNDS


@verb(
    "triton",
    bundle=(Annotated[Path, typer.Argument(help="A bundle.")], ...),
    output=(Annotated[Path, typer.Option("--output", "-o", help="Model repository to write.")], ...),
    model_name=option(str | None, "--name", text="Of the model that takes prompts; default: the bundle's folder."),
    images=option(int, "--images", text="Images that are drawn together.", default=8),
    instances=option(int, "--instances", text="Processes that take prompts.", default=2),
    threads=option(int, "--threads", text="Of ONNX Runtime on the CPU; 0: all cores.", default=0),
    **options(*BOUNDS),
    force=option(bool, "--force", text="Replace an earlier result.", default=False),
)
def triton(run: Run) -> None:
    """A model repository of Triton Inference Server: a model for each network, and one that draws by calling them."""
    from obsdiff.folders import check_free
    from obsdiff.triton.configs import Choice
    from obsdiff.triton.repository import write_repository
    from obsdiff_runtime.bundle import open_bundle
    from obsdiff_runtime.server.options import read_bounds

    given = run.options
    for name, least in (("images", 1), ("instances", 1), ("threads", 0)):
        if given[name] < least:
            raise ConfigError(f"--{name} {given[name]}: should be at least {least}")
    check_free(given["output"], force=given["force"])
    name = (
        given["model_name"] or re.sub(r"[^A-Za-z0-9_-]+", "_", given["bundle"].resolve().name).strip("_-") or "obsdiff"
    )
    choice = Choice(
        name=name,
        images=given["images"],
        instances=given["instances"],
        threads=given["threads"],
        bounds=read_bounds(given),
    )
    written = write_repository(open_bundle(given["bundle"]), given["output"], choice, force=given["force"])

    def show() -> None:
        print(f"{written.path}: {written.model} draws with")
        for model, backend in written.components.items():
            print(f"  {model:40} {backend}")
        for reason in written.left_out:
            print(f"left out: {reason}")
        if written.tensorrt is not None:
            print(f"the engines need a Triton with TensorRT {written.tensorrt}")

    run.print_result(written.to_json(), show)
