"""Pruned checkpoints: a diffusers folder whose denoiser carries a manifest of what was cut and masked.

    <folder>/model_index.json, scheduler/, tokenizer*/, text_encoder*/, vae/     as in the source pipeline
    <folder>/<denoiser>/config.json, *.safetensors                              as diffusers writes them
    <folder>/<denoiser>/obsdiff.json                                            the manifest
    <folder>/controlnet/     where the UNet ran its ControlNet, which the manifest tells of too (families/controls.py)

Loading builds the empty denoiser from its config, replays the cuts and fills it strictly. Nothing is ever pickled.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from obsdiff import folders, turns, weights
from obsdiff.families import controls
from obsdiff.families.table import FAMILIES, family_of
from obsdiff.folders import MANIFEST, new_folder
from obsdiff.manifest import PrunedManifest, read_json, read_manifest
from obsdiff.shrinking import shrink
from obsdiff_runtime.errors import BundleError
from obsdiff_runtime.labels import ID2LABEL, written_labels

INDEX: Final = "model_index.json"
DEFAULTS: Final = "obsdiff_defaults.json"


def save(
    pipeline: DiffusionPipeline,
    denoiser: nn.Module,
    folder: Path,
    manifest: PrunedManifest,
    *,
    behind: Mapping[str, PrunedManifest] = MappingProxyType({}),
    source: Path | None = None,
    force: bool = False,
) -> None:
    """Writes a pruned checkpoint; the folder appears when it is whole.

    Args:
        pipeline: whose other components go along; those that are None stay None.
        denoiser: pruned, and shrunk where the manifest says so.
        folder: to be created.
        manifest: of the denoiser.
        behind: of denoisers that take their turns behind it, by name; they are the pipeline's.
        source: folder that the pipeline was loaded from: its files are copied instead of written anew.
        force: replace an earlier result.

    Raises:
        ConfigError: the folder exists.
    """
    with new_folder(folder, force=force) as partial:
        save_into(partial, pipeline, denoiser, manifest, behind=behind, source=source)


def save_into(
    folder: Path,
    pipeline: DiffusionPipeline,
    denoiser: nn.Module,
    manifest: PrunedManifest,
    *,
    behind: Mapping[str, PrunedManifest] = MappingProxyType({}),
    source: Path | None = None,
) -> None:
    """`save` into a folder that exists and that the caller finishes."""
    family = FAMILIES[manifest.family]
    pruned = {family.denoiser: (denoiser, manifest)}
    pruned |= {name: (getattr(pipeline, name), its) for name, its in behind.items()}
    for name, component in _components(pipeline):
        if name not in pruned:
            changed = name == controls.NETWORK and controls.covers(manifest.linears)
            save_component(component, folder / name, None if changed or source is None else source / name)
    for name, (module, its) in pruned.items():
        target = folder / name
        network = controls.networks({name: module})[name]
        network.save_pretrained(target, safe_serialization=True)  # type: ignore[operator]
        rewrite_config(target / "config.json")
        _write_json(target / MANIFEST, its.model_dump(mode="json"))
        _check_loads(target)
    save_index(pipeline, folder)
    if source is not None and (source / DEFAULTS).is_file():
        shutil.copyfile(source / DEFAULTS, folder / DEFAULTS)


def save_index(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Writes model_index.json."""
    pipeline.save_config(folder)
    rewrite_config(folder / INDEX, **unsaved(pipeline))


def unsaved(pipeline: Any) -> dict[str, Any]:
    """What an index says of a pipeline beside its configuration, and diffusers forgets: the names of classes."""
    labels = getattr(pipeline, "labels", None)
    return {ID2LABEL: written_labels(labels)} if isinstance(labels, dict) and labels else {}


def load(
    folder: Path, *, dtype: torch.dtype | None = None, given: Mapping[str, nn.Module] = MappingProxyType({})
) -> DiffusionPipeline:
    """The pipeline of a pruned checkpoint.

    Args:
        folder: as written by `save`.
        dtype: of all weights; None: as the denoiser is stored.
        given: components that are not loaded from it.

    Raises:
        BundleError: a file or tensor is missing, altered or superfluous; names it.
        CompatibilityError: the manifest is of a newer schema.
    """
    family = FAMILIES[require_manifest(folder).family]
    denoisers = {
        name: load_denoiser(folder / name, dtype=dtype) for name in turns.names(read_json(folder / INDEX), family)
    }
    networks = controls.networks(denoisers)
    try:
        return assemble(folder, {**networks, **given}, dtype=dtype or weights.main_dtype(networks[family.denoiser]))
    except (OSError, ValueError, SafetensorError) as error:
        raise BundleError(f"{folder}: {error}") from error


def assemble(
    folder: Path, given: Mapping[str, nn.Module], *, dtype: torch.dtype, variant: str | None = None
) -> DiffusionPipeline:
    """The pipeline of a diffusers folder, with some components given and those that are null left null.

    diffusers demands that null components without a default are passed as None; its DiffusionPipeline does not know
    which components of another class are optional, and loads a given one of them from the folder all the same. Its
    errors are passed on.
    """
    index = read_json(folder / INDEX)
    absent = {name: None for name, entry in index.items() if isinstance(entry, list) and entry[0] is None}
    with _without_progress_bars():
        return getattr(diffusers, str(index["_class_name"])).from_pretrained(
            str(folder), **absent, **given, dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True
        )


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """A library does not print: the bars that diffusers and transformers draw over files are off inside."""
    enabled = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in enabled:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in enabled:
            library.enable_progress_bar()


