"""One function a verb. These, the checkpoint code and the bundle code are what touches disk."""

import contextlib
import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
from torch import nn
from transformers.utils import logging as transformers_logging

from obsdiff import card, checkpoint, costs, delivery, facts, planning, pruning, report
from obsdiff.estimates import Workload
from obsdiff.evaluation import Evaluation, ImagePair, Score
from obsdiff.evaluation import evaluate as compare
from obsdiff.families import Family
from obsdiff.families.table import FAMILIES
from obsdiff.folders import check_free, new_folder
from obsdiff.journal import FolderJournal
from obsdiff.loading import (
    Defaults,
    LoadedPipeline,
    defaults_of,
    load_configs,
    load_pipeline,
    shipped_pipeline,
    vae_scale,
)
from obsdiff.measurements import Counts, LatencyPair, NotMeasured, Report, Stage
from obsdiff.methods.table import METHODS
from obsdiff.planning import Plan
from obsdiff.pruning import Pruned
from obsdiff.recipe import Recipe, evaluation_prompts, prompts_digest, select
from obsdiff.resolving import resolve
from obsdiff.resources import require_disk, require_memory
from obsdiff.settings import Settings
from obsdiff.sparsity import NM
from obsdiff_export.build import Builder, choose_builder
from obsdiff_export.parity import require_onnxruntime
from obsdiff_runtime.bundle import Defaults as BundleDefaults
from obsdiff_runtime.bundle import EngineEntry, Manifest, open_bundle, write_manifest
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.version import __version__


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A finished bundle."""

    folder: Path
    report: Report

    def to_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), **self.report.to_json()}


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A model known by its configurations alone, and what is to be done with it."""

    model: str
    family: Family
    denoiser: nn.Module
    configs: Mapping[str, Mapping[str, Any]]
    defaults: Defaults
    recipe: Recipe

    @property
    def text_tokens(self) -> int:
        return facts.text_tokens(self.configs, self.recipe.sampling.max_sequence_length)

    def positions(self, denoiser: nn.Module) -> dict[str, int]:
        return facts.positions(
            denoiser,
            self.family,
            self.recipe.sampling,
            text_tokens=self.text_tokens,
            vae_scale=vae_scale(self.configs),
        )

    def plan(self) -> Plan:
        recipe = self.recipe
        linears, groups = select(recipe, self.family.linears(self.denoiser), self.family.groups(self.denoiser))
        return planning.plan(
            self.denoiser,
            self.family,
            recipe.sparsity,
            linears=linears,
            groups=groups,
            positions=self.positions(self.denoiser),
            align=recipe.align,
            workload=Workload(
                prompts=len(recipe.prompts),
                batch_size=recipe.sampling.batch_size,
                steps=recipe.sampling.num_inference_steps,
                guided=recipe.sampling.guidance_scale > 1,
                calibrates=METHODS[recipe.method].calibrates,
                packages=recipe.packages,
                budget_bytes=recipe.gram_budget_bytes,
                flops_per_second=costs.matmul_speed(),
            ),
        )


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
    return _job(settings).plan()


def prune(
    model: DiffusionPipeline | str | Path | None = None,
    *,
    prompts: Sequence[str] | None = None,
    progress: Progress = silent,
    **settings: Any,
) -> Pruned:
    """Prunes a pipeline in memory: `prune(pipe, sparsity="2:4", prompts=[...])`.

    Args:
        model: a pipeline, whose denoiser is pruned in place, or what `obsdiff prune` takes.
        prompts: to calibrate on; None: the built-in ones, or `prompts_file`.
        progress: told of calibration and solving.
        **settings: the flags of `obsdiff prune`.
    """
    if isinstance(model, DiffusionPipeline):
        loaded = _given(model)
        given = Settings(**settings)
        name = str(model.config.get("_name_or_path") or type(model).__name__)
    else:
        given = Settings(model=None if model is None else str(model), **settings)
        loaded, name = _load(given), _name(given)
    stored = _computable(loaded)
    recipe = resolve(given, model=name, family=loaded.family, defaults=loaded.defaults, prompts=prompts)
    return pruning.prune(loaded.pipeline, loaded.family, recipe, stored=stored, progress=progress)


