"""A model known by its configurations alone, and what is to be done with it; then the model itself."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
from torch import nn
from transformers.utils import logging as transformers_logging

from obsdiff import allocation, costs, encoders, facts, glances, latencies, parking, pictures, planning, ranks, turns
from obsdiff.checkpoint import DEFAULTS, unsaved
from obsdiff.configs import DEFAULTS_KEY, require_alike, require_known_pipeline, require_known_turns
from obsdiff.defaults import Defaults, defaults_of, vae_scale
from obsdiff.estimates import Streams, Workload
from obsdiff.families import HELP, Family, controls, generic, rows
from obsdiff.families.table import family_of
from obsdiff.latencies import Times
from obsdiff.loading import LoadedPipeline, load_configs, load_pipeline, shipped_pipeline
from obsdiff.manifest import read_json
from obsdiff.methods.table import METHODS
from obsdiff.planning import Plan
from obsdiff.recipe import Recipe, Sampling, select
from obsdiff.resolving import resolve
from obsdiff.settings import Settings
from obsdiff.weights import main_dtype
from obsdiff_export.resources import free_bytes, require_disk, require_memory
from obsdiff_export.stored import is_stored
from obsdiff_runtime.errors import ConfigError, ModelError
from obsdiff_runtime.kinds.table import KINDS


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model known by its configurations alone, and what is to be done with it.

    Attributes:
        behind: what is to be done with the denoisers that take their turns behind this one.
        settles: text encoders lie in their files meanwhile; see encoders.
    """

    model: str
    family: Family
    denoiser: nn.Module
    configs: Mapping[str, Mapping[str, Any]]
    defaults: Defaults
    recipe: Recipe
    behind: "tuple[Job, ...]" = ()
    settles: bool = True

    @property
    def turns(self) -> "tuple[Job, ...]":
        """For each denoiser, this one first."""
        return (self, *self.behind)

    @property
    def text_tokens(self) -> int:
        return self.family.text_tokens(self.configs, self.recipe.sampling.max_sequence_length)

    @property
    def rows(self) -> int:
        """Rows of the denoiser's batch for one image."""
        return rows(self.family, self.denoiser, self.recipe.sampling.guidance_scale)

    @property
    def index(self) -> Mapping[str, Any]:
        """The pipeline's configuration; of a denoiser on its own the name of its family's class alone."""
        return {"_class_name": self.family.pipeline, **self.configs.get("model_index", {})}

    @property
    def pipeline_class(self) -> str:
        """Name of the diffusers class; of a denoiser on its own that of its family."""
        return str(self.index["_class_name"])

    def positions(self, denoiser: nn.Module) -> dict[str, int]:
        return facts.positions(denoiser, **self._call)

    @property
    def _call(self) -> dict[str, Any]:
        """What is known of a call of the denoiser."""
        return {
            "family": self.family,
            "sampling": self.recipe.sampling,
            "pipeline_class": self.pipeline_class,
            "text_tokens": self.text_tokens,
            "vae_scale": vae_scale(self.configs),
        }

    def times(self) -> Times:
        """The costs of the recipe's latency table; see latencies."""
        table = latencies.table_of(self.recipe.allocation)
        return Times(table, self.family.linears(self.denoiser), self.positions(self.denoiser))

    def plan(self) -> Plan:
        """Of all denoisers."""
        sizes = [costs.weight_bytes(job.denoiser) for job in self.turns]
        held = sum(sizes) + self.beside_bytes
        return planning.together(
            {job.family.denoiser: job._plan(held - own) for job, own in zip(self.turns, sizes, strict=True)}
        )

    @cached_property
    def beside_bytes(self) -> int:
        """Of the networks that are not pruned, in float32, as far as they are there meanwhile."""
        pruned = controls.networks({job.family.denoiser: job.denoiser for job in self.turns})
        return encoders.bytes_beside(self.configs, pruned, settled=self.settles and self.family.described)

    def _plan(self, other_bytes: int) -> Plan:
        recipe, streams = self.recipe, METHODS[self.recipe.method].streams
        linears, groups = select(recipe, self.family.linears(self.denoiser), self.family.groups(self.denoiser))
        planned = planning.plan(
            self.denoiser,
            self.family,
            recipe.sparsity,
            linears=linears,
            groups=groups,
            positions=self.positions(self.denoiser),
            align=recipe.align,
            allocation=recipe.allocation,
            workload=Workload(
                prompts=len(recipe.prompts),
                batch_size=recipe.sampling.batch_size,
                steps=recipe.sampling.num_inference_steps,
                guided=self.rows > 1,
                calibrates=METHODS[recipe.method].calibrates,
                packages=recipe.packages,
                budget_bytes=recipe.gram_budget_bytes,
                flops_per_second=costs.matmul_speed(),
                other_bytes=other_bytes,
                streams=streams_of(recipe) if streams else None,
            ),
            waiting_bytes=facts.waiting_bytes(self.denoiser, **self._call) if streams else None,
        )
        return dataclasses.replace(planned, notes=(*planned.notes, *self.notes()))

    def notes(self) -> tuple[str, ...]:
        """What a user should know of how it is calibrated."""
        sparsity = self.recipe.sparsity
        calibrates = METHODS[self.recipe.method].calibrates and (sparsity.structured or sparsity.pattern is not None)
        return pictures.note(self.index, self.recipe.sampling) if calibrates else ()


