"""The verb that serves bundles over HTTP. It never imports torch."""

import sys
from typing import Annotated

import typer

from obsdiff.command import Run, options, verb
from obsdiff_runtime.flags import SERVE


@verb(
    "serve",
    bundles=(Annotated[list[str], typer.Argument(help="Bundles, or NAME=BUNDLE; the first one is the default.")], ...),
    **options(*SERVE),
)
def serve(run: Run) -> None:
    """OpenAI's images API, health, metrics and a page, without torch."""
    from obsdiff_runtime.server.options import read_options
    from obsdiff_runtime.server.run import serve

    def ready(url: str) -> None:
        run.print_result({"url": url}, lambda: print(f"serving at {url}"))
        sys.stdout.flush()

    serve(run.options["bundles"], read_options(run.options), ready)
