"""Sana: `SanaTransformer2DModel`, a transformer over the image whose own attention is linear in its tokens.

A block reads seven distinct tensors:

    norm1              attn1.to_q, to_k, to_v    (linear self-attention)
    heads              attn1.to_out.0
    the stream         attn2.to_q                (cross-attention; there is no norm in front of it)
    the text           attn2.to_k, to_v          projected once: the very same tensor in all blocks of the model
    heads              attn2.to_out.0
    norm2, as pixels   ff.conv_inverted          (the feed-forward is a GLU-MBConv)
    neurons, as pixels ff.conv_point

`ff.conv_inverted` and `ff.conv_point` are convolutions of one pixel and pruned as the linears over channels that they
are. Between them `ff.conv_depth` filters each channel by itself, 3 x 3 weights a channel. Those stay whole, one of a
channel that goes apart: a neuron is a channel and its gate, so it takes two rows of `conv_inverted`, two filters of
`conv_depth` and a column of `conv_point` with it.

Where queries and keys are normalised over all heads at once (Sana 1.5, Sana-Sprint), a head that goes would change the
others, so only neurons are removed there.

Sana-Sprint is told its guidance and draws in few steps, from one angle of TrigFlow to the next. Outside of this module
it takes the scheduler's angle, and latents of unit variance, which diffusers' pipeline has times sigma_data, and gives
TrigFlow's velocity of these. Its own time and latents are those of a flow; both ways are part of the graph. With s and
c the angle's sine and cosine, x the latents and F the network (arXiv 2503.09641, section 3.1):

    velocity(x, angle) = ((c - s) x + F(x / (s + c), s / (s + c))) / (s + c)

In torch, calibration and comparison look at what F gives. An error of it is s + c times the velocity's.

Scales, shifts and gates of all blocks come from one projection of the timestep; a block adds a table of its own.

Text is read as the pipeline does with clean_caption=False (lower case, without spaces at its ends), behind the
instruction that the pipeline's call has by default; a size is drawn as it is asked for, as with
use_resolution_binning=False.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff.families import layers, parts, reading
from obsdiff.families.places import Patches
from obsdiff.groups import Consumer, Group, LinearSpec, Producer
from obsdiff_export.component import Component
from obsdiff_runtime.errors import ConfigError

name: str = "sana"
denoiser: str = "transformer"
classes: tuple[str, ...] = ("SanaTransformer2DModel",)
pipeline: str = "SanaPipeline"
protect: tuple[int, int] = (1, 1)
vae_scale: int = 32
negatives: bool = True
negative_first: bool = True
described: bool = True
text_mask: str | None = "encoder_attention_mask"

SPRINT: Final = "SanaSprintPipeline"
"""That of a denoiser which is told its guidance."""

TEXT_TOKENS: Final = 300

_TEXT: Final = "encoder_hidden_states"


def linears(denoiser: nn.Module) -> tuple[LinearSpec, ...]:
    """See `Family.linears`. Tiers: attn1 in, attn1 out, attn2 in, attn2 out, into the neurons, out of them."""
    blocks = ((block, prefix, _INPUTS) for block, prefix in enumerate(_blocks(denoiser)))
    return layers.of_blocks(denoiser, blocks, _WRITES, common=(_TEXT,))


def groups(denoiser: nn.Module) -> tuple[Group, ...]:
    """See `Family.groups`."""
    found: list[Group] = []
    for block, prefix in enumerate(_blocks(denoiser)):
        for attention in (f"{prefix}.attn1", f"{prefix}.attn2"):
            if not layers.present(denoiser.get_submodule(attention), "norm_q", "norm_k"):
                found.append(layers.heads(denoiser, attention, block=block))
        found.append(_neurons(denoiser, f"{prefix}.ff", block=block))
    return tuple(found)


def tokens(
    config: Mapping[str, Any], *, height: int, width: int, text_tokens: int, vae_scale: int = 8
) -> dict[str, int]:
    """See `Family.tokens`: "image", one token per patch of the latents, and "text"."""
    patch = config["patch_size"]
    return {"image": (height // vae_scale // patch) * (width // vae_scale // patch), "text": text_tokens}


def text_tokens(configs: Mapping[str, Mapping[str, Any]], max_sequence_length: int | None) -> int:
    """See `Family.text_tokens`: those of Gemma-2's that the pipeline keeps."""
    return TEXT_TOKENS if max_sequence_length is None else max_sequence_length


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
    """See `Family.encode`: Gemma-2's embeddings (n, text tokens, width), and which of them are text, (n, text tokens).

    Prompts, not negative ones, stand behind the instruction that is the default of the pipeline's call.

    Raises:
        ConfigError: negative prompts are given to Sana-Sprint.
    """
    if negative and pipeline.transformer.config.guidance_embeds:
        raise ConfigError("Sana-Sprint takes no negative prompts: its denoiser is told the guidance scale instead")
    told = {reading.INSTRUCTION: reading.instruction(pipeline)}
    return reading.masked_text(pipeline, prompts, negative, max_sequence_length, **told)


