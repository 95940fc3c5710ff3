"""Denoisers that are told pictures beside the text: which are, and what their graphs take for it.

Tokens of the pictures stand behind those of the latents, with places of their own; what the denoiser makes of them,
nobody reads.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff.families import Family, controls, fills, parts
from obsdiff_export.component import Component
from obsdiff_runtime.kinds.table import KINDS
from obsdiff_runtime.openings import MASK
from obsdiff_runtime.references import PLACES, STATES, TOKENS, References

_EXAMPLES: Final = (17, 0, 21)
"""Tokens of the examples that a graph is captured on and compared with."""


def of(pipeline_class: str) -> References | None:
    """How a pipeline's denoiser is told pictures; None where it is told none."""
    kind = KINDS.get(pipeline_class)
    return None if kind is None else kind.references


def opens(pipeline_class: str) -> bool:
    """Whether films of a pipeline begin with a picture."""
    kind = KINDS.get(pipeline_class)
    return kind is not None and kind.opens


def ends(pipeline: DiffusionPipeline) -> bool:
    """Whether films of a pipeline begin and end with a picture."""
    kind, denoiser = KINDS.get(type(pipeline).__name__), getattr(pipeline, "transformer", None)
    return kind is not None and denoiser is not None and kind.ends(denoiser.config)


def masks_frames(pipeline_class: str, index: Mapping[str, Any]) -> bool:
    """Whether latents of a picture can stand in place of a film's first ones, which have a timestep of their own.

    `index` is the pipeline's configuration, as in model_index.json.
    """
    kind = KINDS.get(pipeline_class)
    return bool(index.get("expand_timesteps")) or (kind is not None and kind.masks)


def takes(index: Mapping[str, Any]) -> bool:
    """Whether a pipeline can be told pictures beside the prompt, whatever it does with them; `index` as above."""
    name = str(index.get("_class_name"))
    told = of(name) is not None or opens(name) or masks_frames(name, index)
    return told or controls.steers(name) or fills.keeps(name)


def masked(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A denoiser's inputs by ONNX name, and that the first frame of every other film is given."""
    latents = inputs["hidden_states"]
    mask = torch.ones(len(latents), latents.shape[2], dtype=latents.dtype)
    mask[::2, 0] = 0
    return {**inputs, MASK: mask}


def sees(config: Mapping[str, Any]) -> bool:
    """Whether a denoiser of that configuration is told what an image encoder sees in the picture."""
    return bool(config.get("image_dim"))


def component(
    family: Family,
    denoiser: nn.Module,
    pipeline_class: str,
    *,
    height: int,
    width: int,
    vae_scale: int,
    frame_mask: bool = False,
) -> Component:
    """`Family.component` as a pipeline of that class calls the denoiser: also on pictures, where it does.

    With a `frame_mask` the graph is told which frames are given.
    """
    found = family.component(denoiser, height=height, width=width, vae_scale=vae_scale)
    found = replace(found, name=family.denoiser)
    if frame_mask:
        return replace(
            found,
            inputs=masked(found.inputs),
            dynamic_axes={**found.dynamic_axes, MASK: {0: "batch", 1: "frames"}},
            more_inputs=tuple(map(masked, found.more_inputs)),
        )
    if of(pipeline_class) is None:
        return found
    examples = [
        {**inputs, **example(denoiser, pipeline_class, batch=len(inputs["timestep"]), tokens=tokens)}
        for inputs, tokens in zip((found.inputs, *found.more_inputs), _EXAMPLES, strict=True)
    ]
    axes = {STATES: {0: "batch", 1: TOKENS}, PLACES: {0: TOKENS}}
    return replace(
        found,
        inputs=examples[0],
        dynamic_axes={**found.dynamic_axes, **axes},
        more_inputs=tuple(examples[1:]),
    )


def example(denoiser: nn.Module, pipeline_class: str, *, batch: int, tokens: int) -> dict[str, Tensor]:
    """What `Family.example` lacks where a pipeline is told pictures: so many tokens of one; nothing where it is not."""
    references = of(pipeline_class)
    if references is None:
        return {}
    config: Any = denoiser.config
    dtype: Any = denoiser.dtype
    return {
        STATES: parts.noise(batch, tokens, config.in_channels, dtype=dtype),
        PLACES: torch.from_numpy(references.places([(1, tokens)])),
    }


def alone(
    inputs: Mapping[str, Tensor], denoiser: nn.Module, index: Mapping[str, Any], vae_scale: int
) -> dict[str, Tensor]:
    """`Family.example` as the graph of a pipeline's denoiser takes it, told no pictures beside; `index` as above."""
    name, config = str(index["_class_name"]), cast("Mapping[str, Any]", denoiser.config)
    if masks_frames(name, index):
        return masked(inputs)
    if controls.steers(name):
        return controls.told(inputs, vae_scale)
    filling = fills.of(name, config)
    if filling is not None:
        return fills.split(inputs, filling, config)
    return {**inputs, **example(denoiser, name, batch=len(inputs["timestep"]), tokens=0)}


def joined(inputs: Mapping[str, Tensor], tokens: Tensor, places: Tensor) -> dict[str, Any]:
    """The inputs as keyword arguments of the denoiser, those of pictures behind those of the latents.

    Args:
        inputs: by ONNX name, with or without those of pictures.
        tokens: of the latents, (b, tokens, channels).
        places: of these, (tokens, axes).
    """
    told = {name: value for name, value in inputs.items() if name not in (STATES, PLACES)}
    if STATES in inputs:
        tokens = torch.cat([tokens, inputs[STATES]], dim=1)
        places = torch.cat([places, inputs[PLACES]])
    return {**told, "hidden_states": tokens, "img_ids": places}


def given(**inputs: Tensor | None) -> dict[str, Tensor]:
    """Those of a graph's inputs that are there."""
    return {name: value for name, value in inputs.items() if value is not None}
