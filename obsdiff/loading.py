"""From what the user names, a folder or a model on the Hub, to a pipeline; or to its configurations alone."""

import contextlib
import errno
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn

from obsdiff import checkpoint, offloading, turns, weights
from obsdiff.checkpoint import DEFAULTS, INDEX
from obsdiff.families import HELP, Family, dit, parts, references, sana
from obsdiff.families.table import FAMILIES, family_of
from obsdiff.folders import MANIFEST, is_variant
from obsdiff.manifest import PrunedManifest, read_manifest
from obsdiff_runtime import autoencoder
from obsdiff_runtime.conditioning import IS_DISTILLED, KINDS
from obsdiff_runtime.errors import ModelError, ResourceError
from obsdiff_runtime.labels import Labels, read_labels

_DEFAULTS_KEY = Path(DEFAULTS).stem
_PIPELINES: Final[Mapping[str, tuple[str, ...]]] = {
    "flux": ("FluxPipeline", "FluxKontextPipeline"),
    "flux2": ("Flux2KleinPipeline", "Flux2Pipeline"),
    "qwen": ("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
    "sana": ("SanaPipeline", sana.SPRINT),
    "wan": ("WanPipeline", "WanImageToVideoPipeline"),
    "zimage": ("ZImagePipeline",),
}
"""Of families whose networks are told other things in other pipelines, those that obsdiff knows."""

_CONVERT = "pickled ones are not read: convert them with save_pretrained(safe_serialization=True)"


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """How a pipeline is run where nothing else is asked for.

    Attributes:
        height: in pixels.
        width: in pixels.
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance.
        num_frames: of a film; None where the pipeline draws pictures.
        max_sequence_length: text tokens of T5, or of the zeros in its place; None where the pipeline has no such thing.
        prompts: name of the prompt set the pipeline was made for; None for general ones.
        takes_guidance: whether a guidance scale above 1 makes a difference; not where a pipeline's steps are distilled.
        takes_references: whether its denoiser is told pictures beside the prompt, or its films begin with one.
        takes_turns: whether several denoisers share its steps; see turns.py.
        labels: the classes that it draws, where a prompt is one.
    """

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    num_frames: int | None = None
    max_sequence_length: int | None = None
    prompts: str | None = None
    takes_guidance: bool = True
    takes_references: bool = False
    takes_turns: bool = False
    labels: Labels | None = None


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
        local_files_only: do not ask the Hub; HF_HUB_OFFLINE=1 does the same.

    Raises:
        ModelError: there is no such model, it is no pipeline, its family is unknown or its files are incomplete.
        BundleError: it is a pruned checkpoint that is incomplete or altered.
        CompatibilityError: it is a pruned checkpoint of a newer schema.
    """
    folder = _local(model)
    if folder is None:
        folder = _download(str(model), revision=revision, variant=variant, local_files_only=local_files_only)
    index = _index(folder)
    family = _family(folder, index)
    manifest = checkpoint.pruned_manifest(folder)
    if low_memory:
        pipeline = _load_dense(
            folder, index, family, variant=variant, dtype=dtype, given=_left(folder, index, family, variant)
        )
    elif manifest is not None:
        pipeline = checkpoint.load(folder, dtype=dtype)
    else:
        pipeline = _load_dense(folder, index, family, variant=variant, dtype=dtype)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    if offload:
        for each in turns.families(pipeline, family):
            offloading.place(pipeline, each, torch.device(device))
    elif torch.device(device).type != "cpu":
        pipeline.to(device)
    return LoadedPipeline(
        pipeline=pipeline,
        family=family,
        folder=folder,
        defaults=defaults_of(folder, _configs(folder, index)),
        manifest=manifest,
        behind={name: checkpoint.manifest_of(folder / name) for name in turns.names(index, family)[1:]},
    )


def load_configs(model: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> ModelConfigs:
    """A model's shape, from its configurations alone; no weights are read or fetched.

    Args:
        model: as for `load_pipeline`; also a denoiser's folder, or its configuration, a JSON file.
        revision: branch, tag or commit on the Hub.
        local_files_only: do not ask the Hub.

    Raises:
        ModelError: there is no such model, it has no denoiser, or its family is unknown.
        BundleError: it is a pruned checkpoint whose cuts do not fit.
    """
    path = _local(model)
    if path is None:
        path = _download_configs(str(model), revision=revision, local_files_only=local_files_only)
    if path.is_file() or not (path / INDEX).is_file():
        return _bare(path)
    index = _index(path)
    family = _family(path, index)
    configs = _configs(path, index)
    denoisers = {name: _empty(path / name / "config.json", configs[name]) for name in turns.names(index, family)}
    denoiser = denoisers.pop(family.denoiser)
    return ModelConfigs(denoiser, family, configs, denoisers)


def defaults_of(folder: Path | None, configs: Mapping[str, Mapping[str, Any]]) -> Defaults:
    """A pipeline's defaults: its own file's, else those of diffusers' call for its class.

    Args:
        folder: of the pipeline, for messages.
        configs: as `load_configs` gives them.

    Raises:
        ModelError: the pipeline's own file names something else.
    """
    values = _class_defaults(configs)
    given = configs.get(_DEFAULTS_KEY, {})
    unknown = given.keys() - values.keys()
    if unknown:
        where = folder / DEFAULTS if folder is not None else DEFAULTS
        raise ModelError(f"{where}: unknown key {min(unknown)}; there are {', '.join(values)}")
    values |= given
    family = _family_of(configs)
    labels = read_labels(configs.get("model_index", {}), configs[family.denoiser]) if family is dit else None
    return Defaults(**values, labels=labels)


def vae_scale(configs: Mapping[str, Mapping[str, Any]]) -> int:
    """Pixels per side of a latent pixel; the denoiser's family's where there is no VAE."""
    return autoencoder.vae_scale(configs["vae"]) if "vae" in configs else _family_of(configs).vae_scale


def require_known_turns(index: Mapping[str, Any], family: Family) -> None:
    """Raises ModelError for denoisers whose steps are not known; `index` is the content of model_index.json."""
    name, denoisers = index["_class_name"], turns.names(index, family)
    if (len(denoisers) > 1) != (index.get(turns.BOUNDARY) is not None):
        raise ModelError(
            f"this {name} has {' and '.join(denoisers)} and {turns.BOUNDARY} {index.get(turns.BOUNDARY)}; denoisers "
            f"that take turns are two, and {turns.BOUNDARY} says when"
        )


def require_alike(configs: Sequence[Mapping[str, Any]]) -> None:
    """Raises ModelError where the configurations of denoisers that take turns differ."""
    first, *others = ({key: config[key] for key in config if not key.startswith("_")} for config in configs)
    for other in others:
        differing = [key for key in first.keys() | other.keys() if first.get(key) != other.get(key)]
        if differing:
            raise ModelError(
                f"the denoisers of this pipeline differ in {min(differing)}, and obsdiff knows only those that take "
                "turns and are alike"
            )


def require_known_pipeline(index: Mapping[str, Any], family: Family) -> None:
    """Raises ModelError for pipelines that tell the family's networks what obsdiff does not; `index` as above.

    So it does for those whose scheduler is another than the only one that they draw by.
    """
    name, known = str(index["_class_name"]), _PIPELINES.get(family.name)
    if known is not None and name not in known:
        raise ModelError(f"of pipelines with this denoiser obsdiff knows {', '.join(known)}, not {name}")
    only = KINDS[name].scheduler if name in KINDS else None
    if only is not None and index["scheduler"][1] != only:
        raise ModelError(f"{name} draws by {only} alone, not by {index['scheduler'][1]}; give it that one")


def _family_of(configs: Mapping[str, Mapping[str, Any]]) -> Family:
    denoiser = next(configs[family.denoiser] for family in FAMILIES.values() if family.denoiser in configs)
    return family_of(str(denoiser["_class_name"]), denoiser)


def _class_defaults(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    family = _family_of(configs)
    denoiser = configs[family.denoiser]
    index = configs.get("model_index", {})
    sprint = family is sana and denoiser.get("guidance_embeds")
    name = index.get("_class_name") or (sana.SPRINT if sprint else family.pipeline)
    if not name:
        raise ModelError(
            f"no family describes a {denoiser['_class_name']}, so its configuration alone is not enough; "
            "name its pipeline's folder"
        )
    pipeline = getattr(diffusers, name)
    signature = inspect.signature(pipeline.__call__).parameters
    rows, columns = family.latent_size(denoiser)
    scale = vae_scale(configs)
    distilled = bool(index.get(IS_DISTILLED))

    def default(argument: str, otherwise: Any) -> Any:
        found = signature[argument].default if argument in signature else None
        return otherwise if found is None or found is inspect.Parameter.empty else found

    return {
        "height": default("height", rows * scale),
        "width": default("width", columns * scale),
        "num_inference_steps": default("num_inference_steps", 50),
        "guidance_scale": 1.0 if distilled else default(parts.guidance_argument(pipeline), 1.0),
        "num_frames": default("num_frames", None),
        "max_sequence_length": default("max_sequence_length", None),
        "prompts": None,
        "takes_guidance": not distilled,
        "takes_references": references.of(name) is not None or references.opens(name) or references.masks_frames(index),
        "takes_turns": len(turns.names(index, family)) > 1,
    }


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
        raise ModelError(f"{folder}: cannot be loaded: {_first_line(error)}") from error


def _left(folder: Path, index: Mapping[str, Any], family: Family, variant: str | None) -> dict[str, nn.Module]:
    """Denoiser and text encoders whose weights stay in their files."""
    found = {name: checkpoint.stored_denoiser(folder / name, variant=variant) for name in turns.names(index, family)}
    for name, entry in index.items():
        if name.startswith("text_encoder") and entry[0] == "transformers":
            encoder = weights.stored_encoder(folder / name, entry[1], variant=variant)
            found |= {} if encoder is None else {name: encoder}
    return found


def _stored_dtype(folder: Path, variant: str | None) -> torch.dtype:
    """Of the largest tensor in the first weight file.

    Raises:
        ModelError: there is no safetensors file.
    """
    files = sorted(folder.glob(f"*.{variant}*.safetensors" if variant else "*.safetensors"))
    files = [path for path in files if variant or not is_variant(path)]
    if not files:
        what = f"of variant {variant} " if variant else ""
        raise ModelError(f"{folder} holds no weights {what}as safetensors; {_CONVERT}")
    with safe_open(files[0], framework="pt") as file:
        name = max(file.keys(), key=lambda key: math.prod(file.get_slice(key).get_shape()))
        dtype: torch.dtype = file.get_tensor(name).dtype
    return dtype


def _local(model: str | Path) -> Path | None:
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
    if path.is_file():
        raise ModelError(
            f"{model} is a single file; load it once with from_single_file() of its diffusers pipeline, "
            "save_pretrained() it to a folder, and name that"
        )
    if text.count("/") > 1 or text.startswith((".", "/", "~")) or "\\" in text:
        raise ModelError(f"{text}: there is no such folder")
    return None


def _index(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).is_file():
        raise ModelError(f"{folder} is no diffusers pipeline: it holds no {INDEX}")
    return _json(folder / INDEX)


def _family(folder: Path, index: Mapping[str, Any]) -> Family:
    if not hasattr(diffusers, str(index.get("_class_name"))):
        raise ModelError(f"{folder}: diffusers {diffusers.__version__} has no pipeline {index.get('_class_name')}")
    places = dict.fromkeys(["transformer", "unet", *(family.denoiser for family in FAMILIES.values())])
    entries = {place: index[place] for place in places if isinstance(index.get(place), list)}
    found = [(place, str(entry[1])) for place, entry in entries.items() if entry[1] is not None]
    if not found:
        raise ModelError(f"{folder}: this {index['_class_name']} has no denoiser ({' or '.join(places)})")
    file = folder / found[0][0] / "config.json"
    family = family_of(found[0][1], _json(file) if file.is_file() else None)
    if family.denoiser not in index:
        raise ModelError(f"{folder}: no family describes its {found[0][1]}; {HELP}")
    require_known_turns(index, family)
    require_known_pipeline(index, family)
    return family


def _configs(folder: Path, index: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    configs = {"model_index": dict(index)}
    for name in index:
        for file in ("config.json", "scheduler_config.json"):
            if (folder / name / file).is_file():
                configs[name] = _json(folder / name / file)
    if "vae" in index and "vae" not in configs and (folder / "vae_decoder" / "config.json").is_file():  # of a bundle
        configs["vae"] = _json(folder / "vae_decoder" / "config.json")
    if (folder / DEFAULTS).is_file():
        configs[_DEFAULTS_KEY] = _json(folder / DEFAULTS)
    family = _family(folder, index)
    denoisers = turns.names(index, family)
    for name in denoisers:
        if name not in configs:
            raise ModelError(f"{folder / name / 'config.json'} is missing")
    require_alike([configs[name] for name in denoisers])
    return configs


def _bare(path: Path) -> ModelConfigs:
    """A denoiser without a pipeline."""
    file = path if path.is_file() else path / "config.json"
    if not file.is_file():
        raise ModelError(f"{path} is neither a diffusers pipeline ({INDEX}) nor a denoiser (config.json)")
    config = _json(file)
    family = family_of(str(config.get("_class_name", "a model without _class_name")), config)
    return ModelConfigs(_empty(file, config), family, {family.denoiser: config})


def _empty(file: Path, config: Mapping[str, Any]) -> nn.Module:
    """The denoiser of this file's configuration on the meta device; cuts of a pruned one, beside it, are replayed."""
    name = str(config["_class_name"])
    try:
        with torch.device("meta"):
            denoiser: nn.Module = getattr(diffusers, name).from_config(dict(config))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{file}: {_first_line(error)}") from None
    if (file.parent / MANIFEST).is_file():
        checkpoint.replay(denoiser, read_manifest(file.parent), file.parent)
    return denoiser.eval()


def _download(model: str, *, revision: str | None, variant: str | None, local_files_only: bool) -> Path:
    try:
        folder = DiffusionPipeline.download(
            model, revision=revision, variant=variant, use_safetensors=True, local_files_only=local_files_only
        )
        _fetch_extras(model, _index(Path(folder)), revision, local_files_only)
    except (OSError, ValueError) as error:
        raise _unreachable(model, error) from error
    return Path(folder)


def _download_configs(model: str, *, revision: str | None, local_files_only: bool) -> Path:
    try:
        folder = _fetch(model, INDEX, revision, local_files_only).parent
        index = _index(folder)
        for name, entry in index.items():
            if isinstance(entry, list) and entry[0] is not None and "tokenizer" not in name:
                file = "scheduler_config.json" if name == "scheduler" else "config.json"
                with contextlib.suppress(EntryNotFoundError):  # feature extractors have none
                    _fetch(model, f"{name}/{file}", revision, local_files_only)
        _fetch_extras(model, index, revision, local_files_only)
    except (OSError, ValueError) as error:
        raise _unreachable(model, error) from error
    return folder


def _fetch_extras(model: str, index: Mapping[str, Any], revision: str | None, local_files_only: bool) -> None:
    """Our own files, which diffusers does not know of; most models have none."""
    denoisers = dict.fromkeys(name for family in FAMILIES.values() for name in turns.names(index, family))
    for name in (DEFAULTS, *(f"{denoiser}/{MANIFEST}" for denoiser in denoisers)):
        with contextlib.suppress(EntryNotFoundError):
            _fetch(model, name, revision, local_files_only)


def _fetch(model: str, name: str, revision: str | None, local_files_only: bool) -> Path:
    return Path(str(hf_hub_download(model, name, revision=revision, local_files_only=local_files_only)))


def _unreachable(model: str, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ResourceError(f"{model}: the disk is full; set HF_HOME to a larger one")
    if "necessary `safetensors` weights" in str(error):  # diffusers'
        return ModelError(f"{model} has no weights as safetensors on the Hub; {_CONVERT}")
    return ModelError(
        f"{model} is neither a folder here nor a model that can be fetched from the Hub: {_first_line(error)}; "
        "check the spelling and the network, log in with `hf auth login` if it is gated, "
        "and unset HF_HUB_OFFLINE if it was never fetched"
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is unreadable: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} is no JSON object")
    return data
