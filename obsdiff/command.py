"""What a verb of the command line is, and how one runs: flags in, one result on stdout, errors as one line and a code.

A verb is a function under `obsdiff/commands` and a line in `obsdiff.cli.VERBS`. Flags come from `settings.FIELDS`.
Results go to stdout, everything else to stderr. Nothing heavy is imported until a verb runs.
"""

import inspect
import json
import logging
import os
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from obsdiff import launch
from obsdiff.settings import FIELDS, Settings, gather, save
from obsdiff_runtime.errors import failure
from obsdiff_runtime.flags import COMMON as SHARED
from obsdiff_runtime.flags import Flag
from obsdiff_runtime.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call of a verb: what was asked for, and where it may talk."""

    settings: Settings
    options: Mapping[str, Any]
    progress: Progress

    def print_result(self, data: Mapping[str, Any], show: Callable[[], None]) -> None:
        """One JSON object on stdout with --json, else whatever `show` prints."""
        if self.options["json"]:
            print(json.dumps(data, allow_nan=False))
        else:
            show()


Declared = tuple[Any, Any]
"""The annotation of a flag or argument, and its default; `...` for none."""


def option(kind: Any, *names: str, text: str, default: Any = None) -> Declared:
    """A flag of a verb's own."""
    return Annotated[kind, typer.Option(*names, help=text)], default


def options(*flags: Flag) -> dict[str, Declared]:
    """Flags that the runtime's own command has too, by the names of their values."""
    return {
        flag.key: option(
            _kind(flag),
            *(name for name in (flag.name, flag.short) if name is not None),
            text=flag.text,
            default=flag.default,
        )
        for flag in flags
    }


def _kind(flag: Flag) -> Any:
    kind = list[flag.kind] if flag.many else flag.kind  # type: ignore[name-defined]
    return kind if flag.default is not None else kind | None


COMMON = {
    "config": option(Path | None, "--config", text="Settings from a .toml or .yaml file; keys are the flags' names."),
    "save_config": option(Path | None, "--save-config", text="Write the settings given to this file."),
    "set": option(list[str] | None, "--set", text="Set any setting: key=value or table.key=value; repeatable."),
    **options(*SHARED),
}


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A command.

    Attributes:
        name: as it is typed.
        work: what it does; its docstring is the help.
        fields: the flags that are fields of Settings.
        own: its other flags and its arguments, as `option` makes them.
    """

    name: str
    work: Callable[[Run], None]
    fields: tuple[str, ...]
    own: Mapping[str, Declared]

    def register(self, app: typer.Typer) -> None:
        """Adds the command to `app`, with the common flags too."""
        declared = {**self.own, **{field: _setting(field) for field in self.fields}, **COMMON}

        def command(**values: Any) -> None:
            raise typer.Exit(_perform(self, {key: values[key] for key in declared}))

        parameters = [
            inspect.Parameter(
                key,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=kind,
                default=inspect.Parameter.empty if default is ... else default,
            )
            for key, (kind, default) in declared.items()
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {key: kind for key, (kind, _) in declared.items()}
        command.__doc__ = self.work.__doc__
        app.command(self.name)(command)


def verb(name: str, fields: Sequence[str] = (), **own: Declared) -> Callable[[Callable[[Run], None]], Verb]:
    """Makes a function a verb whose flags are `fields` of Settings, `own`, and the common ones."""

    def make(work: Callable[[Run], None]) -> Verb:
        return Verb(name=name, work=work, fields=tuple(fields), own=own)

    return make


def _setting(field: str) -> Declared:
    kind, text = typing.get_args(FIELDS[field].type)
    flag = "--" + field.replace("_", "-")
    return option(kind, f"{flag}/--no-{field}" if field == "trt" else flag, text=text)


def _perform(verb: Verb, values: dict[str, Any]) -> int:
    """Runs a verb and turns what a user can cause into one line and an exit code; bugs show their traceback.

    Of several processes that torchrun started, those behind the first take part where a model is pruned, write nothing
    and speak only of their errors.
    """
    from obsdiff.display import progress_on_stderr, quiet_libraries

    # Threads that spin while they wait for a core that another program uses slow torch down by an order of magnitude:
    # comparing four prompts on two cores takes 3 s with spinning and 6 s without; with one core taken, 134 s and 4 s.
    # The loss is that of very small matrices only.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.INFO if values["verbose"] else logging.ERROR, stream=sys.stderr)
    if not values["verbose"]:
        quiet_libraries()
    who = "obsdiff"
    try:
        place = launch.place()
        if place.rank:
            who = f"obsdiff: rank {place.rank}"
            values = {**values, "save_config": None, "quiet": True}
            if "resume" not in values or values["dry_run"]:
                return 0
        flags = {key: values[key] for key in (*verb.fields, *(("model",) if "model" in verb.own else ()))}
        settings = gather(flags, config=values["config"], assignments=values["set"] or ())
        if values["save_config"] is not None:
            save(settings, values["save_config"])
        with progress_on_stderr(quiet=values["quiet"] or values["json"]) as progress, _heeded(progress) as heeding:
            verb.work(Run(settings=settings, options=values, progress=heeding))
    except launch.Finished:
        return 0
    except (Exception, KeyboardInterrupt) as error:
        told = failure(error, smaller=_smaller(values), again=_again(values))
        if told is None:
            raise
        print(f"{who}: {told.sentence}", file=sys.stderr)
        return told.exit_code
    return 0


@contextmanager
def _heeded(progress: Progress) -> Iterator[Progress]:
    """The progress, through which an interruption is heard that was lost where it came.

    Python raises KeyboardInterrupt wherever it happens to be; in a finalizer, or where an extension asks for an
    attribute, it is swallowed, and the work would go on to its end.
    """
    came = threading.Event()

    def note(number: int, frame: object) -> None:
        came.set()
        raise KeyboardInterrupt

    def tell(stage: str, done: int, total: int, note: str = "") -> None:
        if came.is_set():
            raise KeyboardInterrupt
        progress(stage, done, total, note)

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or another's
        yield progress
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield tell
    finally:
        signal.signal(signal.SIGINT, before)


def _smaller(values: Mapping[str, Any]) -> str:
    """What makes a verb need less memory; the method, and so which flag counts, may be named in a file."""
    if "packages" not in values:
        flags = [f"--{name.replace('_', '-')}" for name in ("batch_size", "height", "width") if name in values]
        return f"lower {', '.join(flags)}" if flags else "close other programs, or run it where more is free"
    away = "" if values.get("offload") else "; a model may stay in a GPU's host: obsdiff prune --offload"
    return (
        "lower --batch-size, and --draws or --kept-steps; with a method that does not stream, raise --packages" + away
    )


def _again(values: Mapping[str, Any]) -> str:
    """How to go on, where finished packages were kept."""
    kept = "resume" in values and Path(f"{values['output']}.journal").exists()
    return "; the same command with --resume continues" if kept else ""