def streams_of(recipe: Recipe) -> Streams:
    """How much a streamed method will look at."""
    passes = -(-len(recipe.prompts) // recipe.sampling.batch_size)
    measured = 0.0 if recipe.allocation == "uniform" else allocation.EFFORT
    return Streams(
        draws=recipe.draws,
        trajectory_steps=recipe.trajectory_steps,
        kept_steps=recipe.kept_steps,
        tokens=glances.TOKENS,
        metric=recipe.metric,
        replay=recipe.replay,
        measuring_calls=round(measured * passes * recipe.sampling.num_inference_steps),
    )


def open_job(settings: Settings, *, sparsity_required: bool = True, steered: bool = False) -> Job:
    """The job that the settings name.

    Args:
        settings: model, sparsity and the rest.
        sparsity_required: whether no sparsity is an error, or none.
        steered: count a ControlNet as part of the UNet also where there are no control pictures.

    Raises:
        ConfigError, ModelError: there is no such model, or nothing that it can be asked for.
    """
    if settings.sparsity is None and not sparsity_required:
        settings = dataclasses.replace(settings, sparsity="structured:0")
    source = settings.model or shipped_pipeline()
    denoiser, family, configs, behind = load_configs(
        source, revision=settings.revision, steered=steered or settings.references is not None
    )
    defaults = defaults_of(None, configs)
    recipe = resolve(settings, model=name_of(settings), family=family, defaults=defaults)
    select(recipe, family.linears(denoiser), family.groups(denoiser))
    pipeline = str(configs.get("model_index", {}).get("_class_name", family.pipeline))
    check_size(pipeline, configs[family.denoiser], vae_scale(configs), recipe.sampling)
    job = Job(
        model=name_of(settings),
        family=family,
        denoiser=denoiser,
        configs=configs,
        defaults=defaults,
        recipe=recipe,
        settles=_on_cpu(settings),
    )
    job = dataclasses.replace(
        job,
        behind=tuple(
            dataclasses.replace(job, family=turns.placed(family, name), denoiser=other)
            for name, other in behind.items()
        ),
    )
    if latencies.is_latency(recipe.allocation):
        groups = select(recipe, family.linears(denoiser), family.groups(denoiser))[1]
        job.times().require(allocation.spendable(groups, recipe))
    return job


def check_size_of(loaded: LoadedPipeline, sampling: Sampling) -> None:
    """`check_size` of a pipeline in memory."""
    vae = getattr(loaded.pipeline, "vae", None)
    scale = loaded.family.vae_scale if vae is None else vae_scale({"vae": dict(vae.config)})
    check_size(type(loaded.pipeline).__name__, dict(loaded.denoiser.config), scale, sampling)  # type: ignore[arg-type]


def check_size(pipeline: str, config: Mapping[str, Any], scale: int, sampling: Sampling) -> None:
    """Raises ConfigError for an image size that the denoiser cannot draw.

    Args:
        pipeline: class of it; of one that the runtime does not know, only whole latent pixels are asked for,
            of films whole patches.
        config: of the denoiser.
        scale: pixels per side of a latent pixel.
        sampling: the size.
    """
    kind = KINDS.get(pipeline)
    patch = config.get("patch_size")
    of_films = int(patch[-1]) if isinstance(patch, (list, tuple)) else 1  # frames, rows, columns
    step = scale * (of_films if kind is None else kind.patch(config))
    largest = None if kind is None else kind.largest(config)
    only = None if kind is None else kind.only(config)
    for flag, pixels in (("--height", sampling.height), ("--width", sampling.width)):
        if only is not None and pixels != only * scale:
            raise ConfigError(f"{flag} {pixels}: this denoiser draws {only * scale} pixels a side, and no other size")
        if pixels % step:
            below = max(pixels // step * step, step)
            raise ConfigError(f"{flag} {pixels}: must be a multiple of {step}; near are {below} and {below + step}")
        if largest is not None and pixels > largest * scale:
            raise ConfigError(f"{flag} {pixels}: this denoiser draws at most {largest * scale} pixels a side")


def name_of(settings: Settings) -> str:
    return settings.model or "the shipped pipeline"


def load(
    settings: Settings,
    *,
    offload: bool = False,
    low_memory: bool = False,
    settle: bool = False,
    steered: bool = False,
) -> LoadedPipeline:
    """The pipeline that the settings name.

    Args:
        settings: model and device.
        offload: follow `settings.offload`, which `require_offloadable` has allowed.
        low_memory: follow `settings.low_memory`, which `require_nothing_computed` has allowed.
        settle: as for `load_pipeline`.
        steered: as for `open_job`.

    Raises:
        ConfigError: the settings say one of these where it is not followed, or name a device that torch cannot use
            here.
        ModelError: see `load_pipeline`.
    """
    if settings.offload and not offload:
        raise ConfigError(
            "--offload: only obsdiff prune, which writes a folder, goes from block to block; leave it out"
        )
    if settings.low_memory and not low_memory:
        raise ConfigError("--low-memory: only obsdiff export, where nothing is pruned, needs no weights; leave it out")
    device = ranks.device_of(settings.device)
    disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"--device {device}: this torch cannot use it here") from None
    return load_pipeline(
        settings.model or shipped_pipeline(),
        revision=settings.revision,
        variant=settings.variant,
        device=device,
        offload=bool(settings.offload and offload),
        low_memory=bool(settings.low_memory and low_memory),
        settle=settle,
        steered=steered or settings.references is not None,
    )


def require_offloadable(settings: Settings, recipe: Recipe) -> None:
    """Raises ConfigError where --offload has no use, or cannot serve what is asked for."""
    if _on_cpu(settings):
        raise ConfigError("--offload is for GPUs, and this run is on the CPU")
    if not METHODS[recipe.method].streams:
        raise ConfigError(f"--offload goes from block to block, and --method {recipe.method} does not; take streamed")
    if recipe.family == generic.name:
        raise ConfigError("--offload needs to know what reads the prompts, and no family describes this denoiser")


def _on_cpu(settings: Settings) -> bool:
    """Of a name that is no device's it is not known yet."""
    return ranks.device_of(settings.device).partition(":")[0] == "cpu"


def require_nothing_computed(settings: Settings) -> None:
    """Raises ConfigError where --low-memory is asked for together with something that runs the model."""
    instead = {
        "sparsity": "prune first (obsdiff prune MODEL --sparsity ... -o OUT), then export OUT",
        "precision": "eight bits need calibration",
        "trt": "export without it, then obsdiff build OUT",
        "fail_if": "nothing is measured",
    }
    for name, why in instead.items():
        if getattr(settings, name):
            raise ConfigError(f"--low-memory runs no model, so --{name.replace('_', '-')} cannot go with it: {why}")


def given(pipeline: DiffusionPipeline, *, steered: bool = False) -> LoadedPipeline:
    """A pipeline object, as if it had been loaded; `steered` as for `load_pipeline`.

    Raises:
        ModelError: it has no denoiser, or one of no known family, or its denoisers take turns that are not known.
    """
    index = {**pipeline.config, **unsaved(pipeline), "_class_name": type(pipeline).__name__}
    configs: dict[str, dict[str, Any]] = {
        name: dict(component.config)
        for name, component in pipeline.components.items()
        if name in ("transformer", "unet", "vae") and component is not None
    }
    name = next((name for name in ("transformer", "unet") if name in configs), None)
    if name is None:
        raise ModelError(f"this {type(pipeline).__name__} has no denoiser (transformer or unet)")
    family = family_of(getattr(pipeline, name))
    if family.denoiser != name:
        raise ModelError(f"no family describes this {type(getattr(pipeline, name)).__name__}; {HELP}")
    require_known_turns(index, family)
    require_known_pipeline(index, family)
    require_alike([dict(getattr(pipeline, each).config) for each in turns.names(index, family)])
    configs[name]["_class_name"] = type(getattr(pipeline, name)).__name__
    configs["model_index"] = index
    folder = Path(str(pipeline.config.get("_name_or_path") or "in memory"))
    if (folder / DEFAULTS).is_file():
        configs[DEFAULTS_KEY] = read_json(folder / DEFAULTS, ModelError)
    defaults = defaults_of(folder, configs)
    if steered:
        pipeline = controls.joined(pipeline)
    return LoadedPipeline(pipeline=pipeline, family=family, folder=folder, defaults=defaults)


def computable(loaded: LoadedPipeline) -> torch.dtype:
    """The dtype the denoiser is stored in; on a CPU the pipeline is widened to float32, which CPUs compute faster.

    Networks whose weights stay in their files compute nothing and are left alone.
    """
    stored = main_dtype(loaded.denoiser)
    if loaded.pipeline.device.type in ("cpu", "meta"):
        for component in loaded.pipeline.components.values():
            if isinstance(component, nn.Module) and not is_stored(component):
                nn.Module.to(component, torch.float32)  # diffusers' own warns of modules it does not have
    return stored


def remember_dtypes(pipeline: DiffusionPipeline) -> Callable[[], None]:
    """Call before `computable`; what it returns gives every weight of the pipeline the dtype back that it has now."""
    before = {key: tensor.dtype for key, tensor in _tensors(pipeline).items()}

    def restore() -> None:
        for key, tensor in _tensors(pipeline).items():
            tensor.data = tensor.data.to(before.get(key, tensor.dtype))

    return restore


def _tensors(pipeline: DiffusionPipeline) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (name, leaf): tensor
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module)
        for leaf, tensor in (*component.named_parameters(), *component.named_buffers())
    }


