"""`obsdiff-runtime`: draws, measures, serves and shows bundles where nothing but this package is installed.

A verb is a function and a line in VERBS. Nothing heavy is imported until one runs.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from obsdiff_runtime.errors import ConfigError, failure
from obsdiff_runtime.flags import (
    BACKEND,
    COMMON,
    GENERATE,
    ROUNDS,
    SAMPLING,
    SERVE,
    THREADS,
    TILING,
    Flag,
    hyphenated,
)
from obsdiff_runtime.progress import Lines, Progress, silent
from obsdiff_runtime.server.options import read_options, read_tiling
from obsdiff_runtime.version import __version__

PROGRAM: Final = "obsdiff-runtime"
EXIT_CODES: Final = (
    "Exit codes: 0 done; 1 failed; 2 usage or configuration; 4 not enough memory or disk; "
    "5 engine or environment incompatible; 130 interrupted."
)

Given = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One that is not a flag.

    Attributes:
        many: one or more of them.
    """

    name: str
    text: str
    kind: type = str
    many: bool = False


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A command; the docstring of `work` is its help."""

    work: Callable[[Given, Progress], None]
    arguments: Sequence[Argument]
    flags: Sequence[Flag] = ()


def generate(given: Given, progress: Progress) -> None:
    """An image from a prompt, or a film."""
    from obsdiff_runtime import verbs

    seconds = verbs.generate(
        given["bundle"],
        given["prompt"],
        given["output"],
        image=given["image"],
        last_image=given["last_image"],
        mask=given["mask"],
        control=given["control"],
        control_scale=given["control_scale"],
        references=given["reference"] or (),
        own_size=given["own_size"],
        height=given["height"],
        width=given["width"],
        num_frames=given["num_frames"],
        fps=given["fps"],
        backend=given["backend"],
        threads=given["threads"],
        vae_tiling=read_tiling(given),
        progress=progress,
        negative_prompt=given["negative_prompt"],
        strength=given["strength"],
        eta=given["eta"],
        noise_source=given["noise"],
        num_inference_steps=given["steps"],
        guidance_scale=given["guidance_scale"],
        guidance_scale_2=given["guidance_scale_2"],
        max_sequence_length=given["max_sequence_length"],
        seed=given["seed"],
    )
    _print(given, {"image": str(given["output"]), "seconds": dict(seconds)}, str(given["output"]))


def bench(given: Given, progress: Progress) -> None:
    """Time, throughput and memory of bundles, by turns; what is noise is called so."""
    from obsdiff_runtime import benchmark

    report = benchmark.bench(
        *given["bundles"],
        against=given["against"],
        **{name: given[name] for name in ("iterations", "warmup", "num_images", "threads", "backend", "seed")},
        **{name: given[name] for name in ("height", "width", "num_frames", "guidance_scale", "guidance_scale_2")},
        max_sequence_length=given["max_sequence_length"],
        num_inference_steps=given["steps"],
        vae_tiling=read_tiling(given),
        progress=progress,
    )
    _print(given, report.to_json(), benchmark.table(report))


def serve(given: Given, progress: Progress) -> None:
    """OpenAI's images API, health, metrics and a page."""
    from obsdiff_runtime.server.run import serve

    serve(given["bundles"], read_options(given), lambda url: _print(given, {"url": url}, f"serving at {url}"))


def inspect(given: Given, progress: Progress) -> None:
    """What is in a bundle, after every file was compared with its sha256."""
    from obsdiff_runtime import verbs
    from obsdiff_runtime.bundle import open_bundle

    bundle = open_bundle(given["bundle"])
    _print(given, verbs.contents(bundle), verbs.describe(bundle))


BUNDLE: Final = Argument(name="bundle", text="A bundle.", kind=Path)
VERBS: Final[dict[str, Verb]] = {
    "generate": Verb(
        work=generate,
        arguments=[BUNDLE, Argument(name="prompt", text="What to draw.")],
        flags=[*GENERATE, *SAMPLING],
    ),
    "bench": Verb(
        work=bench,
        arguments=[Argument(name="bundles", text="FOLDER or FOLDER@BACKEND.", many=True)],
        flags=[*ROUNDS, BACKEND, THREADS, *TILING, *SAMPLING],
    ),
    "serve": Verb(
        work=serve,
        arguments=[Argument(name="bundles", text="Bundles, or NAME=BUNDLE; the first one is the default.", many=True)],
        flags=SERVE,
    ),
    "inspect": Verb(work=inspect, arguments=[BUNDLE]),
}


def main() -> None:
    """The command; `--max_rows` is accepted for `--max-rows`."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs a verb and gives its exit code; a bug shows its traceback.

    Raises:
        SystemExit: the arguments were wrong, or asked for help.
    """
    given = vars(parser().parse_args(hyphenated(arguments)))
    logging.basicConfig(level=logging.INFO if given["verbose"] else logging.ERROR, stream=sys.stderr)
    progress = silent if given["quiet"] or given["json"] else Lines()
    try:
        VERBS[given["verb"]].work(given, progress)
    except (Exception, KeyboardInterrupt) as error:
        told = failure(error)
        if told is None:
            raise
        print(f"{PROGRAM}: {told.sentence}", file=sys.stderr)
        return told.exit_code
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(ConfigError.exit_code, f"{PROGRAM}: {message}; {self.prog} --help says what there is\n")


def parser() -> argparse.ArgumentParser:
    """Of all verbs."""
    root = _Parser(prog=PROGRAM, description="Runs obsdiff bundles, without torch.", epilog=EXIT_CODES)
    root.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = root.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        text = verb.work.__doc__ or ""
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        for argument in verb.arguments:
            command.add_argument(
                argument.name,
                nargs="+" if argument.many else None,
                type=argument.kind,
                metavar=argument.name.upper(),
                help=argument.text,
            )
        for flag in (*verb.flags, *COMMON):
            _add(command, flag)
    return root


def _add(command: argparse.ArgumentParser, flag: Flag) -> None:
    names = [flag.name] if flag.short is None else [flag.short, flag.name]
    if flag.kind is bool:
        command.add_argument(*names, action="store_true", help=flag.text)
        return
    told = "" if flag.default in (None, "") else f" (default: {flag.default})"
    metavar = flag.kind.__name__.upper()
    action = "append" if flag.many else "store"
    command.add_argument(
        *names, action=action, type=flag.kind, default=flag.default, metavar=metavar, help=flag.text + told
    )


def _print(given: Given, data: Given, text: str) -> None:
    """One JSON object on stdout with --json, else the text."""
    print(json.dumps(data, allow_nan=False) if given["json"] else text, flush=True)
