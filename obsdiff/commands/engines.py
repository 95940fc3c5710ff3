"""Verbs on engines: build."""

from pathlib import Path
from typing import Annotated

import typer

from obsdiff.command import Run, option, verb
from obsdiff_export.settings import FIELDS
from obsdiff_runtime.bundle import read_manifest


@verb(
    "build",
    tuple(FIELDS),
    bundle=(Annotated[Path, typer.Argument(help="A bundle.")], ...),
    component=option(list[str] | None, "--component", text="Only this one's engine; repeatable."),
)
def build(run: Run) -> None:
    """Engines for this machine, from the bundle's ONNX."""
    read_manifest(run.options["bundle"])  # the imports below take a second
    from obsdiff_export import engines

    built = engines.build(
        run.options["bundle"],
        run.settings,
        components=run.options["component"] or (),
        progress=run.progress,
    )

    def show() -> None:
        from rich.console import Console

        console = Console(soft_wrap=True)
        for line in engines.lines(built):
            console.print(line, highlight=False, markup=False)

    run.print_result(built.to_json(), show)
    built.hold()
