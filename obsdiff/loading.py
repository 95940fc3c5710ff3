"""From what the user names, a folder or a model on the Hub, to a pipeline; or to its configurations alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn

from obsdiff import checkpoint, encoders, offloading, turns, weights
from obsdiff.checkpoint import INDEX
from obsdiff.configs import read_configs, read_family, read_index
from obsdiff.defaults import Defaults, defaults_of
from obsdiff.families import Family, controls
from obsdiff.families.table import family_of
from obsdiff.folders import MANIFEST, is_variant
from obsdiff.hub import fetch_configs, fetch_pipeline
from obsdiff.manifest import PrunedManifest, read_json, read_manifest
from obsdiff.weights import CONVERT
from obsdiff_runtime.errors import ModelError, first_line


@dataclass(frozen=True, kw_only=True)
class LoadedPipeline:
    """A pipeline, and where it came from.

    Attributes:
        pipeline: in eval mode, on the device asked for.
        family: of its denoiser.
        folder: on this machine: as given, or in the Hub's cache.
        defaults: of its calls.
        manifest: what was pruned before of its denoiser; None for a dense one.
        behind: the same of the denoisers that take their turns behind it, by name.
    """

    pipeline: DiffusionPipeline
    family: Family
    folder: Path
    defaults: Defaults
    manifest: PrunedManifest | None = None
    behind: Mapping[str, PrunedManifest | None] = field(default_factory=dict)

    @property
    def denoiser(self) -> nn.Module:
        return self.denoisers[self.family.denoiser]

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """By name, in turn."""
        return turns.modules(self.pipeline, self.family)

    @property
    def folders(self) -> tuple[str, ...]:
        """Of their networks: a UNet that runs its ControlNet consists of two."""
        return tuple(controls.networks(self.denoisers))


class ModelConfigs(NamedTuple):
    """A model without its weights.

    Attributes:
        denoiser: on the meta device, shrunk where it is a pruned one.
        family: of the denoiser.
        configs: by component ("transformer", "vae", "scheduler", "text_encoder", ...), those that are there; and
            "model_index" and, where the pipeline has its own, "obsdiff_defaults". A bare denoiser has only its config.
        behind: the denoisers that take their turns behind it, likewise, by name.
    """

    denoiser: nn.Module
    family: Family
    configs: dict[str, dict[str, Any]]
    behind: Mapping[str, nn.Module] = MappingProxyType({})


def shipped_pipeline() -> Path:
    """The small trained pipeline in this package."""
    return Path(__file__).parent / "assets" / "shapes"


def load_pipeline(
    model: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    offload: bool = False,
    low_memory: bool = False,
    settle: bool = False,
    steered: bool = False,
    local_files_only: bool = False,
) -> LoadedPipeline:
    """The pipeline that a name means.

    Args:
        model: a diffusers folder, a pruned checkpoint of obsdiff, or the id of a model on the Hub.
        revision: branch, tag or commit on the Hub.
        variant: of the weight files, such as "fp16".
        dtype: of all weights; None: as the denoiser is stored.
        device: where to put it.
        offload: leave what the device need not hold in the host's memory; see offloading.
        low_memory: leave the weights of denoiser and text encoders in their files: they can be exported, not run.
        settle: leave the weights of large text encoders in their files, on a CPU; see encoders.
        steered: there are control pictures, so that a ControlNet is part of the UNet; see controls.joined.
        local_files_only: do not ask the Hub; HF_HUB_OFFLINE=1 does the same.

    Raises:
        ModelError: there is no such model, it is no pipeline, its family is unknown or its files are incomplete.
        BundleError: it is a pruned checkpoint that is incomplete or altered.
        CompatibilityError: it is a pruned checkpoint of a newer schema.
    """
    folder = local_path(model)
    if folder is None:
        folder = fetch_pipeline(str(model), revision=revision, variant=variant, local_files_only=local_files_only)
    index = read_index(folder)
    family = read_family(folder, index)
    manifest = checkpoint.pruned_manifest(folder)
    settles = settle and family.described and torch.device(device).type == "cpu"
    left = _encoders_left(folder, index, variant) if low_memory or settles else {}
    if low_memory:
        left |= _left(folder, index, family, variant)
    else:
        left = {name: encoder for name, encoder in left.items() if encoders.is_large(encoder)}
        for encoder in left.values():
            encoders.settle(encoder)
    if manifest is not None and not low_memory:
        pipeline = checkpoint.load(folder, dtype=dtype, given=left)
    else:
        pipeline = _load_dense(folder, index, family, variant=variant, dtype=dtype, given=left)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    if steered:
        pipeline = controls.joined(pipeline)
    if offload:
        for each in turns.families(pipeline, family):
            offloading.place(pipeline, each, torch.device(device))
    elif torch.device(device).type != "cpu":
        pipeline.to(device)
    return LoadedPipeline(
        pipeline=pipeline,
        family=family,
        folder=folder,
        defaults=defaults_of(folder, read_configs(folder, index)),
        manifest=manifest,
        behind={name: checkpoint.manifest_of(folder / name) for name in turns.names(index, family)[1:]},
    )


def load_configs(
    model: str | Path, *, revision: str | None = None, steered: bool = False, local_files_only: bool = False
) -> ModelConfigs:
    """A model's shape, from its configurations alone; no weights are read or fetched.

    Args:
        model: as for `load_pipeline`; also a denoiser's folder, or its configuration, a JSON file.
        revision: branch, tag or commit on the Hub.
        steered: as for `load_pipeline`.
        local_files_only: do not ask the Hub.

    Raises:
        ModelError: there is no such model, it has no denoiser, or its family is unknown.
        BundleError: it is a pruned checkpoint whose cuts do not fit.
    """
    path = local_path(model)
    if path is None:
        path = fetch_configs(str(model), revision=revision, local_files_only=local_files_only)
    if path.is_file() or not (path / INDEX).is_file():
        return _bare(path)
    index = read_index(path)
    family = read_family(path, index)
    configs = read_configs(path, index)
    steering = configs.get(controls.NETWORK)
    if not steered or not controls.joins(index, steering):
        steering = None
    denoisers = {
        name: _empty(path / name / "config.json", configs[name], steering) for name in turns.names(index, family)
    }
    denoiser = denoisers.pop(family.denoiser)
    return ModelConfigs(denoiser, family, configs, denoisers)


def _load_dense(
    folder: Path,
    index: Mapping[str, Any],
    family: Family,
    *,
    variant: str | None,
    dtype: torch.dtype | None,
    given: Mapping[str, nn.Module] = MappingProxyType({}),
) -> DiffusionPipeline:
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] is not None and not (folder / name).is_dir():
            raise ModelError(f"{folder}: {INDEX} lists {name}, but there is no such folder; is the copy complete?")
    try:
        stored = dtype or _stored_dtype(folder / family.denoiser, variant)
        return checkpoint.assemble(folder, given, dtype=stored, variant=variant)
    except SafetensorError as error:
        raise ModelError(f"{folder}: a weight file is truncated or altered: {error}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: cannot be loaded: {first_line(error)}") from error


def _left(folder: Path, index: Mapping[str, Any], family: Family, variant: str | None) -> dict[str, nn.Module]:
    """Denoisers whose weights stay in their files."""
    denoisers = {
        name: checkpoint.stored_denoiser(folder / name, variant=variant) for name in turns.names(index, family)
    }
    return controls.networks(denoisers)


def _encoders_left(folder: Path, index: Mapping[str, Any], variant: str | None) -> dict[str, nn.Module]:
    """Text encoders whose weights stay in their files, but for those whose files name them otherwise."""
    found = {
        name: weights.stored_encoder(folder / name, entry[1], variant=variant)
        for name, entry in index.items()
        if encoders.reads(name) and entry[0] == "transformers"
    }
    return {name: encoder for name, encoder in found.items() if encoder is not None}


def _stored_dtype(folder: Path, variant: str | None) -> torch.dtype:
    """Of the largest tensor in the first weight file.

    Raises:
        ModelError: there is no safetensors file.
    """
    files = sorted(folder.glob(f"*.{variant}*.safetensors" if variant else "*.safetensors"))
    files = [path for path in files if variant or not is_variant(path)]
    if not files:
        what = f"of variant {variant} " if variant else ""
        raise ModelError(f"{folder} holds no weights {what}as safetensors; {CONVERT}")
    with safe_open(files[0], framework="pt") as file:
        name = max(file.keys(), key=lambda key: math.prod(file.get_slice(key).get_shape()))
        dtype: torch.dtype = file.get_tensor(name).dtype
    return dtype


def local_path(model: str | Path) -> Path | None:
    """The path, where it exists; None where the name can only mean a model on the Hub.

    Raises:
        ModelError: it can be neither.
    """
    text = str(model)
    path = Path(model).expanduser()
    if not text:
        raise ModelError("the model's name is empty; name a diffusers folder or a model on the Hub")
    if path.is_dir() or (path.suffix == ".json" and path.is_file()):
        return path
    if path.is_file() and path.suffix != ".safetensors":
        raise ModelError(f"{model} is a file; name a diffusers folder or a model on the Hub")
    if path.is_file():
        raise ModelError(
            f"{model} is a single file; make a folder of it with obsdiff convert {model} --base MODEL -o FOLDER, "
            "MODEL being what it was made from, and name that"
        )
    if text.count("/") > 1 or text.startswith((".", "/", "~")) or "\\" in text:
        raise ModelError(f"{text}: there is no such folder")
    return None


def _bare(path: Path) -> ModelConfigs:
    """A denoiser without a pipeline."""
    file = path if path.is_file() else path / "config.json"
    if not file.is_file():
        raise ModelError(f"{path} is neither a diffusers pipeline ({INDEX}) nor a denoiser (config.json)")
    config = read_json(file, ModelError)
    family = family_of(str(config.get("_class_name", "a model without _class_name")), config)
    return ModelConfigs(_empty(file, config), family, {family.denoiser: config})


def _empty(file: Path, config: Mapping[str, Any], steering: Mapping[str, Any] | None = None) -> nn.Module:
    """The denoiser of this file's configuration on the meta device; cuts of a pruned one, beside it, are replayed.

    `steering` is the configuration of the ControlNet that it runs.
    """
    name = str(config["_class_name"])
    try:
        with torch.device("meta"):
            denoiser: nn.Module = getattr(diffusers, name).from_config(dict(config))
            if steering is not None:
                denoiser = controls.join(denoiser, diffusers.ControlNetModel.from_config(dict(steering)))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{file}: {first_line(error)}") from None
    if (file.parent / MANIFEST).is_file():
        checkpoint.replay(denoiser, read_manifest(file.parent), file.parent)
    return denoiser.eval()
