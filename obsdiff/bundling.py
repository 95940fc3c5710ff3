"""Everything that happens to a pruned denoiser: compared, delivered, reported, bundled."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from obsdiff import card, costs, delivery, facts, report
from obsdiff.evaluation import Evaluation, ImagePair, Score
from obsdiff.evaluation import evaluate as run_pairs
from obsdiff.job import Job
from obsdiff.loading import Defaults, vae_scale
from obsdiff.measurements import Counts, LatencyPair, NotMeasured, Report, Stage
from obsdiff.pruning import Pruned
from obsdiff.settings import Settings
from obsdiff.sparsity import NM
from obsdiff_export.builders.request import Builder
from obsdiff_runtime.bundle import Defaults as BundleDefaults
from obsdiff_runtime.bundle import Manifest, write_manifest
from obsdiff_runtime.progress import Progress
from obsdiff_runtime.version import __version__

EVALUATION_SEED: Final = 1_000_000
"""Added to the seed for the comparison, so that no calibration noise is seen again."""

_NOTHING_EXPORTED: Final = NotMeasured(why="nothing was exported")


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """What was written, and how large and fast the denoiser is in it.

    Attributes:
        dense_bytes, pruned_bytes: of the denoiser's weights, in the same format.
        components: in the bundle; none where nothing was exported.
        sizes: of the dynamic axes at the served size.
    """

    dense_bytes: int
    pruned_bytes: int
    components: tuple[delivery.Delivered, ...] = ()
    latency: LatencyPair | NotMeasured = _NOTHING_EXPORTED
    sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


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
    job: Job, pruned: Pruned, dense: nn.Module, prompts: Sequence[str], progress: Progress
) -> tuple[Evaluation | NotMeasured, tuple[ImagePair, ...]]:
    if not pruned.kept and not any(layer.zeros for layer in pruned.layers):
        return NotMeasured(why="nothing was pruned"), ()
    if not prompts:
        return NotMeasured(why="no prompts to compare on were asked for (--eval-prompts 0)"), ()
    if pruned.pipeline.vae is None:
        return NotMeasured(why="the pipeline has no VAE to draw pictures with"), ()
    sampled = dataclasses.replace(job.recipe.sampling, seed=job.recipe.sampling.seed + EVALUATION_SEED)
    return run_pairs(
        pruned.pipeline,
        job.family,
        dense=dense,
        pruned=pruned.denoiser,
        prompts=prompts,
        sampling=sampled,
        score=_score(job.defaults),
        progress=progress,
    )


def _score(defaults: Defaults) -> Score | None:
    if defaults.prompts != "shapes":
        return None
    from obsdiff import shapes

    return lambda image, prompt: shapes.obeys(image, prompt).all


def deliver(
    job: Job,
    settings: Settings,
    pruned: Pruned,
    dense: nn.Module,
    folder: Path,
    builder: Builder | None,
    stages: Stages,
    progress: Progress,
) -> Delivery:
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
    sizes = delivery.sizes_of(sampled, text_tokens=job.text_tokens, vae_scale=scale)
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
    return Delivery(
        dense_bytes=dense_bytes,
        pruned_bytes=denoiser.model.bytes,
        components=components,
        latency=latency,
        sizes=sizes,
    )


def report_of(
    job: Job,
    pruned: Pruned,
    dense: nn.Module,
    finished: Delivery,
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
        components=tuple(item.report() for item in components) or _NOTHING_EXPORTED,
        engines=engines or NotMeasured(why="no engines were asked for; --trt builds them"),
        latency=(finished.latency,) if isinstance(finished.latency, LatencyPair) else finished.latency,
        evaluation=evaluation,
        stages=tuple(stages),
    )


def finish(folder: Path, job: Job, found: Report, images: Sequence[ImagePair], finished: Delivery) -> None:
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
