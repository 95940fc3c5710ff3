"""UNets that a ControlNet steers: both are one graph, which is told a control picture and how much that counts.

The picture's pixels are channels of the latent pixel that they lie in, so that the graph has no sizes beside those of
the latents. Without a picture a scale of 0 makes nothing of it, but the ControlNet is computed all the same.

Where there are control pictures, both are one denoiser, too (`joined`): the UNet has the ControlNet as a child, and
runs it before itself. What prunes, compares and counts denoisers sees its blocks before those of the UNet, under
"controlnet."; on disk each has its folder.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import isqrt
from types import MethodType
from typing import Any, Final

import diffusers
import torch
from diffusers import ControlNetModel, DiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle

from obsdiff.families import parts
from obsdiff_export.component import Component
from obsdiff_runtime.controls import NETWORK as NETWORK
from obsdiff_runtime.controls import PICTURE, SCALE, channels
from obsdiff_runtime.errors import ModelError
from obsdiff_runtime.kinds.table import KINDS

PREFIX: Final = f"{NETWORK}."
"""Of what lies in the ControlNet, where it is a child of the UNet."""

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
    return parts.again(pipeline, getattr(diffusers, name), NETWORK, **options)


def joins(index: Mapping[str, Any], config: Mapping[str, Any] | None) -> bool:
    """Whether a pipeline's ControlNet can be a child of its UNet: it is a single one, told both rows of guidance.

    Args:
        index: the pipeline's configuration, as in model_index.json.
        config: of its ControlNet.
    """
    single = (index.get(NETWORK) or (None, None))[1] == ControlNetModel.__name__
    return single and steers(str(index["_class_name"])) and not (config or {}).get("global_pool_conditions")


def joined(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline of the same networks whose denoiser runs the ControlNet; itself where there is none that `joins`.

    What it calls as its ControlNet only hands on what it was told.
    """
    untyped: Any = pipeline
    controlnet: Any = getattr(pipeline, NETWORK, None)
    index = {**pipeline.config, "_class_name": type(pipeline).__name__}
    if controlnet is None or not joins(index, controlnet.config):
        return pipeline
    found: Any = copy.copy(untyped)
    found.unet = join(untyped.unet, controlnet)
    found.controlnet = parts.view(controlnet)
    found.controlnet.forward = _ask
    return found


def apart(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline that `joined` made another of."""
    untyped: Any = pipeline
    if not hasattr(untyped, "unet") or of(untyped.unet) is None:
        return pipeline
    found: Any = copy.copy(untyped)
    for name, network in networks({"unet": untyped.unet}).items():
        setattr(found, name, network)
    return found


def join(unet: nn.Module, controlnet: nn.Module) -> nn.Module:
    """The UNet with the ControlNet as a child, which it runs before itself; both have the weights they had."""
    found: nn.Module = parts.view(unet, **{NETWORK: controlnet})
    found.forward = MethodType(_run, found)
    return found


def of(denoiser: nn.Module) -> nn.Module | None:
    """The ControlNet that a denoiser runs."""
    return denoiser._modules.get(NETWORK)


def networks(denoisers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """What denoisers consist of, by folder of the pipeline, as they are told: a UNet that runs its ControlNet of both.

    These are apart then: the UNet runs itself alone.
    """
    found: dict[str, nn.Module] = {}
    for name, denoiser in denoisers.items():
        controlnet = of(denoiser)
        found[name] = denoiser
        if controlnet is not None:
            found[name] = parts.view(denoiser)
            del found[name]._modules[NETWORK], found[name].__dict__["forward"]
            found[NETWORK] = controlnet
    return found


def covers(names: Iterable[str]) -> bool:
    """Whether some of these linears or groups lie in a ControlNet."""
    return any(name.startswith(PREFIX) for name in names)


def _ask(sample: Tensor, timestep: Tensor, **told: Any) -> tuple[dict[str, Any], None]:
    """The forward of what a `joined` pipeline calls as its ControlNet: what it was told, in place of residuals."""
    return {"sample": sample, "timestep": timestep, **told}, None


def _run(self: Any, *args: Any, down_block_additional_residuals: Any = None, **kwargs: Any) -> Any:
    """The forward of a UNet that runs its ControlNet, on what that was told, if anything."""
    down = down_block_additional_residuals
    if isinstance(down, dict):
        down, kwargs["mid_block_additional_residual"] = self.controlnet(**down)
    return type(self).forward(self, *args, down_block_additional_residuals=down, **kwargs)


def asked(inputs: Mapping[str, Tensor], **added: Any) -> dict[str, Any]:
    """Inputs by ONNX name, with a control picture, as those arguments of a UNet's call that make it run a ControlNet.

    Args:
        inputs: those that `told` gives.
        added: what the UNet is told, too, by its own names.
    """
    picture = inputs[PICTURE]
    told = {
        **{name: inputs[name] for name in ("sample", "timestep", "encoder_hidden_states")},
        "controlnet_cond": pixel_shuffle(picture, isqrt(picture.shape[1] // channels(1))),
        "conditioning_scale": inputs[SCALE][:, None, None, None],
    }
    return {"down_block_additional_residuals": {**told, **added, "return_dict": False}}


def pixels(controlnet: nn.Module) -> int:
    """Pixels a side of a latent pixel that it is told."""
    config: Any = controlnet.config
    halved: int = len(config.conditioning_embedding_out_channels) - 1
    return int(2**halved)


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
    controlnet = of(denoiser) or getattr(pipeline, NETWORK, None)
    if controlnet is None:
        return found
    if not isinstance(controlnet, ControlNetModel):
        raise ModelError(f"{NETWORK} is a {type(controlnet).__name__}; a single ControlNetModel is exported")
    config: Any = controlnet.config
    if config.global_pool_conditions:
        raise ModelError(f"this {NETWORK} has global_pool_conditions, which are not exported")
    own = pixels(controlnet)
    if own != scale:
        raise ModelError(f"this {NETWORK} is for {own} pixels a side of a latent pixel, and the VAE has {scale}")
    return replace(
        found,
        module=_Steered(networks({found.name: denoiser})[found.name], controlnet, scale),
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
