"""The verb that serves bundles over HTTP. It never imports torch."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from obsdiff.command import Run, option, verb
from obsdiff.commands.bundles import BACKEND, THREADS
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.server.options import DEFAULT_BOUNDS, DEFAULT_LIMITS, Bounds, Limits, Options


@verb(
    "serve",
    bundles=(Annotated[list[str], typer.Argument(help="Bundles, or NAME=BUNDLE; the first one is the default.")], ...),
    host=option(str, "--host", text="Address to listen at; 0.0.0.0 for all.", default="127.0.0.1"),
    port=option(int, "--port", text="0 takes a free one.", default=8000),
    backend=BACKEND,
    threads=THREADS,
    max_rows=option(int, "--max-rows", text="Rows of one denoiser run; two an image.", default=DEFAULT_LIMITS.max_rows),
    max_queue=option(int, "--max-queue", text="Requests that may wait.", default=DEFAULT_LIMITS.max_waiting),
    max_steps=option(int, "--max-steps", text="Most steps of a request.", default=DEFAULT_BOUNDS.steps),
    max_pixels=option(int | None, "--max-pixels", text="Most pixels of an image; default: 4 times the model's own."),
    max_prompt=option(
        int, "--max-prompt", text="Most characters of a prompt.", default=DEFAULT_BOUNDS.prompt_characters
    ),
    deadline=option(float, "--deadline", text="Seconds that a request may take.", default=DEFAULT_BOUNDS.deadline_s),
    drain=option(float, "--drain", text="Seconds for accepted requests after SIGTERM.", default=120.0),
    api_keys=option(Path | None, "--api-keys", text="File of API keys, one a line; one must come with each request."),
)
def serve(run: Run) -> None:
    """OpenAI's images API, health, metrics and a page, without torch."""
    from obsdiff_runtime.server.run import read_keys, serve

    given = run.options
    for name in ("max_rows", "max_queue", "max_steps", "max_prompt", "deadline"):
        if given[name] <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {given[name]:g}: should be more than 0")
    options = Options(
        host=given["host"],
        port=given["port"],
        backend=given["backend"],
        threads=given["threads"],
        api_keys=() if given["api_keys"] is None else read_keys(given["api_keys"]),
        limits=Limits(max_rows=given["max_rows"], max_waiting=given["max_queue"]),
        bounds=Bounds(
            prompt_characters=given["max_prompt"],
            pixels=given["max_pixels"],
            steps=given["max_steps"],
            deadline_s=given["deadline"],
        ),
        drain_s=given["drain"],
    )

    def ready(url: str) -> None:
        run.print_result({"url": url}, lambda: print(f"serving at {url}"))
        sys.stdout.flush()

    serve(given["bundles"], options, ready)
