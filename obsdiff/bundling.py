"""Everything that happens to a pruned denoiser: compared, delivered, reported, bundled."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from torch import nn

from obsdiff import card, costs, delivery, facts, gates, report, turns
from obsdiff.defaults import Defaults, vae_scale
from obsdiff.evaluation import Evaluation, ImagePair, figure_names
from obsdiff.evaluation import evaluate as run_pairs
from obsdiff.families import reading
from obsdiff.gates import Gate
from obsdiff.guidance import GuidanceScore, parse_guidance, sweep_guidance
from obsdiff.job import Job
from obsdiff.judges import OBEDIENCE, Judges, Score
from obsdiff.measurements import BuiltEngine, Counts, LatencyPair, NotMeasured, Report, Stage
from obsdiff.pruning import Pruned
from obsdiff.sampling import Pair
from obsdiff.settings import Settings
from obsdiff.sizes import sizes_of
from obsdiff.sparsity import NM
from obsdiff_export import engines, orders
from obsdiff_export.build import Engine
from obsdiff_export.engines import Engines
from obsdiff_export.onnx import OnnxModel
from obsdiff_export.orders import Order
from obsdiff_export.proof import receipt
from obsdiff_export.quantizing import Quantization, imitated
from obsdiff_export.requested import Served
from obsdiff_export.stored import is_stored
from obsdiff_runtime.autoencoder import tile_side
from obsdiff_runtime.bundle import Defaults as BundleDefaults
from obsdiff_runtime.bundle import Manifest, write_manifest
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.progress import Progress
from obsdiff_runtime.turns import Turns
from obsdiff_runtime.version import __version__

EVALUATION_SEED: Final = 1_000_000
"""Added to the seed for the comparison, so that no calibration noise is seen again."""

_NOTHING_EXPORTED: Final = NotMeasured(why="nothing was exported")
_NOTHING_CHANGED: Final = NotMeasured(why="the model was exported as it came")


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """What was written, and how large and fast the denoiser is in it.

    Attributes:
        dense_bytes, pruned_bytes: of the denoiser's weights, in the same format; of all that take turns.
        components: in the bundle; none where nothing was exported.
        latency: of one call of each denoiser.
        served: what engines are for, whether there are any; None where nothing was exported.
        engines: None where none were built.
        turns: of the denoisers; empty where one takes all steps.
    """

    dense_bytes: int
    pruned_bytes: int
    components: tuple[delivery.Delivered, ...] = ()
    latency: tuple[LatencyPair, ...] | NotMeasured = _NOTHING_EXPORTED
    served: Served | None = None
    engines: Engines | None = None
    turns: Turns = dataclasses.field(default_factory=dict)


class Stages:
    """Wall times of named stages."""

    def __init__(self) -> None:
        self.done: list[Stage] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.done.append(Stage(name=name, seconds=time.monotonic() - started))


def compare(
    job: Job,
    pruned: Pruned,
    dense: Mapping[str, nn.Module],
    prompts: Sequence[str],
    progress: Progress,
    *,
    judges: Judges | None = None,
    scales: Sequence[float] = (),
    dense_scores: Mapping[float, float] | None = None,
    keep_images: int | None = None,
    quantizations: Mapping[str, Quantization] = MappingProxyType({}),
) -> tuple[Evaluation | NotMeasured, tuple[ImagePair, ...]]:
    """Dense against pruned on the prompts.

    Args:
        job: how they are run; the noise is none that calibration saw.
        pruned: its pipeline draws, with one denoiser and the other.
        dense: the denoiser before, or those that take turns, by name.
        prompts: none: nothing is measured.
        progress: told of every step.
        judges: who looks at the pictures; None: the model's own check, where it has one.
        scales: guidance scales to judge both models at beside the job's own.
        dense_scores: the dense model's, by guidance scale, where an earlier comparison found them.
        keep_images: how many picture pairs are returned; None for all.
        quantizations: of pruned denoisers whose weights are rounded, by name: they are compared as they will compute.
    """
    if not quantizations and not any(each.kept or any(layer.zeros for layer in each.layers) for each in pruned.turns):
        return NotMeasured(why="nothing was pruned"), ()
    if not prompts:
        return NotMeasured(why="no prompts to compare on were asked for (--eval-prompts 0)"), ()
    if pruned.pipeline.vae is None:
        return NotMeasured(why="the pipeline has no VAE to draw pictures with"), ()
    judges = Judges(obeys=obedience_of(job.defaults)) if judges is None else judges
    sampled = dataclasses.replace(job.recipe.sampling, seed=job.recipe.sampling.seed + EVALUATION_SEED)
    pairs = {
        each.family.denoiser: Pair(dense=dense[each.family.denoiser], pruned=each.denoiser) for each in pruned.turns
    }
    first = pairs.pop(job.family.denoiser)
    same: Any = {"dense": first.dense, "pruned": first.pruned, "behind": pairs, "prompts": prompts, "sampling": sampled}
    with contextlib.ExitStack() as stack:
        for name, quantization in quantizations.items():
            stack.enter_context(imitated(pruned.denoisers[name], quantization))
        evaluation, images = run_pairs(
            pruned.pipeline, job.family, **same, judges=judges, keep_images=keep_images, progress=progress
        )
        if scales and judges.first is not None:
            sweep = sweep_guidance(
                pruned.pipeline,
                job.family,
                **same,
                fixed=_fixed(evaluation, judges.first[0]),
                scales=scales,
                judge=judges.first,
                dense_scores=dense_scores,
                progress=progress,
            )
            evaluation = dataclasses.replace(evaluation, guidance=sweep)
    return evaluation, images


def scales_of(settings: Settings, judges: Judges) -> tuple[float, ...]:
    """The guidance scales asked for.

    Raises:
        ConfigError: they are none, or nobody can judge a picture by itself.
    """
    if settings.guidance_sweep is None:
        return ()
    if judges.first is None:
        raise ConfigError(
            "--guidance-sweep: nothing here can say which picture is better; give --clip-model or --judge"
        )
    return parse_guidance(settings.guidance_sweep)


def gates_of(settings: Settings, judges: Judges) -> tuple[Gate, ...]:
    """The quality gates asked for; raises ConfigError for one that is none, or on an unknown metric."""
    found = tuple(gates.parse(text) for text in settings.fail_if or ())
    gates.require_known(found, figure_names(judges.scores))
    return found


def obedience_of(defaults: Defaults) -> Score | None:
    """The check of obedience that the shipped pipeline has."""
    if defaults.prompts != "shapes":
        return None
    from obsdiff import shapes

    return lambda image, prompt: shapes.obeys(image, prompt).all


def _fixed(evaluation: Evaluation, judge: str) -> GuidanceScore:
    scale, dense, pruned = evaluation.sampling.guidance_scale, evaluation.dense_obedience, evaluation.pruned_obedience
    if judge == OBEDIENCE and dense is not None and pruned is not None:
        return GuidanceScore(guidance_scale=scale, dense=dense.share, pruned=pruned.share)
    pair = evaluation.scores[judge]
    return GuidanceScore(guidance_scale=scale, dense=pair.dense, pruned=pair.pruned)


def deliver(
    job: Job,
    settings: Settings,
    pruned: Pruned,
    dense: Mapping[str, nn.Module],
    folder: Path,
    order: Order | None,
    stages: Stages,
    progress: Progress,
    quantizations: Mapping[str, Quantization] = MappingProxyType({}),
) -> Delivery:
    """Writes ONNX, engines (where some are ordered) and the rest into `folder`."""
    sampled = job.recipe.sampling
    pattern = job.recipe.sparsity.pattern
    with stages("export and compare with torch"):
        components = delivery.deliver(
            pruned.pipeline,
            job.family,
            folder,
            sampled,
            settings,
            pruned={
                each.family.denoiser: [layer.name for layer in each.layers if layer.pattern == str(pattern)]
                for each in pruned.turns
            },
            expected=pattern if isinstance(pattern, NM) else None,
            quantizations=quantizations,
            progress=progress,
        )
        delivery.copy_rest(pruned.pipeline, folder)
    denoisers = {item.model.name: item for item in components if item.model.name in dense}
    written = sum(item.model.bytes for item in denoisers.values())
    what, built = served_by(job, settings, pruned.pipeline), None
    same: Any = {
        "components": components,
        "served": what,
        "turns": turns.of(pruned.pipeline, job.family) if len(dense) > 1 else {},
    }
    if any(is_stored(module) for module in dense.values()):
        return Delivery(dense_bytes=written, pruned_bytes=written, latency=delivery.UNCOMPARED, **same)
    with tempfile.TemporaryDirectory(prefix="obsdiff-") as scratch:
        before: Mapping[str, OnnxModel | None] = dict.fromkeys(dense)
        latency: tuple[LatencyPair, ...] | NotMeasured = _NOTHING_CHANGED
        if any(each.denoiser is not dense[each.family.denoiser] for each in pruned.turns):
            with stages("time"):
                before, latency = _timed(job, settings, pruned.pipeline, dense, denoisers, Path(scratch), progress)
        if order is not None:
            with stages("build engines"):
                built = engines.build_engines(
                    {item.model.name: item.model.path for item in components},
                    folder,
                    what,
                    order,
                    denoisers={name: None if model is None else model.path for name, model in before.items()},
                    progress=progress,
                )
            same["components"] = tuple(
                dataclasses.replace(item, engines=(built.built[item.model.name],)) for item in components
            )
    return Delivery(
        dense_bytes=sum(model.bytes for model in before.values() if model is not None) or written,
        pruned_bytes=written,
        latency=latency,
        engines=built,
        **same,
    )


def _timed(
    job: Job,
    settings: Settings,
    pipeline: DiffusionPipeline,
    dense: Mapping[str, nn.Module],
    pruned: Mapping[str, delivery.Delivered],
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, OnnxModel], tuple[LatencyPair, ...] | NotMeasured]:
    """The graphs of the dense denoisers in `folder`, by name, and what a call of each takes beside the pruned one's."""
    before: dict[str, OnnxModel] = {}
    pairs: list[LatencyPair] = []
    absent: NotMeasured | None = None
    for each in job.turns:
        name, sampled = each.family.denoiser, job.recipe.sampling
        before[name] = delivery.export_denoiser(
            pipeline,
            each.family,
            dense[name],
            folder / name,
            sampled,
            like=pruned[name],
            opset=settings.opset,
        )
        latency = delivery.time_denoisers(
            each.family,
            dense[name],
            before[name],
            pruned[name].model,
            sampled,
            job.index,
            text_tokens=job.text_tokens,
            vae_scale=vae_scale(job.configs),
            what=f"one call of {name}" if job.behind else "one denoiser call",
            progress=progress,
        )
        if isinstance(latency, NotMeasured):
            absent = latency
        else:
            pairs.append(latency)
    return before, tuple(pairs) if absent is None else absent