def example(
    denoiser: nn.Module, *, batch: int, size: tuple[int, ...], text_tokens: int, pixels: tuple[int, int]
) -> dict[str, Tensor]:
    """See `Family.example`; of Sana-Sprint also `guidance`, its scale, and timesteps are angles."""
    config: Any = denoiser.config
    inputs = parts.masked_example(denoiser, batch, size, text_tokens, config.caption_channels)
    if config.guidance_embeds:
        dtype = inputs["timestep"].dtype
        inputs["timestep"] = torch.linspace(math.pi / 2, 0.1, batch).to(dtype)
        inputs["guidance"] = torch.linspace(4.5, 1.5, batch).to(dtype)
    return inputs


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """See `Family.arguments`; where the configuration scales timesteps or guidance, they are scaled already."""
    if "guidance" not in inputs:
        return dict(inputs)
    latents, sine, cosine = inputs["hidden_states"], *_turned(inputs["timestep"])
    scaled = (latents / (sine + cosine)).to(latents.dtype)
    return {**inputs, "hidden_states": scaled, "timestep": (sine / (sine + cosine)).flatten()}


class _Flat(parts.Flat):
    """The transformer, without options; (b, channels, h, w) to the same, told the scheduler's timesteps or angles."""

    def __init__(self, source: Any) -> None:
        placed = source.patch_embed.pos_embed is not None
        super().__init__(parts.view(source, patch_embed=Patches(source.patch_embed)) if placed else source)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        config = self.source.config
        inputs = {
            "hidden_states": hidden_states,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "timestep": timestep,
        }
        if guidance is None:
            inputs["timestep"] = timestep * config.timestep_scale
        else:  # diffusers' pipeline of such a model does not look at timestep_scale
            inputs["guidance"] = guidance * config.guidance_embeds_scale
        found: Tensor = self.source(**arguments(inputs), return_dict=False)[0][:, : hidden_states.shape[1]]
        if guidance is None:
            return found
        sine, cosine = _turned(timestep)
        return (((cosine - sine) * hidden_states + found) / (sine + cosine)).to(found.dtype)


def component(denoiser: nn.Module, *, height: int, width: int, vae_scale: int = 8) -> Component:
    """See `Family.component`."""
    config: Any = denoiser.config
    return parts.denoiser_component(
        _Flat(denoiser),
        example,
        name="transformer",
        output="out_hidden_states",
        latents="hidden_states",
        sizes=parts.latent_sizes(height, width, vae_scale=vae_scale, multiple=config.patch_size),
        pixels=(height, width),
        text=("encoder_hidden_states", "encoder_attention_mask"),
    )


_INPUTS: Final[layers.Inputs] = (
    (0, "norm1", "image", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    (1, "attn1.to_out.0", "image", ("attn1.to_out.0",)),
    (2, "attn2", "image", ("attn2.to_q",)),
    (2, _TEXT, "text", ("attn2.to_k", "attn2.to_v")),
    (3, "attn2.to_out.0", "image", ("attn2.to_out.0",)),
    (4, "norm2", "image", ("ff.conv_inverted",)),
    (5, "ff.conv_point", "image", ("ff.conv_point",)),
)
_WRITES: Final = layers.adaln_single("timestep", out="ff.conv_point")


def _turned(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of angles (b,), for latents: (b, 1, 1, 1) each."""
    angle = angle[:, None, None, None]
    return angle.sin(), angle.cos()


def _blocks(denoiser: nn.Module) -> Iterator[str]:
    for child, _ in denoiser.get_submodule("transformer_blocks").named_children():
        yield f"transformer_blocks.{child}"


def _neurons(denoiser: nn.Module, name: str, *, block: int) -> Group:
    """The channels between the convolutions; both of the first two hold each twice, the second one is its gate."""
    return Group(
        name=f"{name}.neurons",
        kind="ffn",
        block=block,
        units=layers.size(denoiser.get_submodule(f"{name}.conv_point"), "in_channels"),
        width=1,
        producers=(Producer(name=f"{name}.conv_inverted", parts=2), Producer(name=f"{name}.conv_depth", parts=2)),
        consumers=(Consumer(name=f"{name}.conv_point"),),
    )
