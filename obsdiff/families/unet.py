"""Stable Diffusion 1.x, 2.x and SDXL, and latent consistency models of them: `UNet2DConditionModel`.

Pruned are the transformer blocks between its convolutions, numbered in forward order: down, middle, up. Every block
reads

    norm1              attn1.to_q, to_k, to_v    (self-attention)
    heads              attn1.to_out.0
    norm2              attn2.to_q                (cross-attention)
    the text           attn2.to_k, to_v          the very same tensor in all blocks of a network
    heads              attn2.to_out.0
    norm3              ff.net.0.proj             GEGLU: values and gates, one after the other
    neurons            ff.net.2

What was distilled to few steps with guidance is told the scale beside the timestep (`timestep_cond`). Where the UNet
runs a ControlNet (controls.py), its blocks, down and middle, come before those of the UNet, under "controlnet.".
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff.families import controls, layers, parts, reading
from obsdiff.groups import Group, LinearSpec, Write
from obsdiff_export.component import Component
from obsdiff_runtime.controls import PICTURE, SCALE
from obsdiff_runtime.errors import ConfigError, ModelError
from obsdiff_runtime.kinds.scales import GUIDANCE_WAVES

name: str = "unet"
denoiser: str = "unet"
classes: tuple[str, ...] = ("UNet2DConditionModel",)
pipeline: str = "StableDiffusionPipeline"
protect: tuple[int, int] = (0, 0)
vae_scale: int = parts.VAE_SCALE
negatives: bool = True
negative_first: bool = True
described: bool = True
text_mask: str | None = None

_TEXT = "encoder_hidden_states"
_TIME_IDS = 6


def linears(denoiser: nn.Module) -> tuple[LinearSpec, ...]:
    """See `Family.linears`. Tiers: attn1 in, attn1 out, attn2 in, attn2 out, into the neurons, out of them."""
    blocks = (
        (block, prefix, _inputs(module, f"image/{factor}", _text(prefix)))
        for block, (factor, prefix, module) in enumerate(_blocks(denoiser))
    )
    return layers.of_blocks(denoiser, blocks, _writes, common=(_text(""), _text(controls.PREFIX)))


def groups(denoiser: nn.Module) -> tuple[Group, ...]:
    """See `Family.groups`."""
    found: list[Group] = []
    for block, (_, prefix, module) in enumerate(_blocks(denoiser)):
        attentions = layers.present(module, "attn1", "attn2")
        found += [layers.heads(denoiser, f"{prefix}.{attention}", block=block) for attention in attentions]
        found.append(layers.neurons(denoiser, f"{prefix}.ff", block=block))
    return tuple(found)


def tokens(
    config: Mapping[str, Any], *, height: int, width: int, text_tokens: int, vae_scale: int = 8
) -> dict[str, int]:
    """See `Family.tokens`: "image/1" at the size of the latents, "image/2" at half of it, and so on, and "text"."""
    sizes = {}
    for level in range(len(config["block_out_channels"])):
        factor = 2**level
        rows, columns = -(-(height // vae_scale) // factor), -(-(width // vae_scale) // factor)
        sizes[f"image/{factor}"] = rows * columns
    return {**sizes, "text": text_tokens}


def text_tokens(configs: Mapping[str, Mapping[str, Any]], max_sequence_length: int | None) -> int:
    """See `Family.text_tokens`: CLIP's."""
    return reading.clip_tokens(configs)


def latent_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """See `Family.latent_size`."""
    return parts.sample_size(config)


def encode(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    negative: Sequence[str],
    *,
    max_sequence_length: int | None = None,
) -> dict[str, Tensor]:
    """See `Family.encode`: the embeddings (n, 77, width) and, for SDXL, the pooled ones (n, width).

    Empty negative prompts are the pipeline's own unconditional embedding, which for SDXL is zero.

    Raises:
        ConfigError: max_sequence_length is given; CLIP always reads its full length.
    """
    if max_sequence_length is not None:
        raise ConfigError("--max-sequence-length sets the tokens of T5, and this model has none; leave it out")
    reading.need(pipeline, "text_encoder_2" if _is_xl(pipeline.unet) else "text_encoder")
    written = list(negative) if any(negative) else None
    with torch.no_grad():
        encoded = pipeline.encode_prompt(
            list(prompts),
            device=pipeline._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=bool(negative),
            negative_prompt=written,
        )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return {key: value for key, value in zip(names, encoded, strict=False) if value is not None}


def example(
    denoiser: nn.Module, *, batch: int, size: tuple[int, ...], text_tokens: int, pixels: tuple[int, int]
) -> dict[str, Tensor]:
    """See `Family.example`."""
    config: Any = denoiser.config
    dtype: Any = denoiser.dtype
    across = config.encoder_hid_dim or config.cross_attention_dim
    text = across if isinstance(across, int) else across[0]
    inputs = {
        "sample": parts.noise(batch, config.in_channels, *size, dtype=dtype),
        "timestep": parts.timesteps(batch, dtype=dtype),
        "encoder_hidden_states": parts.noise(batch, text_tokens, text, dtype=dtype),
    }
    if _is_xl(denoiser):
        pooled = config.projection_class_embeddings_input_dim - _TIME_IDS * config.addition_time_embed_dim
        inputs["text_embeds"] = parts.noise(batch, pooled, dtype=dtype)
        inputs["time_ids"] = torch.tensor([*pixels, 0, 0, *pixels], dtype=dtype).repeat(batch, 1)
    if config.time_cond_proj_dim is not None:
        inputs[GUIDANCE_WAVES] = parts.noise(batch, config.time_cond_proj_dim, dtype=dtype)
    controlnet = controls.of(denoiser)
    return inputs if controlnet is None else controls.told(inputs, controls.pixels(controlnet), seeded=True)


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """See `Family.arguments`: what only SDXL has goes into `added_cond_kwargs`."""
    added = {key: value for key, value in inputs.items() if key in ("text_embeds", "time_ids")}
    plain = {key: value for key, value in inputs.items() if key not in (*added, PICTURE, SCALE)}
    steering = controls.asked(inputs, added_cond_kwargs=added or None) if PICTURE in inputs else {}
    return {**plain, **steering, "added_cond_kwargs": added or None}


