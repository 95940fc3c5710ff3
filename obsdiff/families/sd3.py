"""SD3 and SD3.5: `SD3Transformer2DModel`, a joint transformer of an image and a text stream (MMDiT).

A block reads eight distinct tensors, and the linears that read the same one share its gram:

    norm1(image)       attn.to_q, to_k, to_v
    norm1(text)        attn.add_q_proj, add_k_proj, add_v_proj
    heads, image part  attn.to_out.0
    heads, text part   attn.to_add_out           not in the last block, which drops its text
    norm2(image)       ff.net.0.proj
    norm2(text)        ff_context.net.0.proj     not in the last block
    neurons, image     ff.net.2
    neurons, text      ff_context.net.2          not in the last block

SD3.5-medium has a second attention over the image alone in its first blocks; it reads a tensor of its own (the same
norm under another modulation) beside the first, and its heads are units of their own.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff.families import layers, parts, reading
from obsdiff.groups import Group, LinearSpec, Write
from obsdiff_export.component import Component

name: str = "sd3"
denoiser: str = "transformer"
classes: tuple[str, ...] = ("SD3Transformer2DModel",)
pipeline: str = "StableDiffusion3Pipeline"
protect: tuple[int, int] = (1, 1)
vae_scale: int = parts.VAE_SCALE
negatives: bool = True
negative_first: bool = True
described: bool = True
text_mask: str | None = None


def linears(denoiser: nn.Module) -> tuple[LinearSpec, ...]:
    """See `Family.linears`. Tiers: into the heads, out of them, into the neurons, out of them."""
    blocks = ((block, prefix, _inputs(module)) for block, prefix, module in _blocks(denoiser))
    return layers.of_blocks(denoiser, blocks, _writes)


def groups(denoiser: nn.Module) -> tuple[Group, ...]:
    """See `Family.groups`."""
    found: list[Group] = []
    for block, prefix, module in _blocks(denoiser):
        attentions = layers.present(module, "attn", "attn2")
        found += [layers.heads(denoiser, f"{prefix}.{attention}", block=block) for attention in attentions]
        feeds = layers.present(module, "ff", "ff_context")
        found += [layers.neurons(denoiser, f"{prefix}.{feed}", block=block) for feed in feeds]
    return tuple(found)


def tokens(
    config: Mapping[str, Any], *, height: int, width: int, text_tokens: int, vae_scale: int = 8
) -> dict[str, int]:
    """See `Family.tokens`: "image", one token per patch, and "text"."""
    patch = int(config["patch_size"])
    return {"image": (height // vae_scale // patch) * (width // vae_scale // patch), "text": text_tokens}


def text_tokens(configs: Mapping[str, Mapping[str, Any]], max_sequence_length: int | None) -> int:
    """See `Family.text_tokens`: CLIP's, and T5's or the zeros in its place; of a denoiser on its own CLIP's alone."""
    t5 = (max_sequence_length or 0) if "text_encoder" in configs else 0
    return reading.clip_tokens(configs) + t5


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
    """See `Family.encode`: the embeddings (n, text tokens, width) and the pooled ones (n, width)."""
    reading.need(pipeline, "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    limit = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    with torch.no_grad():
        embeds, negative_embeds, pooled, negative_pooled = pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            do_classifier_free_guidance=bool(negative),
            negative_prompt=list(negative) or None,
            **limit,
        )
    encoded = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    if negative:
        encoded |= {"negative_prompt_embeds": negative_embeds, "negative_pooled_prompt_embeds": negative_pooled}
    return encoded


def example(
    denoiser: nn.Module, *, batch: int, size: tuple[int, ...], text_tokens: int, pixels: tuple[int, int]
) -> dict[str, Tensor]:
    """See `Family.example`."""
    config: Any = denoiser.config
    dtype: Any = denoiser.dtype
    return {
        "hidden_states": parts.noise(batch, config.in_channels, *size, dtype=dtype),
        "encoder_hidden_states": parts.noise(batch, text_tokens, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": parts.noise(batch, config.pooled_projection_dim, dtype=dtype),
        "timestep": parts.timesteps(batch, dtype=dtype),
    }


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """See `Family.arguments`."""
    return dict(inputs)


class _Flat(parts.Flat):
    """The transformer, without options; (b, channels, h, w) to the same."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor
    ) -> Tensor:
        inputs = (hidden_states, encoder_hidden_states, pooled_projections, timestep)
        velocity: Tensor = self.source(*inputs, return_dict=False)[0]
        return velocity


def component(denoiser: nn.Module, *, height: int, width: int, vae_scale: int = 8) -> Component:
    """See `Family.component`."""
    config: Any = denoiser.config
    sizes = parts.latent_sizes(
        height, width, vae_scale=vae_scale, multiple=config.patch_size, limit=config.pos_embed_max_size
    )
    return parts.denoiser_component(
        _Flat(denoiser),
        example,
        name="transformer",
        output="out_hidden_states",
        latents="hidden_states",
        sizes=sizes,
        pixels=(height, width),
    )


def _blocks(denoiser: nn.Module) -> Iterator[tuple[int, str, nn.Module]]:
    blocks = denoiser.get_submodule("transformer_blocks")
    for child, module in blocks.named_children():
        yield int(child), f"transformer_blocks.{child}", module


def _writes(prefix: str, linear: str) -> Write | None:
    """The gates are the second and the fifth thing that the norm in front of the attention gives."""
    norm1, context = f"{prefix}.norm1", f"{prefix}.norm1_context"
    match linear:
        case "attn.to_out.0":
            return Write(stream=norm1, gate=(norm1, 1))
        case "attn.to_add_out":
            return Write(stream=context, gate=(context, 1))
        case "ff.net.2":
            return Write(stream=f"{prefix}.norm2", gate=(norm1, 4))
        case "ff_context.net.2":
            return Write(stream=f"{prefix}.norm2_context", gate=(context, 4))
    return None


def _inputs(block: nn.Module) -> layers.Inputs:
    attention = block.get_submodule("attn")
    dual = bool(layers.present(block, "attn2"))
    text = bool(layers.present(block, "ff_context"))
    yield 0, "norm1", "image", ("attn.to_q", "attn.to_k", "attn.to_v")
    added = layers.present(attention, "add_q_proj", "add_k_proj", "add_v_proj")
    yield 0, "norm1_context", "text", tuple(f"attn.{projection}" for projection in added)
    if dual:
        yield 0, "norm1.second", "image", ("attn2.to_q", "attn2.to_k", "attn2.to_v")
    yield 1, "attn.to_out.0", "image", ("attn.to_out.0",)
    if layers.present(attention, "to_add_out"):
        yield 1, "attn.to_add_out", "text", ("attn.to_add_out",)
    if dual:
        yield 1, "attn2.to_out.0", "image", ("attn2.to_out.0",)
    yield 2, "norm2", "image", ("ff.net.0.proj",)
    if text:
        yield 2, "norm2_context", "text", ("ff_context.net.0.proj",)
    yield 3, "ff.net.2", "image", ("ff.net.2",)
    if text:
        yield 3, "ff_context.net.2", "text", ("ff_context.net.2",)
