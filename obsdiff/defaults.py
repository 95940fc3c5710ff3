"""How a pipeline is run where nothing else is asked for."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

from obsdiff import turns
from obsdiff.checkpoint import DEFAULTS
from obsdiff.configs import DEFAULTS_KEY
from obsdiff.families import Family, dit, parts, references, sana
from obsdiff.families.table import FAMILIES, family_of
from obsdiff_runtime import autoencoder
from obsdiff_runtime.errors import ModelError
from obsdiff_runtime.kinds import IS_DISTILLED
from obsdiff_runtime.kinds.table import KINDS
from obsdiff_runtime.labels import Labels, read_labels


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """How a pipeline is run where nothing else is asked for.

    Attributes:
        height: in pixels.
        width: in pixels.
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance.
        num_frames: of a film; None where the pipeline draws pictures.
        frame_scale: how many of them a latent frame stands for, the first one apart; None where nobody knows.
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
    frame_scale: int | None = autoencoder.FRAME_SCALE
    max_sequence_length: int | None = None
    prompts: str | None = None
    takes_guidance: bool = True
    takes_references: bool = False
    takes_turns: bool = False
    labels: Labels | None = None


def defaults_of(folder: Path | None, configs: Mapping[str, Mapping[str, Any]]) -> Defaults:
    """A pipeline's defaults: its own file's, else those of diffusers' call for its class.

    Args:
        folder: of the pipeline, for messages.
        configs: as `load_configs` gives them.

    Raises:
        ModelError: the pipeline's own file names something else.
    """
    values = _class_defaults(configs)
    given = configs.get(DEFAULTS_KEY, {})
    unknown = given.keys() - values.keys()
    if unknown:
        where = folder / DEFAULTS if folder is not None else DEFAULTS
        raise ModelError(f"{where}: unknown key {min(unknown)}; there are {', '.join(values)}")
    values |= given
    family = _family_in(configs)
    labels = read_labels(configs.get("model_index", {}), configs[family.denoiser]) if family is dit else None
    return Defaults(**values, labels=labels, frame_scale=frame_scale(configs))


def vae_scale(configs: Mapping[str, Mapping[str, Any]]) -> int:
    """Pixels per side of a latent pixel; the denoiser's family's where there is no VAE."""
    return autoencoder.vae_scale(configs["vae"]) if "vae" in configs else _family_in(configs).vae_scale


def frame_scale(configs: Mapping[str, Mapping[str, Any]]) -> int | None:
    """Frames of a film in a latent frame behind the first; the family's pipeline's where there is no VAE.

    None where no family describes the pipeline.
    """
    kind = KINDS.get(_family_in(configs).pipeline)
    if kind is None:
        return None
    return autoencoder.frame_scale(configs["vae"]) if "vae" in configs else kind.frame_scale


def _family_in(configs: Mapping[str, Mapping[str, Any]]) -> Family:
    denoiser = next(configs[family.denoiser] for family in FAMILIES.values() if family.denoiser in configs)
    return family_of(str(denoiser["_class_name"]), denoiser)


def _class_defaults(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    family = _family_in(configs)
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
        "num_frames": default("num_frames", denoiser.get("sample_frames") if parts.draws_films(pipeline) else None),
        "max_sequence_length": default("max_sequence_length", None),
        "prompts": None,
        "takes_guidance": not distilled,
        "takes_references": references.takes(index),
        "takes_turns": len(turns.names(index, family)) > 1,
    }