def save(pruned: Pruned, folder: Path | str, *, source: Path | None = None, force: bool = False) -> None:
    """Writes a pruned pipeline as a diffusers folder; see checkpoint.save."""
    checkpoint.save(
        pruned.pipeline, pruned.denoiser, Path(folder), _pruned_manifest(pruned), source=source, force=force
    )


def load(folder: Path | str, *, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """The pipeline of a folder that `save` or `obsdiff prune` wrote; see checkpoint.load."""
    return checkpoint.load(Path(folder), dtype=dtype)


def prune_to_folder(
    settings: Settings, output: Path, *, force: bool = False, resume: bool = False, progress: Progress = silent
) -> Pruned:
    """`obsdiff prune`: a pruned diffusers folder."""
    check_free(output, force=force)
    job = _job(settings)
    _require(job, output, copies=1)
    loaded = _load(settings)
    stored = _computable(loaded)
    journal = FolderJournal(output, job.recipe.digest(), resume=resume)
    pruned = pruning.prune(
        loaded.pipeline, loaded.family, job.recipe, stored=stored, journal=journal, progress=progress
    )
    pruned.denoiser.to(stored)
    save(pruned, output, source=loaded.folder, force=force)
    journal.remove()
    return pruned


def export(
    settings: Settings,
    output: Path,
    *,
    force: bool = False,
    resume: bool = False,
    command: str | None = None,
    progress: Progress = silent,
) -> Exported:
    """`obsdiff export`, the main job: prune, shrink, ONNX, engines, verify, measure, bundle.

    Args:
        settings: what is asked for; without a sparsity the model is exported as it is.
        output: the bundle's folder.
        force: replace an earlier result.
        resume: go on after the last finished package of a killed run.
        command: what the user typed, for the report.
        progress: told of every stage.

    Raises:
        ObsdiffError: one of its kinds; nothing half-written is left.
    """
    check_free(output, force=force)
    require_onnxruntime()
    builder = choose_builder() if settings.trt else None
    for part in ("denoiser", "vae"):
        delivery.dtype_of(part, settings)
    job = _job(settings, sparsity_required=False)
    held_out = evaluation_prompts(settings, job.defaults.prompts)
    _require(job, output, copies=3)
    journal = FolderJournal(output, job.recipe.digest(), resume=resume)
    stages = _Stages()
    with stages("load"):
        loaded = _load(settings)
        stored = _computable(loaded)
        dense = copy.deepcopy(loaded.denoiser)
    with stages("calibrate and prune"):
        pruned = pruning.prune(
            loaded.pipeline, loaded.family, job.recipe, stored=stored, journal=journal, progress=progress
        )
    with stages("verify"):
        evaluation, images = _compare(job, pruned, dense, held_out, progress)
    with new_folder(output, force=force) as folder:
        finished = _deliver(job, settings, pruned, dense, folder, builder, stages, progress)
        found = dataclasses.replace(
            _report(job, pruned, dense, finished, evaluation, stages.done),
            command=command,
            licence=card.licence_of(loaded.folder),
        )
        _finish(folder, job, found, images, finished)
    journal.remove()
    return Exported(folder=output, report=found)


def build(
    bundle: Path, *, targets: Sequence[str] | None = None, progress: Progress = silent
) -> tuple[EngineEntry, ...]:
    """`obsdiff build`: engines for this machine from a bundle's ONNX; the manifest lists them."""
    builder = choose_builder()
    opened = open_bundle(bundle)
    manifest = opened.manifest
    family = FAMILIES[manifest.family]
    shape = manifest.recipe
    sizes = shape.get("sizes")
    if not isinstance(sizes, dict):
        raise ConfigError(f"{bundle}: the manifest says nothing of the sizes it was exported for; export it again")
    engines = delivery.build_engines(
        {name: opened.onnx(name) for name in manifest.components},
        bundle,
        {name: tuple(size) if isinstance(size, list) else size for name, size in sizes.items()},
        builder=builder,
        targets=targets or (),
        sparse=family.denoiser,
        progress=progress,
    )
    entries = {name: delivery.engine_entry(engine, bundle) for name, engine in engines.items()}
    components = {
        name: dataclasses.replace(
            component,
            engines=(*(old for old in component.engines if old.key != entries[name].key), entries[name]),
        )
        for name, component in manifest.components.items()
    }
    write_manifest(bundle, dataclasses.replace(manifest, components=components))
    return tuple(entries.values())


def evaluate(
    pruned: Path,
    against: str | None,
    settings: Settings,
    *,
    html: Path | None = None,
    progress: Progress = silent,
) -> Report:
    """`obsdiff eval`: a pruned folder against the dense model, paired."""
    if html is not None and html.exists() and html.is_dir():
        raise ConfigError(f"--html {html}: is a folder; name a file")
    dense = _load(dataclasses.replace(settings, model=against))
    _computable(dense)
    other = load_pipeline(pruned, dtype=dense.denoiser.dtype, device=dense.pipeline.device)
    if other.manifest is None:
        raise ConfigError(f"{pruned} was not pruned by obsdiff; `obsdiff prune` makes such a folder")
    asked = dataclasses.replace(settings, model=against, sparsity=other.manifest.sparsity)
    job = _job(asked)
    layers = tuple(
        pruning.LayerResult(name=name, **record.model_dump()) for name, record in other.manifest.linears.items()
    )
    result = Pruned(
        pipeline=other.pipeline,
        family=other.family,
        recipe=job.recipe,
        kept=other.manifest.keep,
        units={},
        layers=layers,
    )
    stages = _Stages()
    with stages("verify"):
        evaluation, images = _compare(
            job, result, dense.denoiser, evaluation_prompts(settings, job.defaults.prompts), progress
        )
    finished = _Delivery(
        dense_bytes=facts.weight_bytes(dense.folder / dense.family.denoiser),
        pruned_bytes=facts.weight_bytes(pruned / other.family.denoiser),
    )
    found = _report(job, result, dense.denoiser, finished, evaluation, stages.done)
    if html is not None:
        report.write_html(found, images, html)
    return found


@dataclass(frozen=True, kw_only=True)
class _Delivery:
    """What was written, and how large and fast the denoiser is in it.

    Attributes:
        dense_bytes, pruned_bytes: of the denoiser's weights, in the same format.
        components: in the bundle; none where nothing was exported.
        sizes: of the dynamic axes at the served size.
    """

    dense_bytes: int
    pruned_bytes: int
    components: tuple[delivery.Delivered, ...] = ()
    latency: LatencyPair | NotMeasured = NotMeasured(why="nothing was exported")
    sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class _Stages:
    """Wall times of named stages."""

    def __init__(self) -> None:
        self.done: list[Stage] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.done.append(Stage(name=name, seconds=time.monotonic() - started))


def _name(settings: Settings) -> str:
    return settings.model or "the shipped pipeline"


def _job(settings: Settings, *, sparsity_required: bool = True) -> _Job:
    if settings.sparsity is None and not sparsity_required:
        settings = dataclasses.replace(settings, sparsity="structured:0")
    source = settings.model or shipped_pipeline()
    denoiser, family, configs = load_configs(source, revision=settings.revision)
    folder = Path(source).expanduser()
    defaults = defaults_of(folder if folder.is_dir() else None, configs)
    recipe = resolve(settings, model=_name(settings), family=family, defaults=defaults)
    select(recipe, family.linears(denoiser), family.groups(denoiser))
    return _Job(
        model=_name(settings), family=family, denoiser=denoiser, configs=configs, defaults=defaults, recipe=recipe
    )


def _load(settings: Settings) -> LoadedPipeline:
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"--device {device}: this torch cannot use it here") from None
    return load_pipeline(
        settings.model or shipped_pipeline(), revision=settings.revision, variant=settings.variant, device=device
    )


