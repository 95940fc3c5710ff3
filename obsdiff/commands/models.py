"""Verbs on a model: export, prune, convert, lora, plan, eval."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from obsdiff.command import Run, option, verb
from obsdiff_export.settings import ENGINES
from obsdiff_runtime.turns import BEHIND

MODEL = ("revision", "variant", "device")
PRUNE = (
    *("sparsity", "method", "include", "exclude", "blocks", "protect_first", "protect_last", "align", "damp"),
    *("allocation", "dense_share", "prompts_file", "num_samples", "time_weights", "packages", "gram_budget"),
    *("fast", "draws", "trajectory_steps", "kept_steps"),
)
SAMPLE = (
    *("steps", "guidance_scale", "guidance_scale_2", "height", "width", "num_frames", "max_sequence_length"),
    *("references", "batch_size", "seed"),
)
DELIVER = ("trt", *ENGINES, "vae_tile", "precision", "keep_float", "quantize_outputs", "dtype", "opset")
QUALITY = (
    *("eval_prompts", "eval_prompts_file", "clip_model", "lpips", "fid_reference", "judge"),
    *("guidance_sweep", "fail_if"),
)
OUTPUT = {
    "output": option(Path, "--output", "-o", text="Folder to write; must not exist.", default=...),
    "force": option(bool, "--force", text="Replace the output folder if it exists.", default=False),
    "resume": option(bool, "--resume", text="Continue a killed run after its last finished package.", default=False),
    "dry_run": option(bool, "--dry-run", text="Say what would be done, and stop.", default=False),
}
MODEL_ARGUMENT = (
    Annotated[str | None, typer.Argument(help="A diffusers folder or Hub id; default: the pipeline shipped inside.")],
    None,
)


@verb("export", (*PRUNE, *DELIVER, *QUALITY, *SAMPLE, *MODEL, "low_memory"), model=MODEL_ARGUMENT, **OUTPUT)
def export(run: Run) -> None:
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
        from rich.markup import escape

        from obsdiff.report import summary_table
        from obsdiff.wording import engine_sparsity, notes
        from obsdiff_runtime.bundle import open_bundle
        from obsdiff_runtime.verbs import drawing

        console = Console()
        console.print(summary_table(exported.report))
        for line in engine_sparsity(exported.report):
            console.print(f"[bold]engine[/] {escape(line)}", highlight=False)
        for note in notes(exported.report):
            console.print(f"[yellow]note[/] {note}", highlight=False)
        console.print(f"report  {output / 'report.html'}", style="dim")
        console.print(f"next    obsdiff generate {drawing(open_bundle(output, 'sizes'))}", style="dim", highlight=False)

    run.print_result(exported.to_json(), show)
    exported.hold()


@verb("prune", (*PRUNE, *SAMPLE, *MODEL, "offload"), model=MODEL_ARGUMENT, **OUTPUT)
def prune(run: Run) -> None:
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

        from obsdiff import pictures
        from obsdiff.display import layers_table

        console = Console()
        console.print(layers_table(result.layers))
        index = {**result.pipeline.config, "_class_name": type(result.pipeline).__name__}
        for note in pictures.note(index, result.recipe.sampling):
            console.print(f"[yellow]note[/] {note}", highlight=False)
        console.print(f"next    obsdiff export {output} --trt -o {output}-bundle", style="dim")

    run.print_result({"folder": str(output), **result.to_json()}, show)


@verb(
    "convert",
    ("revision",),
    file=(
        Annotated[Path, typer.Argument(help="A model as one safetensors file; of two denoisers that of high noise.")],
        ...,
    ),
    second=option(Path | None, "--second", text="The file of the second of two denoisers, of low noise."),
    base=option(
        str, "--base", text="What it was made from, a diffusers folder or Hub id: gives what it lacks.", default=...
    ),
    output=OUTPUT["output"],
)
def convert(run: Run) -> None:
    """A model that is a single file, such as a fine-tune, becomes a diffusers folder."""
    from obsdiff import verbs

    output: Path = run.options["output"]
    found = verbs.convert(
        run.options["file"],
        run.options["base"],
        output,
        second=run.options["second"],
        revision=run.settings.revision,
    )

    def show() -> None:
        from rich.console import Console

        console = Console(highlight=False)
        console.print(f"{output}: {', '.join(found.taken)} as given, in {found.dtype}", soft_wrap=True)
        console.print(f"the rest is the base's: {', '.join(found.copied)}", soft_wrap=True)
        if found.told:
            console.print(f"[yellow]note[/] the file sets {' and '.join(found.told)} of the scheduler")
        if found.left_out:
            console.print(f"[yellow]note[/] tensors of the file that belong to none of these: {found.left_out}")
        console.print(f"next    obsdiff export {output} --sparsity 2:4 --trt -o {output}-bundle", style="dim")

    run.print_result(found.to_json(), show)


@verb(
    "lora",
    (),
    pruned=(Annotated[Path, typer.Argument(help="Pruned diffusers folder.")], ...),
    adapter=(
        Annotated[
            Path | None,
            typer.Argument(help="The LoRA of the dense model, as safetensors; of two denoisers that of high noise."),
        ],
        None,
    ),
    output=option(
        Path,
        "--output",
        "-o",
        text="NAME.safetensors: the LoRA cut to the pruned widths; a folder: the model with the LoRA merged into it.",
        default=...,
    ),
    second=option(
        Path | None, "--second", text="The LoRA of the second of two denoisers, of low noise; written as NAME_2."
    ),
    strength=option(float, "--strength", text="Of the LoRA.", default=1.0),
    force=OUTPUT["force"],
)
def lora(run: Run) -> None:
    """A LoRA of the dense model for a pruned one: cut to its widths, or merged with its zeros kept."""
    from obsdiff import verbs

    output: Path = run.options["output"]
    found = verbs.lora(
        run.options["pruned"],
        run.options["adapter"],
        output,
        second=run.options["second"],
        strength=run.options["strength"],
        force=run.options["force"],
    )

    def show() -> None:
        from rich.console import Console

        console = Console()
        for name in found.unchanged:
            console.print(f"[yellow]note[/] {name} stays as it is: no LoRA of it was given", highlight=False)
        if found.files:
            written = " and ".join(map(str, found.files.values()))
            console.print(f"{written}: {found.layers} layers, {found.cut} of them cut or reordered", highlight=False)
            console.print(f"next    pipe = obsdiff.load({str(run.options['pruned'])!r})", style="dim")
            for name, path in found.files.items():
                where = f", load_into_{name}=True" if name.endswith(BEHIND) else ""
                console.print(f"        pipe.load_lora_weights({str(path)!r}{where})", style="dim", soft_wrap=True)
            return
        console.print(
            f"{output}: merged into {found.layers} layers, {found.cut} of them cut or reordered; "
            f"{found.masked} keep their zeros, and lose what the LoRA adds there",
            highlight=False,
        )
        if found.left_out:
            console.print(f"[yellow]note[/] {found.left_out} tensors are for text encoders and were left out")
        console.print(f"next    obsdiff export {output} --trt -o {output}-bundle", style="dim")

    run.print_result(found.to_json(), show)


@verb("plan", (*PRUNE, *SAMPLE, *MODEL, "vae_tile"), model=MODEL_ARGUMENT)
def plan(run: Run) -> None:
    """Before anything runs: layers, parameters, MACs, memory, disk, calls. Works from config.json alone."""
    from obsdiff import verbs

    _show_plan(run, verbs.plan(run.settings))


def _show_plan(run: Run, planned: Any) -> None:
    from obsdiff.display import show_plan

    run.print_result(planned.to_json(), lambda: show_plan(planned, verbose=run.options["verbose"]))


@verb(
    "eval",
    (*QUALITY, *SAMPLE, "device"),
    pruned=(Annotated[list[Path], typer.Argument(help="Pruned diffusers folders; several: mean and spread.")], ...),
    against=option(str | None, "--against", text="The dense model; default: the pipeline shipped inside."),
    html=option(Path | None, "--html", text="Also write a page with pictures and curves."),
)
def evaluate(run: Run) -> None:
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
        from obsdiff.wording import notes

        single = len(evaluated.reports) == 1
        table = (
            summary_table(evaluated.reports[0])
            if single
            else runs_table(evaluated.folders, evaluated.reports, evaluated.spread)
        )
        console = Console()
        console.print(table)
        for note in dict.fromkeys(note for each in evaluated.reports for note in notes(each)):
            console.print(f"[yellow]note[/] {note}", highlight=False)

    run.print_result(evaluated.to_json(), show)
    evaluated.hold()
