"""Pruned folders against their dense model: a report of each, and over several of them mean and spread.

Several folders are one method with several calibration seeds, or whatever is to be laid side by side.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from obsdiff import facts, gates, pictures, report, turns
from obsdiff.bundling import Delivery, Stages, compare, counts_of, gates_of, obedience_of, report_of, scales_of
from obsdiff.evaluation import Evaluation, ImagePair
from obsdiff.families import controls
from obsdiff.gates import Gate
from obsdiff.job import computable, open_job, require_same_config
from obsdiff.job import load as load_model
from obsdiff.judges import Judge, Judges, judges_of
from obsdiff.loading import LoadedPipeline, load_pipeline
from obsdiff.manifest import PrunedManifest
from obsdiff.measurements import NotMeasured, Report
from obsdiff.pruning import Pruned
from obsdiff.recipe import evaluation_prompts
from obsdiff.results import LayerResult
from obsdiff.settings import Settings
from obsdiff.spread import Spread, spread_of
from obsdiff.weights import main_dtype
from obsdiff_runtime.errors import ConfigError, require_file
from obsdiff_runtime.progress import Progress, silent

SHOWN: Final = 12
"""Picture pairs kept of each of several folders; of one folder, all."""

_UNSEEN: Final = (
    "the ControlNet was pruned, too, and is neither compared nor counted here: --references FOLDER gives it control "
    "pictures",
)


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Pruned folders, compared with their dense model.

    Attributes:
        folders: as they were given.
        reports: one each.
        gates: what they are to be held to.
    """

    folders: tuple[Path, ...]
    reports: tuple[Report, ...]
    gates: tuple[Gate, ...] = ()

    @property
    def spread(self) -> dict[str, Spread]:
        """Of every figure that all runs have, by key; empty for one run. Identical pictures have no finite PSNR."""
        figures = [found.figures() for found in map(_evaluation, self.reports) if found is not None]
        if len(figures) < 2 or len(figures) < len(self.reports):
            return {}
        return spread_of(figures)

    def hold(self) -> None:
        """Holds every run to the gates.

        Raises:
            QualityError: one fails; names folder, metric, value and bound.
            ConfigError: a gate is on something that was not measured.
        """
        for folder, found in zip(self.folders, self.reports, strict=True):
            hold(self.gates, found, folder)

    def to_json(self) -> dict[str, Any]:
        """Of one folder its report; of several {"runs": [...], "spread": {...}}."""
        if len(self.reports) == 1:
            return self.reports[0].to_json()
        runs = [
            {"folder": str(folder), **found.to_json()} for folder, found in zip(self.folders, self.reports, strict=True)
        ]
        return {"runs": runs, "spread": {name: dataclasses.asdict(spread) for name, spread in self.spread.items()}}


def evaluate(
    pruned: Path | str | Sequence[Path | str],
    against: str | None = None,
    settings: Settings | None = None,
    *,
    html: Path | None = None,
    judges: Mapping[str, Judge] | None = None,
    command: str | None = None,
    progress: Progress = silent,
) -> Evaluated:
    """`obsdiff eval`: pruned folders against the dense model, paired: the same prompts, the same noise.

    Args:
        pruned: a folder that obsdiff pruned, or several.
        against: the dense model, a folder or Hub id; None: the pipeline shipped inside.
        settings: sampling, prompts, judges, guidance scales, gates.
        html: also write a page there.
        judges: further scores of a picture for its prompt, by name.
        command: what the user typed, for the page.
        progress: told of every step.

    Returns:
        the reports. Gates are not held yet: `Evaluated.hold` does that, so that a failed run can be looked at.

    Raises:
        ObsdiffError: one of its kinds.
    """
    settings = settings or Settings()
    folders = (Path(pruned),) if isinstance(pruned, Path | str) else tuple(Path(folder) for folder in pruned)
    if not folders or len(set(folders)) < len(folders):
        raise ConfigError("name at least one pruned folder, and each once")
    if html is not None:
        require_file("--html", html)
    dense = load_model(dataclasses.replace(settings, model=against), settle=True)
    computable(dense)
    called = judges_of(settings, obeys=obedience_of(dense.defaults), device=dense.pipeline.device, judges=judges)
    held = gates_of(settings, called)
    scales = scales_of(settings, called)
    found: list[Report] = []
    images: list[tuple[ImagePair, ...]] = []
    for folder in folders:
        known = _dense_scores(found[0]) if found else None
        one, pairs = _one(
            folder,
            dense,
            dataclasses.replace(settings, model=against),
            judges=called,
            scales=scales,
            dense_scores=known,
            keep_images=None if len(folders) == 1 else SHOWN,
            progress=progress,
        )
        found.append(dataclasses.replace(one, command=command))
        images.append(pairs)
    result = Evaluated(folders=folders, reports=tuple(found), gates=held)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        if len(folders) == 1:
            report.write_html(found[0], images[0], html)
        else:
            report.write_side_by_side(result.folders, result.reports, result.spread, images, html)
    return result


