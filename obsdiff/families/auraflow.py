"""AuraFlow: `AuraFlowTransformer2DModel`, joint blocks of an image and a text stream, then blocks over both as one.

A joint block reads eight distinct tensors:

    norm1(image)       attn.to_q, to_k, to_v
    norm1(text)        attn.add_q_proj, add_k_proj, add_v_proj
    heads, image part  attn.to_out.0
    heads, text part   attn.to_add_out
    norm2(image)       ff.linear_1, linear_2
    norm2(text)        ff_context.linear_1, linear_2
    neurons, image     ff.out_projection
    neurons, text      ff_context.out_projection

A block behind them ("single") reads four, those of the image, over both streams as one sequence. A neuron is
silu(linear_1) * linear_2, a row of each. Attention does not write to the residual stream: its sum with the stream goes
through norm2 and the feed-forward, and only that is added.

Text is padded to 256 tokens, and the pipeline makes padding zero: the denoiser is told no mask and looks at all of
them. In front of the text stand eight registers, learned tokens of the denoiser's own.

Outside of this module the denoiser takes the scheduler's timesteps; their unit is part of the graph.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import isqrt
from typing import Any, Final

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff.families import layers, parts, reading
from obsdiff.groups import Consumer, Group, LinearSpec, Producer, Write
from obsdiff_export.component import Component

name: str = "auraflow"
denoiser: str = "transformer"
classes: tuple[str, ...] = ("AuraFlowTransformer2DModel",)
pipeline: str = "AuraFlowPipeline"
protect: tuple[int, int] = (1, 1)
negatives: bool = True
negative_first: bool = True
described: bool = True
text_mask: str | None = None
vae_scale: int = parts.VAE_SCALE

_TIMESTEPS: Final = 1000
"""The denoiser is told timesteps as shares of so many."""

_TEXT_TOKENS: Final = 256
_REGISTERS: Final = 8


def linears(denoiser: nn.Module) -> tuple[LinearSpec, ...]:
    """See `Family.linears`. Tiers: into the heads, out of them, into the neurons, out of them."""
    blocks = ((block, prefix, inputs) for block, (prefix, inputs) in enumerate(_blocks(denoiser)))
    return layers.of_blocks(denoiser, blocks, _writes)


def groups(denoiser: nn.Module) -> tuple[Group, ...]:
    """See `Family.groups`."""
    found: list[Group] = []
    for block, (prefix, inputs) in enumerate(_blocks(denoiser)):
        found.append(layers.heads(denoiser, f"{prefix}.attn", block=block))
        feeds = ("ff", "ff_context") if inputs is _JOINT else ("ff",)
        found += [_neurons(denoiser, f"{prefix}.{feed}", block) for feed in feeds]
    return tuple(found)


def tokens(
    config: Mapping[str, Any], *, height: int, width: int, text_tokens: int, vae_scale: int = 8
) -> dict[str, int]:
    """See `Family.tokens`: "image", one a patch, "text", registers included, and "joint", one behind the other."""
    patch = int(config["patch_size"])
    image = (height // vae_scale // patch) * (width // vae_scale // patch)
    text = text_tokens + _REGISTERS
    return {"image": image, "text": text, "joint": text + image}


def text_tokens(configs: Mapping[str, Mapping[str, Any]], max_sequence_length: int | None) -> int:
    """See `Family.text_tokens`."""
    return _TEXT_TOKENS if max_sequence_length is None else max_sequence_length


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
    """See `Family.encode`: T5's embeddings, zero where they are padding, and which are text."""
    return reading.masked_text(pipeline, prompts, negative, max_sequence_length)


def example(
    denoiser: nn.Module, *, batch: int, size: tuple[int, ...], text_tokens: int, pixels: tuple[int, int]
) -> dict[str, Tensor]:
    """See `Family.example`."""
    config: Any = denoiser.config
    dtype: Any = denoiser.dtype
    return {
        "hidden_states": parts.noise(batch, config.in_channels, *size, dtype=dtype),
        "encoder_hidden_states": parts.noise(batch, text_tokens, config.joint_attention_dim, dtype=dtype),
        "timestep": parts.timesteps(batch, dtype=dtype),
    }


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """See `Family.arguments`: the timestep in the denoiser's unit."""
    return {**inputs, "timestep": inputs["timestep"] / _TIMESTEPS}


class _Flat(parts.Flat):
    """The transformer, without options; (b, channels, h, w) to the same."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        velocity: Tensor = self.source(hidden_states, encoder_hidden_states, timestep / _TIMESTEPS, return_dict=False)[
            0
        ]
        return velocity


def component(denoiser: nn.Module, *, height: int, width: int, vae_scale: int = 8) -> Component:
    """See `Family.component`."""
    config: Any = denoiser.config
    sizes = parts.latent_sizes(
        height, width, vae_scale=vae_scale, multiple=config.patch_size, limit=isqrt(config.pos_embed_max_size)
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


_JOINT: Final[layers.Inputs] = (
    (0, "norm1", "image", ("attn.to_q", "attn.to_k", "attn.to_v")),
    (0, "norm1_context", "text", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    (1, "attn.to_out.0", "image", ("attn.to_out.0",)),
    (1, "attn.to_add_out", "text", ("attn.to_add_out",)),
    (2, "norm2", "image", ("ff.linear_1", "ff.linear_2")),
    (2, "norm2_context", "text", ("ff_context.linear_1", "ff_context.linear_2")),
    (3, "ff.out_projection", "image", ("ff.out_projection",)),
    (3, "ff_context.out_projection", "text", ("ff_context.out_projection",)),
)
_SINGLE: Final[layers.Inputs] = (
    (0, "norm1", "joint", ("attn.to_q", "attn.to_k", "attn.to_v")),
    (1, "attn.to_out.0", "joint", ("attn.to_out.0",)),
    (2, "norm2", "joint", ("ff.linear_1", "ff.linear_2")),
    (3, "ff.out_projection", "joint", ("ff.out_projection",)),
)


def _blocks(denoiser: nn.Module) -> Iterator[tuple[str, layers.Inputs]]:
    """Name and inputs of each block, in forward order."""
    return layers.in_stages(denoiser, {"joint_transformer_blocks": _JOINT, "single_transformer_blocks": _SINGLE})


def _neurons(denoiser: nn.Module, feed: str, block: int) -> Group:
    out = f"{feed}.out_projection"
    return layers.neurons_between(
        feed,
        (Producer(name=f"{feed}.linear_1"), Producer(name=f"{feed}.linear_2")),
        Consumer(name=out),
        units=layers.size(denoiser.get_submodule(out), "in_features"),
        block=block,
    )


def _writes(prefix: str, linear: str) -> Write | None:
    """The gate is the fifth thing that the first norm gives."""
    norm1, context = f"{prefix}.norm1", f"{prefix}.norm1_context"
    match linear:
        case "ff.out_projection":
            return Write(stream=norm1, gate=(norm1, 4))
        case "ff_context.out_projection":
            return Write(stream=context, gate=(context, 4))
    return None