def pruned_manifest(folder: Path) -> PrunedManifest | None:
    """The manifest of a pruned checkpoint; None where the folder is none."""
    found = [family for family in FAMILIES.values() if (folder / family.denoiser / MANIFEST).is_file()]
    return manifest_of(folder / found[0].denoiser) if found else None


def manifest_of(folder: Path) -> PrunedManifest | None:
    """The manifest in a denoiser's folder; None where it was not pruned."""
    return read_manifest(folder) if (folder / MANIFEST).is_file() else None


def require_manifest(folder: Path) -> PrunedManifest:
    """The manifest of a pruned checkpoint; BundleError where the folder is none."""
    manifest = pruned_manifest(folder)
    if manifest is None:
        raise BundleError(f"{folder} holds no {MANIFEST} in its denoiser's folder; is it a pruned checkpoint?")
    return manifest


def empty_denoiser(folder: Path) -> nn.Module:
    """The denoiser in a folder, shrunk as its manifest says, parameters on the meta device.

    Of a UNet that was pruned with its ControlNet both; see controls.join.

    Raises:
        BundleError: the config is missing, or the manifest's cuts do not fit it.
    """
    manifest = read_manifest(folder)
    config = read_json(folder / "config.json")
    family, name = FAMILIES[manifest.family], config.get("_class_name")
    if name is None or family_of(name, config) is not family:
        raise BundleError(f"{folder / 'config.json'}: {name} is no denoiser of family {manifest.family}")
    try:
        with init_empty_weights(include_buffers=False):
            denoiser: nn.Module = getattr(diffusers, name).from_config(config)
            if controls.covers(manifest.linears):
                steering = read_json(folder.parent / controls.NETWORK / "config.json")
                denoiser = controls.join(denoiser, diffusers.ControlNetModel.from_config(steering))
    except (TypeError, ValueError) as error:
        raise BundleError(f"{folder / 'config.json'}: {error}") from None
    replay(denoiser, manifest, folder)
    return denoiser.eval()


def replay(denoiser: nn.Module, manifest: PrunedManifest, folder: Path) -> None:
    """Changes a dense denoiser, on any device: makes the cuts of the manifest in that folder.

    Those of a ControlNet only where the denoiser runs it.

    Raises:
        BundleError: they do not fit it.
    """
    family = FAMILIES[manifest.family]
    units = {group.name: group.units for group in family.groups(denoiser)}
    for group, cut in manifest.groups.items():
        if units.get(group, cut.units) != cut.units:
            raise BundleError(f"{folder / MANIFEST}: {group} has {units[group]} units in the config, not {cut.units}")
    absent = controls.PREFIX if controls.of(denoiser) is None else ()
    keep = {name: units for name, units in manifest.keep.items() if not name.startswith(absent)}
    try:
        shrink(denoiser, family, keep)
    except ValueError as error:
        raise BundleError(f"{folder / MANIFEST}: {error}") from None


def load_denoiser(folder: Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """The denoiser in a folder, filled strictly: every tensor once, with the shape the manifest implies.

    Raises:
        BundleError: a file or tensor is missing, altered or superfluous; names it.
        CompatibilityError: the manifest is of a newer schema.
    """
    denoiser = empty_denoiser(folder)
    for name, network in controls.networks({folder.name: denoiser}).items():
        wide = getattr(network, "_keep_in_fp32_modules", None) or ()
        found = weights.read(folder.parent / name, network.state_dict(), dtype=dtype, wide=wide)
        network.load_state_dict(found, strict=True, assign=True)
    return denoiser


def stored_denoiser(folder: Path, *, variant: str | None = None) -> nn.Module:
    """The denoiser in a folder, pruned or not, with its weights left in their files; see weights.leave.

    Raises:
        BundleError: a file or tensor is missing, altered or superfluous; names it.
        CompatibilityError: it is a pruned one, and the manifest is of a newer schema.
    """
    if (folder / MANIFEST).is_file():
        denoiser = empty_denoiser(folder)
    else:
        config = read_json(folder / "config.json")
        with init_empty_weights(include_buffers=False):
            denoiser = getattr(diffusers, str(config["_class_name"])).from_config(config).eval()
    for name, network in controls.networks({folder.name: denoiser}).items():
        weights.leave(network, folder.parent / name, variant=variant)
    return denoiser


def _check_loads(folder: Path) -> None:
    """A last look before the folder gets its name: what was written must be readable."""
    for part, network in controls.networks({folder.name: empty_denoiser(folder)}).items():
        expected = network.state_dict()
        place = folder.parent / part
        written = weights.shapes(place)
        for name in expected.keys() | written.keys():
            if name not in written or name not in expected or written[name] != expected[name].shape:
                raise BundleError(f"{place}: tensor {name} was not written as the manifest says; nothing was saved")


def _components(pipeline: DiffusionPipeline) -> list[tuple[str, Any]]:
    return [(name, component) for name, component in pipeline.components.items() if component is not None]


def save_component(component: Any, target: Path, source: Path | None = None) -> None:
    """Writes one; where the folder it was loaded from is given and holds its files, these are copied."""
    files, others = folders.component_files(source) if source is not None and source.is_dir() else ([], [])
    if not files and (not others or isinstance(component, nn.Module)):
        with _without_progress_bars():
            component.save_pretrained(target)
        if (target / "config.json").is_file():
            rewrite_config(target / "config.json")
        return
    folders.copy_all([*files, *others], target)


def rewrite_config(path: Path, **more: Any) -> None:
    """Writes a config again with `more`, and without the place it came from: so the same model gives the same bytes."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    _write_json(path, {**config, **more}, sort=True)


def _write_json(path: Path, data: Mapping[str, Any], *, sort: bool = False) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=sort) + "\n", encoding="utf-8")
