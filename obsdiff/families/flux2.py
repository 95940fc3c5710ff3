"""FLUX.2, klein and dev: `Flux2Transformer2DModel`, joint blocks of an image and a text stream, then single ones.

A joint block ("double") reads eight distinct tensors, as FLUX.1's:

    norm1(image)       attn.to_q, to_k, to_v
    norm1(text)        attn.add_q_proj, add_k_proj, add_v_proj
    heads, image part  attn.to_out.0
    heads, text part   attn.to_add_out
    norm2(image)       ff.linear_in
    norm2(text)        ff_context.linear_in
    neurons, image     ff.linear_out
    neurons, text      ff_context.linear_out

A block behind them ("single") reads two, attention and feed-forward side by side. Its first linear gives queries, keys,
values and both halves of the gated neurons, in this order:

    norm(text, image)  attn.to_qkv_mlp_proj
    heads | neurons    attn.to_out

Gates come from outside of the blocks, the same for all of a kind. The denoiser's latents are those of the pipeline,
2 x 2 patches of the autoencoder's already; the tokens' places on four axes are part of the graph. dev is distilled with
guidance: it is told the scale. klein is not; where its steps are distilled, its pipeline takes no guidance.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff.families import layers, parts, reading, references
from obsdiff.groups import Consumer, Group, LinearSpec, Producer, Size, ToldGate, Write
from obsdiff_export.component import Component
from obsdiff_runtime.errors import ConfigError

name: str = "flux2"
denoiser: str = "transformer"
classes: tuple[str, ...] = ("Flux2Transformer2DModel",)
pipeline: str = "Flux2KleinPipeline"
protect: tuple[int, int] = (1, 1)
vae_scale: int = 2 * parts.VAE_SCALE
negatives: bool = True
negative_first: bool = True
described: bool = True
text_mask: str | None = None

_TIMESTEPS: Final = 1000
"""The denoiser is told timesteps as shares of so many."""

_TEXT_TOKENS: Final = 512
_SAMPLE_SIZE: Final = 64


def linears(denoiser: nn.Module) -> tuple[LinearSpec, ...]:
    """See `Family.linears`. Tiers: into the heads, out of them, into the neurons, out of them; of single blocks two."""
    blocks = ((block, prefix, inputs) for block, (prefix, inputs) in enumerate(_blocks(denoiser)))
    return layers.of_blocks(denoiser, blocks, _writes)


def groups(denoiser: nn.Module) -> tuple[Group, ...]:
    """See `Family.groups`."""
    found: list[Group] = []
    for block, (prefix, inputs) in enumerate(_blocks(denoiser)):
        if inputs is _SINGLE:
            found += _parallel(denoiser, f"{prefix}.attn", block)
        else:
            found.append(layers.heads(denoiser, f"{prefix}.attn", block=block))
            found += [_neurons(denoiser, f"{prefix}.{feed}", block) for feed in ("ff", "ff_context")]
    return tuple(found)


def tokens(
    config: Mapping[str, Any], *, height: int, width: int, text_tokens: int, vae_scale: int = 2 * parts.VAE_SCALE
) -> dict[str, int]:
    """See `Family.tokens`: "image", one token a latent pixel, "text", and "joint", one behind the other."""
    image = (height // vae_scale) * (width // vae_scale)
    return {"image": image, "text": text_tokens, "joint": text_tokens + image}


def text_tokens(configs: Mapping[str, Mapping[str, Any]], max_sequence_length: int | None) -> int:
    """See `Family.text_tokens`."""
    return _TEXT_TOKENS if max_sequence_length is None else max_sequence_length


def latent_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """See `Family.latent_size`: fixed by the pipeline."""
    return (_SAMPLE_SIZE, _SAMPLE_SIZE)


def encode(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    negative: Sequence[str],
    *,
    max_sequence_length: int | None = None,
) -> dict[str, Tensor]:
    """See `Family.encode`: hidden states of three layers side by side, (n, text tokens, 3 widths).

    Raises:
        ConfigError: negative prompts are given to dev.
    """
    if negative and pipeline.transformer.config.guidance_embeds:
        raise ConfigError("FLUX.2-dev takes no negative prompts: its guidance is distilled")
    reading.need(pipeline, "text_encoder", "tokenizer")
    limit = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    texts = {"prompt_embeds": prompts, "negative_prompt_embeds": negative}
    with torch.no_grad():
        return {key: pipeline.encode_prompt(list(text), **limit)[0] for key, text in texts.items() if text}


def example(
    denoiser: nn.Module, *, batch: int, size: tuple[int, ...], text_tokens: int, pixels: tuple[int, int]
) -> dict[str, Tensor]:
    """See `Family.example`."""
    config: Any = denoiser.config
    dtype: Any = denoiser.dtype
    inputs = {
        "hidden_states": parts.noise(batch, config.in_channels, *size, dtype=dtype),
        "encoder_hidden_states": parts.noise(batch, text_tokens, config.joint_attention_dim, dtype=dtype),
        "timestep": parts.timesteps(batch, dtype=dtype),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.linspace(3.5, 1.5, batch).to(dtype)
    return inputs


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """See `Family.arguments`: latents as tokens, their places, and the timestep in the denoiser's unit."""
    latents, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
    tokens = latents.flatten(2).transpose(1, 2)  # (b, tokens, channels)
    return {
        **references.joined(inputs, tokens, _places(1, *latents.shape[-2:], 1, device=latents.device)),
        "timestep": inputs["timestep"] / _TIMESTEPS,
        "txt_ids": _places(1, 1, 1, text.shape[1], device=text.device),
    }