def _given(pipeline: DiffusionPipeline) -> LoadedPipeline:
    """A pipeline object, as if it had been loaded."""
    from obsdiff.families.table import family_of

    index = {"_class_name": type(pipeline).__name__}
    configs: dict[str, dict[str, Any]] = {
        name: dict(component.config)
        for name, component in pipeline.components.items()
        if name in ("transformer", "unet", "vae") and component is not None
    }
    name = next(name for name in ("transformer", "unet") if name in configs)
    family = family_of(getattr(pipeline, name))
    configs[name]["_class_name"] = family.classes[0]
    folder = Path(str(pipeline.config.get("_name_or_path", "")))
    defaults = defaults_of(folder if folder.is_dir() else None, {**configs, "model_index": index})
    return LoadedPipeline(pipeline=pipeline, family=family, folder=folder, defaults=defaults)


def _computable(loaded: LoadedPipeline) -> torch.dtype:
    """The dtype the denoiser is stored in; on a CPU the pipeline is widened to float32, which CPUs compute faster."""
    stored: torch.dtype = next(loaded.denoiser.parameters()).dtype
    if loaded.pipeline.device.type == "cpu":
        for component in loaded.pipeline.components.values():
            if isinstance(component, nn.Module):
                component.to(torch.float32)
    return stored