class _Flat(parts.Flat):
    """The UNet, without options; (b, channels, h, w) to the same."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        fill_states: Tensor | None = None,
    ) -> Tensor:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        inputs = (parts.beside(sample, fill_states), timestep, encoder_hidden_states)
        noise: Tensor = self.source(*inputs, timestep_cond=timestep_cond, added_cond_kwargs=added, return_dict=False)[0]
        return noise


def component(denoiser: nn.Module, *, height: int, width: int, vae_scale: int = 8) -> Component:
    """See `Family.component`; SDXL's denoiser also reads `text_embeds` and `time_ids`, an LCM's `timestep_cond`.

    Raises:
        ModelError: the UNet takes inputs that are not exported, such as class labels.
    """
    config: Any = denoiser.config
    _check_inputs(config)
    return parts.denoiser_component(
        _Flat(denoiser),
        example,
        name="unet",
        output="out_sample",
        latents="sample",
        sizes=parts.latent_sizes(
            height, width, vae_scale=vae_scale, multiple=2 ** (len(config.block_out_channels) - 1)
        ),
        pixels=(height, width),
    )


def _is_xl(model: nn.Module) -> bool:
    return bool(model.config.addition_embed_type == "text_time")  # type: ignore[union-attr]


def _check_inputs(config: Mapping[str, Any]) -> None:
    known = {
        "addition_embed_type": (None, "text_time"),
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None, "text_proj"),
        "num_class_embeds": (None,),
    }
    for key, values in known.items():
        if config.get(key) not in values:
            raise ModelError(
                f"this UNet has {key}={config[key]!r}, whose input is not exported; prune it without export"
            )


def _blocks(denoiser: nn.Module) -> Iterator[tuple[int, str, nn.Module]]:
    """Per transformer block in forward order: how far its image is downsampled, its name, and itself.

    Raises:
        ModelError: the UNet has no transformer blocks.
    """
    empty = True
    for factor, stage_name, stage in _stages(denoiser):
        for index, transformer in enumerate(getattr(stage, "attentions", ())):
            if not layers.present(transformer, "transformer_blocks"):
                continue
            for child, module in transformer.transformer_blocks.named_children():
                empty = False
                yield factor, f"{stage_name}.attentions.{index}.transformer_blocks.{child}", module
    if empty:
        raise ModelError("this UNet has no transformer blocks between its convolutions, so nothing in it can be pruned")


def _stages(denoiser: nn.Module) -> Iterator[tuple[int, str, nn.Module]]:
    controlnet = controls.of(denoiser)
    if controlnet is not None:
        yield from ((factor, f"{controls.PREFIX}{name}", stage) for factor, name, stage in _stages(controlnet))
    factor = 1
    for child, stage in denoiser.get_submodule("down_blocks").named_children():
        yield factor, f"down_blocks.{child}", stage
        factor *= 2 if layers.present(stage, "downsamplers") else 1
    if layers.present(denoiser, "mid_block"):
        yield factor, "mid_block", denoiser.get_submodule("mid_block")
    if not layers.present(denoiser, "up_blocks"):  # a ControlNet's
        return
    for child, stage in denoiser.get_submodule("up_blocks").named_children():
        yield factor, f"up_blocks.{child}", stage
        factor //= 2 if layers.present(stage, "upsamplers") else 1


def _writes(prefix: str, linear: str) -> Write | None:
    match linear:
        case "attn1.to_out.0":
            return Write(stream=f"{prefix}.norm1")
        case "attn2.to_out.0":
            return Write(stream=f"{prefix}.norm2")
        case "ff.net.2":
            return Write(stream=f"{prefix}.norm3")
    return None


def _text(prefix: str) -> str:
    """Key of the text that the blocks of one network read."""
    return f"{controls.PREFIX}{_TEXT}" if prefix.startswith(controls.PREFIX) else _TEXT


def _inputs(block: nn.Module, image: str, text: str) -> layers.Inputs:
    if block.only_cross_attention:
        yield 0, "norm1", image, ("attn1.to_q",)
        yield 0, text, "text", ("attn1.to_k", "attn1.to_v")
    else:
        yield 0, "norm1", image, ("attn1.to_q", "attn1.to_k", "attn1.to_v")
    yield 1, "attn1.to_out.0", image, ("attn1.to_out.0",)
    if layers.present(block, "attn2"):
        yield 2, "norm2", image, ("attn2.to_q",)
        yield 2, text, "text", ("attn2.to_k", "attn2.to_v")
        yield 3, "attn2.to_out.0", image, ("attn2.to_out.0",)
    yield 4, "norm3", image, ("ff.net.0.proj",)
    yield 5, "ff.net.2", image, ("ff.net.2",)
