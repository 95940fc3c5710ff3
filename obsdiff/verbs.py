"""One function a verb. These, the checkpoint code and the bundle code are what touches disk."""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from obsdiff import card, checkpoint, delivery, facts, launch, pictures, pruning, ranks, turns
from obsdiff.adapting import lora as lora
from obsdiff.bundling import (
    Delivery,
    Stages,
    compare,
    counts_of,
    deliver,
    finish,
    gates_of,
    hub_id,
    obedience_of,
    report_of,
    scales_of,
    served_by,
)
from obsdiff.comparison import as_stored, hold
from obsdiff.comparison import evaluate as evaluate
from obsdiff.decoding import decoding
from obsdiff.evaluation import check_size
from obsdiff.families import controls, require_described
from obsdiff.folders import check_free, new_folder
from obsdiff.gates import Gate
from obsdiff.job import (
    Job,
    check_size_of,
    computable,
    given,
    name_of,
    open_job,
    remember_dtypes,
    require,
    require_disk_for,
    require_nothing_computed,
    require_offloadable,
)
from obsdiff.job import load as load_model
from obsdiff.journal import FolderJournal
from obsdiff.judges import judges_of
from obsdiff.loading import LoadedPipeline
from obsdiff.manifest import GroupCut, LinearRecord, PrunedManifest
from obsdiff.measurements import NotMeasured, Report
from obsdiff.methods.table import METHODS
from obsdiff.planning import Plan, offloaded
from obsdiff.precision import Quantized, fitting, format_of, note, quantizable, quantize_turns, separate
from obsdiff.pruning import Pruned
from obsdiff.recipe import evaluation_prompts, prompts_digest
from obsdiff.resolving import resolve
from obsdiff.settings import Settings, given_as
from obsdiff.single_files import convert as convert
from obsdiff.sparsity import parse
from obsdiff_export import engines, orders
from obsdiff_export.engines import Built
from obsdiff_export.onnx import checked_opset
from obsdiff_export.orders import Order, order_of
from obsdiff_export.parity import require_onnxruntime
from obsdiff_export.proof import receipt
from obsdiff_export.proof.receipt import Receipt
from obsdiff_export.resources import existing_folder
from obsdiff_export.settings import ENGINES
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.progress import Progress, silent


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A finished bundle, the gates it is to be held to, and the receipts that are to prove its sparsity, if any are."""

    folder: Path
    report: Report
    gates: tuple[Gate, ...] = ()
    required: tuple[Receipt, ...] | None = None

    def hold(self) -> None:
        """Raises QualityError or SparsityProofError where it fails; the bundle stays, so that it can be looked at."""
        hold(self.gates, self.report, self.folder)
        if self.required is not None:
            receipt.require_sparse(self.required)

    def to_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), **self.report.to_json()}


def plan(settings: Settings, *, before: Path | None = None, force: bool = False) -> Plan:
    """What a run would do, from configurations alone.

    Args:
        settings: model, sparsity and the rest.
        before: output folder of the run that this precedes; checked as that run would.
        force: as for that run.

    Raises:
        ConfigError, ModelError: as that run would.
    """
    if before is not None:
        check_free(before, force=force)
    job = open_job(separate(settings))
    if settings.offload:
        require_offloadable(settings, job.recipe)
    planned, sampled = job.plan(), job.recipe.sampling
    if settings.offload:
        denoisers = {each.denoiser: each.family for each in job.turns}
        planned = offloaded(planned, denoisers, beside=job.beside_bytes)
    found = decoding(
        job.configs,
        height=sampled.height,
        width=sampled.width,
        num_frames=sampled.num_frames,
        tile=settings.vae_tile,
    )
    notes = () if found is None else found.notes(planned.estimates.checkpoint_bytes)
    return dataclasses.replace(planned, decoding=found, notes=(*planned.notes, *notes))


def prune(
    model: DiffusionPipeline | str | Path | None = None,
    *,
    prompts: Sequence[str] | None = None,
    progress: Progress = silent,
    **settings: Any,
) -> Pruned:
    """Prunes a pipeline in memory: `prune(pipe, sparsity="2:4", prompts=[...])`.

    Args:
        model: a pipeline, whose denoiser is pruned in place and keeps its dtype, or what `obsdiff prune` takes.
        prompts: to calibrate on; None: the built-in ones, or `prompts_file`.
        progress: told of calibration and solving.
        **settings: the flags of `obsdiff prune`.
    """
    if isinstance(model, DiffusionPipeline):
        asked = Settings(**settings)
        loaded = given(model, steered=asked.references is not None)
        if asked.offload:
            raise ConfigError("offload=True is for a model by its name: a pipeline in memory lies where it lies")
        name = str(model.config.get("_name_or_path") or type(model).__name__)
    else:
        asked = Settings(model=None if model is None else str(model), **settings)
        loaded, name = load_model(asked), name_of(asked)
    recipe = resolve(asked, model=name, family=loaded.family, defaults=loaded.defaults, prompts=prompts)
    check_size_of(loaded, recipe.sampling)
    restore = remember_dtypes(loaded.pipeline)
    try:
        pruned = pruning.prune(loaded.pipeline, loaded.family, recipe, stored=computable(loaded), progress=progress)
    finally:
        restore()
    own = model if isinstance(model, DiffusionPipeline) else controls.apart(loaded.pipeline)
    return dataclasses.replace(pruned, pipeline=own)


def save(pruned: Pruned, folder: Path | str, *, source: Path | None = None, force: bool = False) -> None:
    """Writes a pruned pipeline as a diffusers folder; see checkpoint.save."""
    manifest, behind = _manifests_after(pruned, source)
    checkpoint.save(pruned.pipeline, pruned.denoiser, Path(folder), manifest, behind=behind, source=source, force=force)


def load(folder: Path | str, *, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """The pipeline of a folder that `save` or `obsdiff prune` wrote; see checkpoint.load."""
    return checkpoint.load(Path(folder), dtype=dtype)


def prune_to_folder(
    settings: Settings, output: Path, *, force: bool = False, resume: bool = False, progress: Progress = silent
) -> Pruned:
    """`obsdiff prune`: a pruned diffusers folder.

    Raises:
        ObsdiffError: one of its kinds; nothing half-written is left.
        Finished: this is another than the first of several ranks, and the pruning is done.
    """
    check_free(output, force=force)
    job = open_job(settings)
    if settings.offload:
        require_offloadable(settings, job.recipe)
    if METHODS[job.recipe.method].calibrates:
        pictures.require(job.pipeline_class, job.recipe.sampling)
    weights = require(job, settings, output, copies=1)
    loaded = load_model(settings, offload=True, settle=True)
    require_disk_for(loaded, output, 2 * weights)
    restore, stored = remember_dtypes(loaded.pipeline), computable(loaded)
    journal = FolderJournal(output, job.recipe.digest(), resume=resume)
    size = facts.weight_bytes(loaded.folder, loaded.folders)
    before, stages = counts_of(job, loaded.denoisers, size), Stages()
    with stages("calibrate and prune"):
        pruned = _prune(loaded, job, stored, journal, progress)
    restore()
    with new_folder(output, force=force) as folder:
        manifest, behind = _manifests_after(pruned, loaded.folder)
        checkpoint.save_into(folder, pruned.pipeline, pruned.denoiser, manifest, behind=behind, source=loaded.folder)
        finished = Delivery(dense_bytes=size, pruned_bytes=facts.weight_bytes(folder, loaded.folders))
        nothing = NotMeasured(why="prune compares nothing; obsdiff eval does")
        found = report_of(job, pruned, before, finished, nothing, stages.done)
        found = dataclasses.replace(found, licence=card.licence_of(loaded.folder))
        card.write_card(found, folder, "checkpoint", base_model=hub_id(job.model))
    journal.remove()
    return pruned


def export(
    model: Settings | str | Path | None = None,
    output: Path | str | None = None,
    *,
    force: bool = False,
    resume: bool = False,
    command: str | None = None,
    progress: Progress = silent,
    **more: Any,
) -> Exported:
    """The main job: prune, shrink, ONNX, engines, verify, measure, bundle: `export(output="out", sparsity="2:4")`.

    Args:
        model: what `obsdiff export` takes, or all settings; without a sparsity the model is exported as it is.
        output: the bundle's folder.
        force: replace an earlier result.
        resume: go on after the last finished package of a killed run.
        command: what the user typed, for the report.
        progress: told of every stage.
        **more: the flags of `obsdiff export`.

    Raises:
        ObsdiffError: one of its kinds; nothing half-written is left.
        Finished: this is another than the first of several ranks, and the pruning is done.
    """
    settings = separate(_asked(model, more))
    format = format_of(settings)
    if output is None:
        raise ConfigError("export writes a folder: name it, as in export(output='sd35m')")
    output = Path(output)
    check_free(output, force=force)
    require_onnxruntime()
    order = fitting(_order_of(settings), settings)
    for part in ("denoiser", "vae"):
        quantized = format is not None and part == "denoiser"
        checked_opset(delivery.dtype_of(part, settings), settings.opset, quantized=quantized)
    if settings.low_memory:
        require_nothing_computed(settings)
    job = open_job(settings, sparsity_required=False)
    require_described(job.family, "obsdiff export")
    what = served_by(job, settings)
    if order is not None:
        orders.require_drawable(order, what)
    if format is not None:
        quantizable(job.family.linears(job.denoiser), job.recipe.keep_float)
    held_out = evaluation_prompts(settings, job.defaults.prompts, job.defaults.labels)
    if held_out:
        check_size(job.recipe.sampling)
    elif settings.fail_if:
        raise ConfigError("--fail-if: nothing is measured without prompts to compare on; raise --eval-prompts")
    if format is not None or (settings.sparsity and (held_out or METHODS[job.recipe.method].calibrates)):
        pictures.require(job.pipeline_class, job.recipe.sampling)
    weights = 0 if settings.low_memory else require(job, settings, output, copies=3)
    journal = FolderJournal(output, job.recipe.digest(), resume=resume)
    stages = Stages()
    with stages("load"):
        loaded = load_model(settings, low_memory=True, settle=True)
        require_disk_for(loaded, output, 3 * weights or facts.weight_bytes(loaded.folder, loaded.folders))
        judges = judges_of(settings, obeys=obedience_of(loaded.defaults), device=loaded.pipeline.device)
        gates, scales = gates_of(settings, judges), scales_of(settings, judges)
        stored = computable(loaded)
        changes = settings.sparsity is not None or format is not None
        dense = copy.deepcopy(loaded.denoisers) if changes else loaded.denoisers
    with stages("calibrate and prune"):
        pruned = _prune(loaded, job, stored, journal, progress)
    rounded: dict[str, Quantized] = {}
    if format is not None:
        with stages("quantize"):
            dtype = delivery.dtype_of(job.family.denoiser, settings)
            rounded = quantize_turns(pruned.pipeline, job.family, job.recipe, format, dtype=dtype, progress=progress)
    quantizations = {name: each.quantization for name, each in rounded.items()}
    with stages("verify"):
        evaluation, images = compare(
            job, pruned, dense, held_out, progress, judges=judges, scales=scales, quantizations=quantizations
        )
    if settings.sparsity is None and loaded.manifest is not None:  # pruned by an earlier run: say and check what it is
        recipe = dataclasses.replace(job.recipe, sparsity=parse(loaded.manifest.sparsity))
        job = dataclasses.replace(job, recipe=recipe)
        pruned = as_stored(pruned, loaded)
    with new_folder(output, force=force) as folder:
        finished = deliver(job, settings, pruned, dense, folder, order, stages, progress, quantizations)
        found = dataclasses.replace(
            report_of(job, pruned, counts_of(job, dense, finished.dense_bytes), finished, evaluation, stages.done),
            command=command,
            licence=card.licence_of(loaded.folder),
            quantized=turns.told_apart({name: each.linears for name, each in rounded.items()}),
            notes=(
                *job.notes(),
                *((note(rounded),) if rounded else ()),
                *delivery.notes(finished.components),
            ),
        )
        finish(folder, job, found, images, finished)
        built = [engine for item in finished.components for engine in item.engines]
        required = engines.receipts(built) if order is not None and order.require_sparse else None
    journal.remove()
    return Exported(folder=output, report=found, gates=gates, required=required)


def build(
    bundle: Path | str,
    settings: Settings | None = None,
    *,
    components: Sequence[str] = (),
    progress: Progress = silent,
    **more: Any,
) -> Built:
    """Engines for this machine from a bundle's ONNX; its manifest lists them: `build("sd35m", profile="512,1024@1-4")`.

    Args:
        bundle: the folder.
        settings: of the command line.
        components: only these; all of them if none are named.
        progress: told component by component.
        **more: the flags of `obsdiff build`.

    Raises:
        ObsdiffError: one of its kinds; the manifest is as before. `Built.hold` asks for the proof of sparsity.
    """
    return engines.build(bundle, given_as(settings, more), components=components, progress=progress)


def _asked(model: Settings | str | Path | None, more: dict[str, Any]) -> Settings:
    if isinstance(model, Settings):
        return given_as(model, more)
    return given_as(None, more if model is None else {"model": str(model), **more})


def _order_of(settings: Settings) -> Order | None:
    """The order for engines, None where none are to be built.

    Raises:
        ConfigError: a flag for engines without --trt.
    """
    if settings.trt:
        return order_of(settings)
    for name in ENGINES:
        if getattr(settings, name):
            raise ConfigError(f"--{name.replace('_', '-')} is about engines, and none are built without --trt")
    return None


def _prune(loaded: LoadedPipeline, job: Job, stored: torch.dtype, journal: FolderJournal, progress: Progress) -> Pruned:
    """Prunes with all ranks that there are, and goes on with the first."""
    with ranks.joined(loaded.pipeline.device) as place:
        pruned = pruning.prune(
            loaded.pipeline,
            loaded.family,
            job.recipe,
            stored=stored,
            journal=journal,
            scratch=existing_folder(journal.folder),
            progress=progress,
        )
    if place.rank:
        raise launch.Finished
    return pruned


def _manifests_after(pruned: Pruned, source: Path | None) -> tuple[PrunedManifest, dict[str, PrunedManifest]]:
    """Of what was pruned, on top of what had been pruned of the source before; and of denoisers behind, by name."""
    found = {
        each.family.denoiser: _pruned_manifest(each).after(
            None if source is None else checkpoint.manifest_of(source / each.family.denoiser)
        )
        for each in pruned.turns
    }
    return found.pop(pruned.family.denoiser), found


def _pruned_manifest(pruned: Pruned) -> PrunedManifest:
    return PrunedManifest(
        family=pruned.family.name,
        sparsity=str(pruned.recipe.sparsity),
        groups={name: GroupCut(units=pruned.units[name], kept=kept) for name, kept in pruned.kept.items()},
        orders=dict(pruned.orders),
        linears={
            layer.name: LinearRecord(pattern=layer.pattern, loss=layer.loss, zeros=layer.zeros, reason=layer.reason)
            for layer in pruned.layers
        },
        recipe=pruned.recipe.to_json(),
        prompts_sha256=prompts_digest(pruned.recipe.prompts),
    )
