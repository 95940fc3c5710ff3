"""The verb that looks: inspect. It imports torch only for a checkpoint that obsdiff pruned."""

from pathlib import Path
from typing import Annotated

import typer

from obsdiff.command import Run, options, verb
from obsdiff_export.settings import INSPECT


@verb(
    "inspect",
    path=(Annotated[Path, typer.Argument(help="A checkpoint, an ONNX file, an engine's plan or a bundle.")], ...),
    **options(*INSPECT),
)
def inspect(run: Run) -> None:
    """What is in a checkpoint, an ONNX file, an engine or a bundle, and whether its sparsity is proven."""
    from obsdiff.inspection import inspect as look
    from obsdiff_export.inspection import demand_sparsity, to_json

    content = look(run.options["path"], run.progress)

    def display() -> None:
        from obsdiff.inspection.tables import render
        from obsdiff_export.inspection.tables import show

        show(render(content, everything=run.options["layers"]))

    run.print_result(to_json(content), display)
    if run.options["require_sparse"]:
        demand_sparsity(content)
