"""What a diffusers folder says of itself: its index and its configurations; which pipelines are known."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import diffusers

from obsdiff import turns
from obsdiff.checkpoint import DEFAULTS, INDEX
from obsdiff.families import HELP, Family, sana
from obsdiff.families.table import FAMILIES, family_of
from obsdiff.manifest import read_json
from obsdiff_runtime.errors import ModelError
from obsdiff_runtime.kinds.table import KINDS

DEFAULTS_KEY: Final = Path(DEFAULTS).stem
_PIPELINES: Final[Mapping[str, tuple[str, ...]]] = {
    "chroma": ("ChromaPipeline",),
    "flux": ("FluxPipeline", "FluxKontextPipeline", "FluxFillPipeline"),
    "flux2": ("Flux2KleinPipeline", "Flux2Pipeline"),
    "qwen": ("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
    "sana": ("SanaPipeline", sana.SPRINT),
    "wan": ("WanPipeline", "WanImageToVideoPipeline"),
    "zimage": ("ZImagePipeline",),
}
"""Of families whose networks are told other things in other pipelines, those that obsdiff knows."""


def read_index(folder: Path) -> dict[str, Any]:
    """The content of a pipeline's model_index.json; ModelError where there is none."""
    if not (folder / INDEX).is_file():
        raise ModelError(f"{folder} is no diffusers pipeline: it holds no {INDEX}")
    return read_json(folder / INDEX, ModelError)


def read_family(folder: Path, index: Mapping[str, Any]) -> Family:
    """Of a pipeline's denoiser; `index` as `read_index` gives it.

    Raises:
        ModelError: there is no denoiser, no family describes it, or its pipeline is none that obsdiff knows.
    """
    if not hasattr(diffusers, str(index.get("_class_name"))):
        raise ModelError(f"{folder}: diffusers {diffusers.__version__} has no pipeline {index.get('_class_name')}")
    places = dict.fromkeys(["transformer", "unet", *(family.denoiser for family in FAMILIES.values())])
    entries = {place: index[place] for place in places if isinstance(index.get(place), list)}
    found = [(place, str(entry[1])) for place, entry in entries.items() if entry[1] is not None]
    if not found:
        raise ModelError(f"{folder}: this {index['_class_name']} has no denoiser ({' or '.join(places)})")
    file = folder / found[0][0] / "config.json"
    family = family_of(found[0][1], read_json(file, ModelError) if file.is_file() else None)
    if family.denoiser not in index:
        raise ModelError(f"{folder}: no family describes its {found[0][1]}; {HELP}")
    require_known_turns(index, family)
    require_known_pipeline(index, family)
    return family


def read_configs(folder: Path, index: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By component, as `ModelConfigs.configs`; ModelError where a denoiser has none, or denoisers are not alike."""
    configs = {"model_index": dict(index)}
    for name in index:
        for file in ("config.json", "scheduler_config.json"):
            if (folder / name / file).is_file():
                configs[name] = read_json(folder / name / file, ModelError)
    if "vae" in index and "vae" not in configs and (folder / "vae_decoder" / "config.json").is_file():  # of a bundle
        configs["vae"] = read_json(folder / "vae_decoder" / "config.json", ModelError)
    if (folder / DEFAULTS).is_file():
        configs[DEFAULTS_KEY] = read_json(folder / DEFAULTS, ModelError)
    family = read_family(folder, index)
    denoisers = turns.names(index, family)
    for name in denoisers:
        if name not in configs:
            raise ModelError(f"{folder / name / 'config.json'} is missing")
    require_alike([configs[name] for name in denoisers])
    return configs


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
