"""A small command of verbs, read by argparse: flags in, one result on stdout, errors as one line and a code.

`obsdiff-runtime` and `obsdiff-engines` are two of them; they run where little else is installed.
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
from obsdiff_runtime.flags import COMMON, Flag, hyphenated
from obsdiff_runtime.progress import Lines, Progress, silent
from obsdiff_runtime.version import __version__

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


BUNDLE: Final = Argument(name="bundle", text="A bundle.", kind=Path)


@dataclass(frozen=True, kw_only=True)
class Command:
    """Attributes:
    program: its name.
    description: what it is for, in a line.
    verbs: by name.
    codes: its exit codes, in a line.
    """

    program: str
    description: str
    verbs: Mapping[str, Verb]
    codes: str

    def main(self) -> NoReturn:
        """The process's arguments; `--max_rows` is accepted for `--max-rows`."""
        sys.exit(self.run(sys.argv[1:]))

    def run(self, arguments: Sequence[str]) -> int:
        """Runs a verb and gives its exit code; a bug shows its traceback.

        Raises:
            SystemExit: the arguments were wrong, or asked for help.
        """
        given = vars(self.parser().parse_args(hyphenated(arguments)))
        logging.basicConfig(level=logging.INFO if given["verbose"] else logging.ERROR, stream=sys.stderr)
        progress = silent if given["quiet"] or given["json"] else Lines()
        try:
            self.verbs[given["verb"]].work(given, progress)
        except (Exception, KeyboardInterrupt) as error:
            told = failure(error)
            if told is None:
                raise
            print(f"{self.program}: {told.sentence}", file=sys.stderr)
            return told.exit_code
        return 0

    def parser(self) -> argparse.ArgumentParser:
        """Of all verbs."""
        root = _Parser(prog=self.program, description=self.description, epilog=self.codes)
        root.add_argument("--version", action="version", version=f"{self.program} {__version__}")
        commands = root.add_subparsers(dest="verb", required=True, metavar="VERB")
        for name, verb in self.verbs.items():
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


def print_result(given: Given, data: Given, show: Callable[[], None]) -> None:
    """One JSON object on stdout with --json, else whatever `show` prints."""
    if given["json"]:
        print(json.dumps(data, allow_nan=False), flush=True)
    else:
        show()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        program = self.prog.split()[0]
        self.exit(ConfigError.exit_code, f"{program}: {message}; {self.prog} --help says what there is\n")


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
