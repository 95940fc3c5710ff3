"""Stable Diffusion 1.x, 2.x and SDXL: `UNet2DConditionModel`.

Pruned are the transformer blocks between its convolutions, numbered in forward order: down, middle, up. Every block
reads

    norm1              attn1.to_q, to_k, to_v    (self-attention)
    heads              attn1.to_out.0
    norm2              attn2.to_q                (cross-attention)
    the text           attn2.to_k, to_v          the very same tensor in all blocks of the model
    heads              attn2.to_out.0
    norm3              ff.net.0.proj             GEGLU: values and gates, one after the other
    neurons            ff.net.2
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from obsdiff.families import layers
from obsdiff.groups import Group, LinearSpec
from obsdiff_runtime.errors import ModelError

name: str = "unet"
denoiser: str = "unet"
classes: tuple[str, ...] = ("UNet2DConditionModel",)

_TEXT = "encoder_hidden_states"


def linears(denoiser: nn.Module) -> tuple[LinearSpec, ...]:
    """See `Family.linears`. Tiers: attn1 in, attn1 out, attn2 in, attn2 out, into the neurons, out of them."""
    return tuple(
        layers.linear(
            denoiser,
            f"{prefix}.{linear}",
            block=block,
            tier=tier,
            reads=_TEXT if reads == _TEXT else f"{prefix}.{reads}",
            tokens="text" if reads == _TEXT else f"image/{factor}",
        )
        for block, (factor, prefix, module) in enumerate(_blocks(denoiser))
        for tier, reads, linears in _inputs(module)
        for linear in linears
    )


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
    factor = 1
    for child, stage in denoiser.get_submodule("down_blocks").named_children():
        yield factor, f"down_blocks.{child}", stage
        factor *= 2 if layers.present(stage, "downsamplers") else 1
    if layers.present(denoiser, "mid_block"):
        yield factor, "mid_block", denoiser.get_submodule("mid_block")
    for child, stage in denoiser.get_submodule("up_blocks").named_children():
        yield factor, f"up_blocks.{child}", stage
        factor //= 2 if layers.present(stage, "upsamplers") else 1


def _inputs(block: nn.Module) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Per distinct input tensor of a block: tier, key, and the linears that read it."""
    if block.only_cross_attention:
        yield 0, "norm1", ("attn1.to_q",)
        yield 0, _TEXT, ("attn1.to_k", "attn1.to_v")
    else:
        yield 0, "norm1", ("attn1.to_q", "attn1.to_k", "attn1.to_v")
    yield 1, "attn1.to_out.0", ("attn1.to_out.0",)
    if layers.present(block, "attn2"):
        yield 2, "norm2", ("attn2.to_q",)
        yield 2, _TEXT, ("attn2.to_k", "attn2.to_v")
        yield 3, "attn2.to_out.0", ("attn2.to_out.0",)
    yield 4, "norm3", ("ff.net.0.proj",)
    yield 5, "ff.net.2", ("ff.net.2",)