def hold(held: Sequence[Gate], found: Report, folder: Path) -> None:
    """Holds the report of what lies in a folder to gates; see gates.require."""
    evaluation = _evaluation(found)
    gates.require(held, {} if evaluation is None else evaluation.figures(), of=str(folder))


def as_stored(pruned: Pruned, loaded: LoadedPipeline) -> Pruned:
    """Pruned denoisers with what the folder that they were loaded from says became of each linear."""
    manifests = {loaded.family.denoiser: loaded.manifest, **loaded.behind}
    first, *behind = (
        dataclasses.replace(each, layers=_layers(manifests[each.family.denoiser])) for each in pruned.turns
    )
    return dataclasses.replace(first, behind=tuple(behind))


def _layers(manifest: PrunedManifest | None) -> tuple[LayerResult, ...]:
    linears = {} if manifest is None else manifest.linears
    return tuple(LayerResult(name=name, **record.model_dump()) for name, record in linears.items())


def _one(
    folder: Path,
    dense: LoadedPipeline,
    settings: Settings,
    *,
    judges: Judges,
    scales: Sequence[float],
    dense_scores: Mapping[float, float] | None,
    keep_images: int | None,
    progress: Progress,
) -> tuple[Report, tuple[ImagePair, ...]]:
    other = load_pipeline(
        folder,
        dtype=main_dtype(dense.denoiser),
        device=dense.pipeline.device,
        settle=True,
        steered=settings.references is not None,
    )
    if other.manifest is None:
        raise ConfigError(f"{folder} was not pruned by obsdiff; `obsdiff prune` makes such a folder")
    require_same_config(dense, other)
    recipe = other.manifest.recipe
    job = open_job(
        dataclasses.replace(settings, sparsity=other.manifest.sparsity, method=recipe.get("method", settings.method))
    )
    first, *behind = (
        Pruned(
            pipeline=other.pipeline,
            family=family,
            recipe=job.recipe,
            kept={} if manifest is None else manifest.keep,
            units={},
            layers=(),
        )
        for family, manifest in zip(
            turns.families(other.pipeline, other.family), (other.manifest, *other.behind.values()), strict=True
        )
    )
    result = as_stored(dataclasses.replace(first, behind=tuple(behind)), other)
    stages = Stages()
    with stages("verify"):
        evaluation, images = compare(
            job,
            result,
            dense.denoisers,
            evaluation_prompts(settings, job.defaults.prompts, job.defaults.labels),
            progress,
            judges=judges,
            scales=scales,
            dense_scores=dense_scores,
            keep_images=keep_images,
        )
    finished = Delivery(
        dense_bytes=facts.weight_bytes(dense.folder, dense.folders),
        pruned_bytes=facts.weight_bytes(folder, other.folders),
    )
    found = report_of(
        job, result, counts_of(job, dense.denoisers, finished.dense_bytes), finished, evaluation, stages.done
    )
    pruned_too = controls.covers(other.manifest.linears)
    unseen = _UNSEEN if pruned_too and controls.of(other.denoiser) is None else ()
    untold = pictures.note(job.index, job.recipe.sampling, who="this comparison")
    return dataclasses.replace(found, recipe=recipe or found.recipe, notes=(*found.notes, *(unseen or untold))), images


def _dense_scores(found: Report) -> dict[float, float] | None:
    evaluation = _evaluation(found)
    if evaluation is None or evaluation.guidance is None:
        return None
    return {score.guidance_scale: score.dense for score in evaluation.guidance.scores}


def _evaluation(found: Report) -> Evaluation | None:
    return None if isinstance(found.evaluation, NotMeasured) else found.evaluation