def require_same_config(dense: LoadedPipeline, pruned: LoadedPipeline) -> None:
    """Raises ConfigError where one denoiser cannot have come from the other: their configs say so."""
    before, after = (
        {key: value for key, value in dict(loaded.denoiser.config).items() if not key.startswith("_")}  # type: ignore[arg-type]
        for loaded in (dense, pruned)
    )
    differing = [key for key in before if key not in after or after[key] != before[key]]
    if dense.family is not pruned.family or differing:
        what = f"{differing[0]} differs" if differing else f"they are {dense.family.name} and {pruned.family.name}"
        raise ConfigError(
            f"{pruned.folder} was not pruned from {dense.folder}: {what}; name the dense model with --against"
        )


def require(job: Job, settings: Settings, output: Path, *, copies: int) -> int:
    """The bytes of the pruned denoiser's checkpoint.

    Raises:
        ResourceError: the host's memory or the disk are too small for the plan; what a GPU holds shows at work.
    """
    estimates = job.plan().estimates
    weights, scratch = estimates.checkpoint_bytes, estimates.scratch_bytes
    on_disk = scratch <= parking.ROOM * (free_bytes(output) - copies * weights)
    if not METHODS[job.recipe.method].streams:
        advice = "raise --packages or lower --gram-budget and --batch-size"
    else:
        advice = "lower --batch-size, --height or --width" if on_disk else parking.ADVICE
    if _on_cpu(settings):
        needed = estimates.memory_bytes + (copies - 1) * weights
    else:
        needed = copies * weights if settings.offload else 0
    require_memory(needed + (0 if on_disk else scratch), advice=advice)
    require_disk(output, copies * weights)
    return weights


def require_disk_for(loaded: LoadedPipeline, output: Path, denoiser_bytes: int) -> None:
    """Raises ResourceError where the disk is too small for so much of the denoiser, and everything else beside it.

    Asked before calibration, when the other components' sizes are known too; blobs of the Hub's cache are linked and
    count nothing.
    """
    others = sum(
        path.stat().st_size
        for path in loaded.folder.glob("*/*.safetensors")
        if path.parent.name not in loaded.folders and not path.is_symlink()
    )
    require_disk(output, denoiser_bytes + others)