def served_by(job: Job, settings: Settings, pipeline: DiffusionPipeline | None = None) -> Served:
    """What the job's engines are for; without its pipeline, what the denoiser's are for.

    Raises:
        ConfigError: there are no such tiles.
    """
    if settings.vae_tile is not None and "vae" not in job.configs:
        raise ConfigError(f"--vae-tile {settings.vae_tile}: {job.model} has no autoencoder that decodes")
    vae = job.configs.get("vae", {})
    tile = tile_side(settings.vae_tile, None, vae)
    sizes = sizes_of(
        job.recipe.sampling,
        job.pipeline_class,
        job.configs[job.family.denoiser],
        rows=job.rows,
        text_tokens=job.text_tokens,
        vae_scale=vae_scale(job.configs),
        instruction_tokens=0 if pipeline is None else reading.instruction_tokens(pipeline),
        template_tokens=0 if pipeline is None else reading.template_tokens(pipeline),
    )
    return orders.served(sizes, job.pipeline_class, job.configs[job.family.denoiser], vae=vae, tile=tile)


def counts_of(job: Job, denoisers: Mapping[str, nn.Module], bytes_on_disk: int | NotMeasured) -> Counts:
    """Size of the job's denoisers, by name, as they are or pruned; together where several take turns."""
    each = [
        facts.counts(module, costs.macs(module, part.positions(module)), bytes_on_disk)
        for part, module in ((part, denoisers[part.family.denoiser]) for part in job.turns)
    ]
    sums: Any = {name: sum(getattr(counts, name) for counts in each) for name in ("parameters", "nonzero", "macs")}
    return dataclasses.replace(each[0], **sums)


