"""The verb whatif: what sparsity would bring here, before anything is calibrated."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from obsdiff.command import Run, option, verb
from obsdiff_runtime.errors import require_file


@verb(
    "whatif",
    (
        *("sparsity", "include", "exclude", "blocks", "align", "dtype", "opset", "trt", "targets"),
        *("guidance_scale", "height", "width", "num_frames", "max_sequence_length", "revision", "variant"),
    ),
    model=(
        Annotated[
            str | None,
            typer.Argument(help="A diffusers folder, Hub id, config.json or bundle; default: the shipped pipeline."),
        ],
        None,
    ),
    output=option(
        Path | None,
        "--output",
        "-o",
        text="Write the latency table, for --allocation latency:FILE or obsdiff-engines time.",
    ),
    html=option(Path | None, "--html", text="Also write a page with charts."),
    minutes=option(float, "--minutes", text="Time to spend on timing.", default=5.0),
    shapes_only=option(
        bool, "--shapes-only", text="Single linears alone, from configurations: no weights.", default=False
    ),
    gpu=option(
        str | None,
        "--gpu",
        text="Time nothing; estimate from published peaks of a100, h100, h200, l4, rtx4090, rtx5090, orin or thor.",
    ),
    backend=option(str, "--backend", text="auto, tensorrt, torch or cpu.", default="auto"),
    threads=option(int | None, "--threads", text="Threads of ONNX Runtime; default: all cores."),
)
def whatif(run: Run) -> None:
    """Is 2:4 worth it here, on which linears, and which widths? Minutes, before any calibration."""
    from obsdiff.whatif import report as whatif_report
    from obsdiff.whatif import run as whatif_run

    names = ("minutes", "shapes_only", "gpu", "backend", "threads")
    options = {name: run.options[name] for name in names}
    output, html = run.options["output"], run.options["html"]
    for flag, path in (("--output", output), ("--html", html)):
        if path is not None:
            require_file(flag, path)
    found = whatif_run.run(run.settings, **options, progress=run.progress)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        found.table.save(output)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(whatif_report.page(found, shlex.join(["obsdiff", *sys.argv[1:]])), encoding="utf-8")

    def show() -> None:
        from rich.console import Console

        console = Console()
        for table in whatif_report.tables(found):
            console.print(table)
        console.print(found.sentence, style="bold", highlight=False)
        for note in found.notes:
            console.print(f"[yellow]note[/] {note}", highlight=False)
        for label, path in (("table", output), ("page", html)):
            if path is not None:
                console.print(f"{label:<7} {path}", style="dim", highlight=False)

    run.print_result(found.to_json(), show)