class _Flat(parts.Flat):
    """The transformer, without options; (b, channels, h, w) to the same."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
        reference_states: Tensor | None = None,
        reference_places: Tensor | None = None,
    ) -> Tensor:
        inputs = references.given(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            reference_states=reference_states,
            reference_places=reference_places,
        )
        found = self.source(**arguments(inputs), guidance=guidance, return_dict=False)[0]  # (b, tokens, channels)
        if reference_states is not None:
            found = found[:, : hidden_states.shape[-2] * hidden_states.shape[-1]]
        velocity: Tensor = found.transpose(1, 2).unflatten(2, hidden_states.shape[-2:])
        return velocity


def component(denoiser: nn.Module, *, height: int, width: int, vae_scale: int = 2 * parts.VAE_SCALE) -> Component:
    """See `Family.component`; dev also reads `guidance`, its scale."""
    return parts.denoiser_component(
        _Flat(denoiser),
        example,
        name="transformer",
        output="out_hidden_states",
        latents="hidden_states",
        sizes=parts.latent_sizes(height, width, vae_scale=vae_scale, multiple=1),
        pixels=(height, width),
    )


def _places(*sides: int, device: torch.device) -> Tensor:
    """(tokens, 4): the place of each on the axes time, row, column and text."""
    axes = [torch.arange(side, device=device, dtype=torch.float32) for side in sides]
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], dim=-1)


_DOUBLE: Final[layers.Inputs] = (
    (0, "norm1", "image", ("attn.to_q", "attn.to_k", "attn.to_v")),
    (0, "norm1_context", "text", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    (1, "attn.to_out.0", "image", ("attn.to_out.0",)),
    (1, "attn.to_add_out", "text", ("attn.to_add_out",)),
    (2, "norm2", "image", ("ff.linear_in",)),
    (2, "norm2_context", "text", ("ff_context.linear_in",)),
    (3, "ff.linear_out", "image", ("ff.linear_out",)),
    (3, "ff_context.linear_out", "text", ("ff_context.linear_out",)),
)
_SINGLE: Final[layers.Inputs] = (
    (0, "norm", "joint", ("attn.to_qkv_mlp_proj",)),
    (1, "attn.to_out", "joint", ("attn.to_out",)),
)


def _blocks(denoiser: nn.Module) -> Iterator[tuple[str, layers.Inputs]]:
    """Name and inputs of each block, in forward order."""
    return layers.in_stages(denoiser, {"transformer_blocks": _DOUBLE, "single_transformer_blocks": _SINGLE})


def _neurons(denoiser: nn.Module, feed: str, block: int) -> Group:
    out = f"{feed}.linear_out"
    return layers.neurons_between(
        feed,
        (Producer(name=f"{feed}.linear_in", parts=2),),
        Consumer(name=out),
        units=layers.size(denoiser.get_submodule(out), "in_features"),
        block=block,
    )


def _parallel(denoiser: nn.Module, prefix: str, block: int) -> tuple[Group, Group]:
    """The heads and the neurons of an attention whose first linear gives both and whose last reads both."""
    attention = denoiser.get_submodule(prefix)
    into, out = f"{prefix}.to_qkv_mlp_proj", f"{prefix}.to_out"
    count, width = layers.size(attention, "heads"), layers.size(attention, "head_dim")
    inner = count * width
    rows, columns = "_tp_packed_col_blocks", "_tp_packed_row_blocks"  # how it is divided, for tensor parallelism
    heads = Group(
        name=f"{prefix}.heads",
        kind="heads",
        block=block,
        units=count,
        width=width,
        producers=(Producer(name=into, parts=2, free=False), Producer(name=into, start=2 * inner)),
        consumers=(Consumer(name=out),),
        sizes=(
            Size(module=prefix, attribute="heads"),
            Size(module=prefix, attribute="inner_dim", factor=width),
            *(Size(module=into, attribute=rows, index=index, factor=width) for index in range(3)),
            Size(module=out, attribute=columns, index=0, factor=width),
        ),
    )
    neurons = layers.neurons_between(
        f"{prefix}.mlp",
        (Producer(name=into, parts=2, start=3 * inner),),
        Consumer(name=out, start=inner),
        units=layers.size(denoiser.get_submodule(out), "in_features") - inner,
        block=block,
        sizes=(
            Size(module=prefix, attribute="mlp_hidden_dim"),
            *(Size(module=into, attribute=rows, index=index) for index in (3, 4)),
            Size(module=out, attribute=columns, index=1),
        ),
    )
    return heads, neurons


def _writes(prefix: str, linear: str) -> Write | None:
    """Blocks are told shift, scale and gate of each of their sublayers one behind the other."""
    match linear:
        case "attn.to_out.0":
            return Write(stream=f"{prefix}.norm1", gate=ToldGate(block=prefix, told="temb_mod_img", row=2))
        case "attn.to_add_out":
            return Write(stream=f"{prefix}.norm1_context", gate=ToldGate(block=prefix, told="temb_mod_txt", row=2))
        case "ff.linear_out":
            return Write(stream=f"{prefix}.norm2", gate=ToldGate(block=prefix, told="temb_mod_img", row=5))
        case "ff_context.linear_out":
            return Write(stream=f"{prefix}.norm2_context", gate=ToldGate(block=prefix, told="temb_mod_txt", row=5))
        case "attn.to_out":
            return Write(stream=f"{prefix}.norm", gate=ToldGate(block=prefix, told="temb_mod", row=2))
    return None
