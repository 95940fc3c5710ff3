"""The command line. Flags come from settings.FIELDS; the work is in verbs.py.

Results go to stdout, everything else to stderr. Nothing heavy is imported until a verb runs, and `bench` and
`generate` never import torch.
"""

import errno
import inspect
import json
import logging
import os
import re
import shlex
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from obsdiff import launch
from obsdiff.settings import FIELDS, Settings, gather, save
from obsdiff_runtime.errors import ConfigError, ObsdiffError
from obsdiff_runtime.progress import Progress
from obsdiff_runtime.version import __version__

INTERRUPTED = 130
NOT_ENOUGH_ROOM = 4

MODEL = ("revision", "variant", "device")
PRUNE = (
    *("sparsity", "method", "include", "exclude", "blocks", "protect_first", "protect_last", "align", "damp"),
    *("allocation", "dense_share", "prompts_file", "num_samples", "time_weights", "packages", "gram_budget"),
    *("fast", "draws", "trajectory_steps", "kept_steps"),
)
SAMPLE = ("steps", "guidance_scale", "height", "width", "max_sequence_length", "batch_size", "seed")
DELIVER = ("trt", "targets", "dtype", "opset")
QUALITY = (
    *("eval_prompts", "eval_prompts_file", "clip_model", "lpips", "fid_reference", "judge"),
    *("guidance_sweep", "fail_if"),
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


def _option(kind: Any, *names: str, text: str, default: Any = None) -> tuple[Any, Any]:
    return Annotated[kind, typer.Option(*names, help=text)], default


COMMON = {
    "config": _option(Path | None, "--config", text="Settings from a .toml or .yaml file; keys are the flags' names."),
    "save_config": _option(Path | None, "--save-config", text="Write the settings given to this file."),
    "set": _option(list[str] | None, "--set", text="Set any setting: key=value or table.key=value; repeatable."),
    "json": _option(bool, "--json", text="One JSON object on stdout and nothing else.", default=False),
    "verbose": _option(bool, "--verbose", "-v", text="Log what happens on stderr.", default=False),
    "quiet": _option(bool, "--quiet", "-q", text="No progress on stderr.", default=False),
}
OUTPUT = {
    "output": _option(Path, "--output", "-o", text="Folder to write; must not exist.", default=...),
    "force": _option(bool, "--force", text="Replace the output folder if it exists.", default=False),
    "resume": _option(bool, "--resume", text="Continue a killed run after its last finished package.", default=False),
    "dry_run": _option(bool, "--dry-run", text="Say what would be done, and stop.", default=False),
}
MODEL_ARGUMENT = (
    Annotated[str | None, typer.Argument(help="A diffusers folder or Hub id; default: the pipeline shipped inside.")],
    None,
)


def _verb(
    name: str, fields: Sequence[str] = (), **own: tuple[Any, Any]
) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    """Registers a function as a command whose flags are `fields` of Settings, `own`, and the common ones."""

    def register(work: Callable[[Run], None]) -> Callable[[Run], None]:
        declared = {**own, **{field: _setting(field) for field in fields}, **COMMON}

        def command(**values: Any) -> None:
            raise typer.Exit(_perform(work, {key: values[key] for key in declared}, fields, "model" in own))

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
        command.__doc__ = work.__doc__
        app.command(name)(command)
        return work

    return register


def _setting(field: str) -> tuple[Any, Any]:
    kind, text = typing.get_args(FIELDS[field].type)
    flag = "--" + field.replace("_", "-")
    return _option(kind, f"{flag}/--no-{field}" if field == "trt" else flag, text=text)


def _perform(work: Callable[[Run], None], values: dict[str, Any], fields: Sequence[str], has_model: bool) -> int:
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
        flags = {key: values[key] for key in (*fields, *(("model",) if has_model else ()))}
        settings = gather(flags, config=values["config"], assignments=values["set"] or ())
        if values["save_config"] is not None:
            save(settings, values["save_config"])
        with progress_on_stderr(quiet=values["quiet"] or values["json"]) as progress:
            work(Run(settings=settings, options=values, progress=progress))
    except launch.Finished:
        return 0
    except ObsdiffError as error:
        print(f"{who}: {error}", file=sys.stderr)
        return NOT_ENOUGH_ROOM if _full(error) else error.exit_code
    except KeyboardInterrupt:
        print(f"{who}: interrupted{_again(values)}", file=sys.stderr)
        return INTERRUPTED
    except MemoryError:
        print(f"{who}: out of memory; {_smaller(values)}", file=sys.stderr)
        return NOT_ENOUGH_ROOM
    except Exception as error:
        if _full(error):
            print(f"{who}: the disk is full: {error}{_again(values)}", file=sys.stderr)
            return NOT_ENOUGH_ROOM
        if not isinstance(error, OSError) or error.errno is None:
            raise
        print(f"{who}: {error.filename or 'disk'}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _full(error: BaseException | None) -> bool:
    """Whether a full disk, a quota or a limit on file sizes is behind it; safetensors tells of it in words only."""
    if error is None:
        return False
    number = error.errno if isinstance(error, OSError) else None
    said = re.search(r"\(os error (\d+)\)", str(error))
    codes = {number, int(said[1]) if said else None}
    return bool(codes & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}) or _full(error.__cause__)


def _smaller(values: Mapping[str, Any]) -> str:
    """What makes a verb need less memory; the method, and so which flag counts, may be named in a file."""
    if "packages" not in values:
        return "lower --batch-size, --height or --width"
    return "lower --batch-size, and --draws or --kept-steps; with a method that does not stream, raise --packages"


def _again(values: Mapping[str, Any]) -> str:
    """How to go on, where finished packages were kept."""
    kept = "resume" in values and values["output"].with_name(f"{values['output'].name}.journal").exists()
    return "; the same command with --resume continues" if kept else ""


@_verb("export", (*PRUNE, *DELIVER, *QUALITY, *SAMPLE, *MODEL), model=MODEL_ARGUMENT, **OUTPUT)
def _export(run: Run) -> None:
    """The main job: prune, shrink, export ONNX, build engines, verify, measure, bundle."""
    from obsdiff import verbs

    output: Path = run.options["output"]
    if run.options["dry_run"]:
        _show_plan(run, verbs.plan(run.settings, before=output, force=run.options["force"]))
        return
    exported = verbs.export(
        run.settings,
        output,
        force=run.options["force"],
        resume=run.options["resume"],
        command=shlex.join(["obsdiff", *sys.argv[1:]]),
        progress=run.progress,
    )

    def show() -> None:
        from rich.console import Console

        from obsdiff.report import summary_table
        from obsdiff.wording import notes

        console = Console()
        console.print(summary_table(exported.report))
        for note in notes(exported.report):
            console.print(f"[yellow]note[/] {note}", highlight=False)
        console.print(f"report  {output / 'report.html'}", style="dim")
        console.print(f"next    obsdiff generate {output} '...' -o a.png", style="dim")

    run.print_result(exported.to_json(), show)
    exported.hold()


@_verb("prune", (*PRUNE, *SAMPLE, *MODEL), model=MODEL_ARGUMENT, **OUTPUT)
def _prune(run: Run) -> None:
    """Stops after the pruned diffusers folder."""
    from obsdiff import verbs

    output: Path = run.options["output"]
    if run.options["dry_run"]:
        _show_plan(run, verbs.plan(run.settings, before=output, force=run.options["force"]))
        return
    result = verbs.prune_to_folder(
        run.settings, output, force=run.options["force"], resume=run.options["resume"], progress=run.progress
    )

    def show() -> None:
        from rich.console import Console

        from obsdiff.display import layers_table

        console = Console()
        console.print(layers_table(result.layers))
        console.print(f"next    obsdiff export {output} --trt -o {output}-bundle", style="dim")

    run.print_result({"folder": str(output), **result.to_json()}, show)


@_verb("plan", (*PRUNE, *SAMPLE, *MODEL), model=MODEL_ARGUMENT)
def _plan(run: Run) -> None:
    """Before anything runs: layers, parameters, MACs, memory, disk, calls. Works from config.json alone."""
    from obsdiff import verbs

    _show_plan(run, verbs.plan(run.settings))


def _show_plan(run: Run, planned: Any) -> None:
    from obsdiff.display import show_plan

    run.print_result(planned.to_json(), lambda: show_plan(planned, verbose=run.options["verbose"]))


@_verb(
    "build",
    ("targets",),
    bundle=(Annotated[Path, typer.Argument(help="A bundle.")], ...),
)
def _build(run: Run) -> None:
    """Engines for this machine, from the bundle's ONNX."""
    from obsdiff import verbs

    engines = verbs.build(run.options["bundle"], targets=run.settings.targets, progress=run.progress)

    def show() -> None:
        for engine in engines:
            print(f"{engine.path}  {engine.backend} {engine.backend_version}\n    {engine.sparsity}")

    run.print_result({"engines": [vars(engine) for engine in engines]}, show)


@_verb(
    "eval",
    (*QUALITY, *SAMPLE, "device"),
    pruned=(Annotated[list[Path], typer.Argument(help="Pruned diffusers folders; several: mean and spread.")], ...),
    against=_option(str | None, "--against", text="The dense model; default: the pipeline shipped inside."),
    html=_option(Path | None, "--html", text="Also write a page with pictures and curves."),
)
def _eval(run: Run) -> None:
    """Paired quality: same prompts, same noise."""
    from obsdiff import verbs

    evaluated = verbs.evaluate(
        run.options["pruned"],
        run.options["against"],
        run.settings,
        html=run.options["html"],
        command=shlex.join(["obsdiff", *sys.argv[1:]]),
        progress=run.progress,
    )

    def show() -> None:
        from rich.console import Console

        from obsdiff.report import runs_table, summary_table

        single = len(evaluated.reports) == 1
        table = (
            summary_table(evaluated.reports[0])
            if single
            else runs_table(evaluated.folders, evaluated.reports, evaluated.spread)
        )
        Console().print(table)

    run.print_result(evaluated.to_json(), show)
    evaluated.hold()


@_verb(
    "bench",
    bundle=(Annotated[Path, typer.Argument(help="A bundle.")], ...),
    against=_option(Path | None, "--against", text="Another bundle, measured in turn with the first."),
    iterations=_option(int, "--iterations", text="Measured runs of each.", default=10),
    warmup=_option(int, "--warmup", text="Runs before measuring.", default=2),
    threads=_option(int | None, "--threads", text="Threads of ONNX Runtime; default: all cores."),
)
def _bench(run: Run) -> None:
    """Latency per component and end to end, through the runtime, without torch."""
    from obsdiff_runtime import bench
    from obsdiff_runtime.benchmark import table

    names = ("against", "iterations", "warmup", "threads")
    report = bench(run.options["bundle"], **{name: run.options[name] for name in names}, progress=run.progress)
    run.print_result(report.to_json(), lambda: print(table(report)))


@_verb(
    "generate",
    ("steps", "guidance_scale", "height", "width", "max_sequence_length", "seed"),
    bundle=(Annotated[Path, typer.Argument(help="A bundle.")], ...),
    prompt=(Annotated[str, typer.Argument(help="What to draw.")], ...),
    output=_option(Path, "--output", "-o", text="Image file.", default=Path("image.png")),
    negative_prompt=_option(str, "--negative-prompt", text="What not to draw.", default=""),
    threads=_option(int | None, "--threads", text="Threads of ONNX Runtime; default: all cores."),
)
def _generate(run: Run) -> None:
    """An image, through the runtime, without torch."""
    from PIL import Image

    from obsdiff_runtime import Pipeline

    settings, output = run.settings, run.options["output"]
    if output.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"-o {output}: no image format of that name; use .png or .jpg")
    images = Pipeline(run.options["bundle"], threads=run.options["threads"])(
        run.options["prompt"],
        negative_prompt=run.options["negative_prompt"],
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        height=settings.height,
        width=settings.width,
        max_sequence_length=settings.max_sequence_length,
        seed=settings.seed or 0,
        progress=run.progress,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(images.arrays[0]).save(output)
    run.print_result({"image": str(output), "seconds": images.seconds}, lambda: print(output))


def main() -> None:
    """The `obsdiff` command; `--max_sequence_length` is accepted for `--max-sequence-length`."""
    arguments = []
    for position, argument in enumerate(sys.argv[1:]):
        if argument == "--":
            arguments += sys.argv[1 + position :]
            break
        name, equals, value = argument.partition("=")
        arguments.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    app(arguments)
