"""The command line: every verb is a line in VERBS.

Nothing heavy is imported until a verb runs. `generate`, `serve` and `triton` never import torch, and `bench` only where
it is told to.
"""

import sys
from typing import Annotated, Final

import typer

from obsdiff.command import Verb
from obsdiff.commands import benchmark, bundles, doctor, engines, inspection, models, repositories, serving, whatif
from obsdiff_runtime.flags import hyphenated
from obsdiff_runtime.version import __version__

VERBS: Final[tuple[Verb, ...]] = (
    models.export,
    models.prune,
    models.convert,
    models.lora,
    models.plan,
    engines.build,
    whatif.whatif,
    models.evaluate,
    benchmark.bench,
    bundles.generate,
    serving.serve,
    repositories.triton,
    doctor.doctor,
    inspection.inspect,
)

app = typer.Typer(
    name="obsdiff",
    help="Makes diffusion models small and deployable, without training.\n\n"
    "Exit codes: 0 done; 1 failed; 2 usage or configuration; 3 quality gate; 4 not enough memory or disk; "
    "5 engine or environment incompatible; 6 no proof of sparsity; 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"obsdiff {__version__}")
        raise typer.Exit


for command in VERBS:
    command.register(app)


def main() -> None:
    """The `obsdiff` command; `--max_sequence_length` is accepted for `--max-sequence-length`."""
    app(hyphenated(sys.argv[1:]))
