"""UNets that a ControlNet steers: both are one graph, which is told a control picture and how much that counts.

The picture's pixels are channels of the latent pixel that they lie in, so that the graph has no sizes beside those of
the latents. Without a picture a scale of 0 makes nothing of it, but the ControlNet is computed all the same.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import diffusers
import torch
from diffusers import ControlNetModel, DiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle

from obsdiff.families import parts
from obsdiff_export.component import Component
from obsdiff_runtime.controls import PICTURE, SCALE, channels
from obsdiff_runtime.errors import ModelError
from obsdiff_runtime.kinds.table import KINDS

_NETWORK: Final = "controlnet"
_OPTIONS: Final = {
    "StableDiffusionPipeline": ("requires_safety_checker",),
    "StableDiffusionXLPipeline": ("force_zeros_for_empty_prompt",),
}
"""Of pipelines without a ControlNet, what they are told beside their networks."""


def steers(pipeline_class: str) -> bool:
    """Whether a ControlNet steers the denoiser of a pipeline."""
    kind = KINDS.get(pipeline_class)
    return kind is not None and kind.controls


def plain(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline without its ControlNet."""
    name = type(pipeline).__name__.replace("ControlNet", "")
    options = {key: pipeline.config[key] for key in _OPTIONS[name] if key in pipeline.config}
    return parts.again(pipeline, getattr(diffusers, name), _NETWORK, **options)


def component(found: Component, denoiser: nn.Module, pipeline: DiffusionPipeline, scale: int) -> Component:
    """A denoiser's component, steered where the pipeline has a ControlNet.

    Args:
        found: `Family.component`.
        denoiser: a UNet.
        pipeline: that calls it.
        scale: pixels per side of a latent pixel.

    Raises:
        ModelError: there are several ControlNets, or one that is not exported.
    """
    controlnet = getattr(pipeline, _NETWORK, None)
    if controlnet is None:
        return found
    if not isinstance(controlnet, ControlNetModel):
        raise ModelError(f"{_NETWORK} is a {type(controlnet).__name__}; a single ControlNetModel is exported")
    config: Any = controlnet.config
    if config.global_pool_conditions:
        raise ModelError(f"this {_NETWORK} has global_pool_conditions, which are not exported")
    own = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
    if own != scale:
        raise ModelError(f"this {_NETWORK} is for {own} pixels a side of a latent pixel, and the VAE has {scale}")
    return replace(
        found,
        module=_Steered(denoiser, controlnet, scale),
        inputs=told(found.inputs, scale, seeded=True),
        dynamic_axes={**found.dynamic_axes, PICTURE: found.dynamic_axes["sample"], SCALE: {0: "batch"}},
        more_inputs=tuple(told(inputs, scale, seeded=True) for inputs in found.more_inputs),
    )


def told(inputs: Mapping[str, Tensor], scale: int, *, seeded: bool = False) -> dict[str, Tensor]:
    """A UNet's inputs by ONNX name, with a control picture: of nothing, or seeded and a scale of each row's own."""
    sample = inputs["sample"]
    shape = (len(sample), channels(scale), *sample.shape[2:])
    if not seeded:
        return {**inputs, PICTURE: sample.new_zeros(shape), SCALE: sample.new_zeros(len(sample))}
    weights = torch.linspace(1, 0.5, len(sample)).to(sample.dtype)
    return {**inputs, PICTURE: parts.noise(*shape, dtype=sample.dtype), SCALE: weights}


class _Steered(parts.Flat):
    """A UNet and its ControlNet, without options; (b, channels, h, w) to the same."""

    def __init__(self, source: nn.Module, controlnet: nn.Module, scale: int) -> None:
        super().__init__(parts.view(source, controlnet=controlnet))
        self._scale = scale

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        inputs = (sample, timestep, encoder_hidden_states)
        options = {"timestep_cond": timestep_cond, "added_cond_kwargs": added, "return_dict": False}
        picture = pixel_shuffle(controlnet_cond, self._scale)
        down, middle = self.source.controlnet(*inputs, controlnet_cond=picture, **options)
        weight = conditioning_scale[:, None, None, None]
        noise: Tensor = self.source(
            *inputs,
            down_block_additional_residuals=[each * weight for each in down],
            mid_block_additional_residual=middle * weight,
            **options,
        )[0]
        return noise