def _require(job: _Job, output: Path, *, copies: int) -> None:
    """Raises ResourceError where memory or disk are too small for the plan."""
    planned = job.plan()
    weights = planned.estimates.checkpoint_bytes
    require_memory(planned.estimates.memory_bytes + (copies - 1) * weights)
    require_disk(output, copies * weights)


def _compare(
    job: _Job, pruned: Pruned, dense: nn.Module, prompts: Sequence[str], progress: Progress
) -> tuple[Evaluation | NotMeasured, tuple[ImagePair, ...]]:
    if not pruned.kept and not any(layer.zeros for layer in pruned.layers):
        return NotMeasured(why="nothing was pruned"), ()
    if not prompts:
        return NotMeasured(why="no prompts to compare on were asked for (--eval-prompts 0)"), ()
    if pruned.pipeline.vae is None:
        return NotMeasured(why="the pipeline has no VAE to draw pictures with"), ()
    sampled = dataclasses.replace(job.recipe.sampling, seed=job.recipe.sampling.seed + EVALUATION_SEED)
    return compare(
        pruned.pipeline,
        job.family,
        dense=dense,
        pruned=pruned.denoiser,
        prompts=prompts,
        sampling=sampled,
        score=_score(job.defaults),
        progress=progress,
    )


EVALUATION_SEED = 1_000_000
"""Added to the seed, so that no calibration noise is seen again."""


def _score(defaults: Defaults) -> Score | None:
    if defaults.prompts != "shapes":
        return None
    from obsdiff import shapes

    return lambda image, prompt: shapes.obeys(image, prompt).all


def _deliver(
    job: _Job,
    settings: Settings,
    pruned: Pruned,
    dense: nn.Module,
    folder: Path,
    builder: Builder | None,
    stages: _Stages,
    progress: Progress,
) -> _Delivery:
    """Writes ONNX, engines and the rest into `folder`."""
    sampled, scale = job.recipe.sampling, vae_scale(job.configs)
    pattern = job.recipe.sparsity.pattern
    with stages("export and compare with torch"):
        components = delivery.deliver(
            pruned.pipeline,
            job.family,
            folder,
            sampled,
            settings,
            pruned=[layer.name for layer in pruned.layers if layer.pattern == str(pattern)],
            expected=pattern if isinstance(pattern, NM) else None,
            progress=progress,
        )
        delivery.copy_rest(pruned.pipeline, folder)
    denoiser = next(item for item in components if item.model.name == job.family.denoiser)
    with stages("time"):
        latency, dense_bytes = delivery.time_denoisers(
            pruned.pipeline,
            job.family,
            dense,
            denoiser.model,
            sampled,
            text_tokens=job.text_tokens,
            vae_scale=scale,
            opset=settings.opset,
            progress=progress,
        )
    sizes = delivery.sizes_of(job.family, sampled, text_tokens=job.text_tokens, vae_scale=scale)
    if builder is not None:
        with stages("build engines"):
            engines = delivery.build_engines(
                {item.model.name: item.model.path for item in components},
                folder,
                sizes,
                builder=builder,
                targets=settings.targets or (),
                sparse=job.family.denoiser,
                patterns=denoiser.patterns,
                progress=progress,
            )
        components = tuple(dataclasses.replace(item, engines=(engines[item.model.name],)) for item in components)
    return _Delivery(
        dense_bytes=dense_bytes,
        pruned_bytes=denoiser.model.bytes,
        components=components,
        latency=latency,
        sizes=sizes,
    )