def report_of(
    job: Job,
    pruned: Pruned,
    dense: Counts,
    finished: Delivery,
    evaluation: Evaluation | NotMeasured,
    stages: Sequence[Stage],
) -> Report:
    components = finished.components
    made = finished.engines
    built = tuple(
        _built(item.model.name, engine, "" if made is None else made.choice(engine))
        for item in components
        for engine in item.engines
    )
    return Report(
        obsdiff_version=__version__,
        model=job.model,
        family=job.family.name,
        sparsity=str(job.recipe.sparsity),
        method=job.recipe.method,
        recipe=job.recipe.to_json(),
        environment=facts.environment(torch.get_num_threads()),
        dense=dense,
        pruned=counts_of(job, pruned.denoisers, finished.pruned_bytes),
        layers=turns.told_apart({each.family.denoiser: each.layers for each in pruned.turns}),
        components=tuple(item.report() for item in components) or _NOTHING_EXPORTED,
        engines=built or NotMeasured(why="no engines were asked for; --trt builds them"),
        latency=finished.latency,
        evaluation=evaluation,
        stages=tuple(stages),
    )


def _built(name: str, engine: Engine, choice: str) -> BuiltEngine:
    proven = receipt.load(engine.receipt_path)
    return BuiltEngine(
        component=name,
        backend=f"{engine.backend} {engine.backend_version}",
        targets=engine.targets,
        sparsity=receipt.sparsity_statement(proven),
        bytes_on_disk=engine.bytes,
        seconds=engine.seconds,
        verdicts=proven.proof.counts(),
        choice=choice,
    )


def finish(folder: Path, job: Job, found: Report, images: Sequence[ImagePair], finished: Delivery) -> None:
    """Writes reports, card and manifest: the bundle is whole after this."""
    report.write_json(found, folder / "report.json")
    report.write_html(found, images, folder / "report.html")
    card.write_card(found, folder, "bundle", base_model=hub_id(job.model))
    sampled, what = job.recipe.sampling, finished.served
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
                num_frames=sampled.num_frames,
                max_sequence_length=sampled.max_sequence_length,
                vae_tile=None if what is None else what.tile,
                guidance_scale_2=sampled.guidance_scale_2,
            ),
            turns=finished.turns,
            components={item.model.name: item.entry(folder) for item in finished.components},
            recipe={**job.recipe.to_json(), "sizes": {} if what is None else dict(what.sizes)},
            measurements={} if finished.engines is None else engines.measurements(finished.engines.contests),
        ),
    )


def hub_id(model: str) -> str | None:
    """The model as a card names its base; None for a folder."""
    return model if model.count("/") == 1 and not Path(model).expanduser().exists() else None
