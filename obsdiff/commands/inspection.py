"""The verb that looks: inspect. It imports torch only for a checkpoint that obsdiff pruned."""

from pathlib import Path
from typing import Annotated

import typer

from obsdiff.command import Run, option, verb

WIDTH = 160
"""Columns where the output goes to a file or a pipe."""


@verb(
    "inspect",
    path=(Annotated[Path, typer.Argument(help="A checkpoint, an ONNX file, an engine's plan or a bundle.")], ...),
    layers=option(bool, "--layers", text="A row for each linear, weight and engine layer.", default=False),
    require_sparse=option(
        bool, "--require-sparse", text="Exit with 6 unless sparse kernels are proven to run.", default=False
    ),
)
def inspect(run: Run) -> None:
    """What is in a checkpoint, an ONNX file, an engine or a bundle, and whether its sparsity is proven."""
    from obsdiff.inspection import demand_sparsity, to_json
    from obsdiff.inspection import inspect as look

    content = look(run.options["path"], run.progress)

    def show() -> None:
        from rich.console import Console

        from obsdiff.inspection.tables import render

        console = Console()
        if not console.is_terminal:
            console.width = max(console.width, WIDTH)
        for part in render(content, everything=run.options["layers"]):
            console.print(part, highlight=False)

    run.print_result(to_json(content), show)
    if run.options["require_sparse"]:
        demand_sparsity(content)