def _report(
    job: _Job,
    pruned: Pruned,
    dense: nn.Module,
    finished: _Delivery,
    evaluation: Evaluation | NotMeasured,
    stages: Sequence[Stage],
) -> Report:
    def counts(denoiser: nn.Module, size: int) -> Counts:
        return facts.counts(denoiser, costs.macs(denoiser, job.positions(denoiser)), size)

    components = finished.components
    engines = tuple(delivery.built(item.model.name, engine) for item in components for engine in item.engines)
    return Report(
        obsdiff_version=__version__,
        model=job.model,
        family=job.family.name,
        sparsity=str(job.recipe.sparsity),
        method=job.recipe.method,
        recipe=job.recipe.to_json(),
        environment=facts.environment(torch.get_num_threads()),
        dense=counts(dense, finished.dense_bytes),
        pruned=counts(pruned.denoiser, finished.pruned_bytes),
        layers=pruned.layers,
        components=tuple(item.report() for item in components) or NotMeasured(why="nothing was exported"),
        engines=engines or NotMeasured(why="no engines were asked for; --trt builds them"),
        latency=(finished.latency,) if isinstance(finished.latency, LatencyPair) else finished.latency,
        evaluation=evaluation,
        stages=tuple(stages),
    )


def _finish(folder: Path, job: _Job, found: Report, images: Sequence[ImagePair], finished: _Delivery) -> None:
    """Writes reports, card and manifest: the bundle is whole after this."""
    report.write_json(found, folder / "report.json")
    report.write_html(found, images, folder / "report.html")
    card.write_card(found, folder, "bundle", base_model=_hub_id(job.model))
    sampled = job.recipe.sampling
    write_manifest(
        folder,
        Manifest(
            created_by=f"obsdiff {__version__}",
            family=job.family.name,
            pipeline_class=str(job.configs["model_index"]["_class_name"]),
            sparsity=str(job.recipe.sparsity) if found.layers else "dense",
            defaults=BundleDefaults(
                height=sampled.height,
                width=sampled.width,
                num_inference_steps=sampled.num_inference_steps,
                guidance_scale=sampled.guidance_scale,
                max_sequence_length=sampled.max_sequence_length,
            ),
            components={item.model.name: item.entry(folder) for item in finished.components},
            recipe={**job.recipe.to_json(), "sizes": dict(finished.sizes)},
        ),
    )


def _hub_id(model: str) -> str | None:
    return model if model.count("/") == 1 and not Path(model).expanduser().exists() else None


def _pruned_manifest(pruned: Pruned) -> checkpoint.PrunedManifest:
    return checkpoint.PrunedManifest(
        family=pruned.family.name,
        sparsity=str(pruned.recipe.sparsity),
        groups={name: checkpoint.GroupCut(units=pruned.units[name], kept=kept) for name, kept in pruned.kept.items()},
        linears={
            layer.name: checkpoint.LinearRecord(
                pattern=layer.pattern, loss=layer.loss, zeros=layer.zeros, reason=layer.reason
            )
            for layer in pruned.layers
        },
        recipe=pruned.recipe.to_json(),
        prompts_sha256=prompts_digest(pruned.recipe.prompts),
    )
