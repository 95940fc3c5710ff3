"""Verbs on engines: build."""

from pathlib import Path
from typing import Annotated

import typer

from obsdiff.command import Run, verb


@verb(
    "build",
    ("targets",),
    bundle=(Annotated[Path, typer.Argument(help="A bundle.")], ...),
)
def build(run: Run) -> None:
    """Engines for this machine, from the bundle's ONNX."""
    from obsdiff import verbs

    engines = verbs.build(run.options["bundle"], targets=run.settings.targets, progress=run.progress)

    def show() -> None:
        for engine in engines:
            print(f"{engine.path}  {engine.backend} {engine.backend_version}\n    {engine.sparsity}")

    run.print_result({"engines": [vars(engine) for engine in engines]}, show)
