"""Lumina-2 (Lumina-Image 2.0): `Lumina2Transformer2DModel`, blocks over text, over the image, then over both as one.

All blocks read four distinct tensors:

    norm1              attn.to_q, to_k, to_v
    heads              attn.to_out.0
    ffn_norm1          feed_forward.linear_1, linear_3
    neurons            feed_forward.linear_2

The first ones (`context_refiner`) read text, those after them (`noise_refiner`) the image, `layers` both. Several heads
of queries read the same keys and values, and go with them as one unit. A neuron is silu(linear_1) * linear_3, a row of
each. What attention and feed-forward give is normalised before it is added to the stream, so that no linear writes it.

diffusers packs each row's text and image one behind the other, without the padding of the text, and pads the end. The
graph has no such loop over rows: padding stays where it is, between both, no token looks at it, and places are counted
without it: text token i is at (i, 0, 0), a patch at (text tokens, row, column). The places' waves are sines and cosines
in place of complex numbers, which no engine knows.

Outside of this module the denoiser takes the scheduler's timesteps and gives the velocity of the others, from the image
to noise: its own time runs the other way, and both are part of the graph.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff.families import layers, parts, reading
from obsdiff.families.rotations import Waves, attention, waves_of
from obsdiff.groups import Consumer, Group, LinearSpec, Producer
from obsdiff_export.component import Component

name: str = "lumina2"
denoiser: str = "transformer"
classes: tuple[str, ...] = ("Lumina2Transformer2DModel",)
pipeline: str = "Lumina2Pipeline"
protect: tuple[int, int] = (1, 1)
vae_scale: int = parts.VAE_SCALE
negatives: bool = True
negative_first: bool = True
described: bool = True
text_mask: str | None = "encoder_attention_mask"

_TIMESTEPS: Final = 1000
_TEXT_TOKENS: Final = 256
_SEQUENCES: Final = {"context_refiner": "text", "noise_refiner": "image", "layers": "joint"}
"""What the blocks of each list run over, in the order in which they run."""


def linears(denoiser: nn.Module) -> tuple[LinearSpec, ...]:
    """See `Family.linears`. Tiers: into the heads, out of them, into the neurons, out of them."""
    blocks = ((block, prefix, _inputs(sequence)) for block, (prefix, sequence) in enumerate(_blocks(denoiser)))
    return layers.of_blocks(denoiser, blocks, lambda prefix, linear: None)


def groups(denoiser: nn.Module) -> tuple[Group, ...]:
    """See `Family.groups`."""
    found: list[Group] = []
    for block, (prefix, _) in enumerate(_blocks(denoiser)):
        found.append(layers.heads(denoiser, f"{prefix}.attn", block=block))
        feed = f"{prefix}.feed_forward"
        out = f"{feed}.linear_2"
        neurons = layers.neurons_between(
            feed,
            (Producer(name=f"{feed}.linear_1"), Producer(name=f"{feed}.linear_3")),
            Consumer(name=out),
            units=layers.size(denoiser.get_submodule(out), "in_features"),
            block=block,
        )
        found.append(neurons)
    return tuple(found)


def tokens(
    config: Mapping[str, Any], *, height: int, width: int, text_tokens: int, vae_scale: int = 8
) -> dict[str, int]:
    """See `Family.tokens`: "image", one a patch, "text", and "joint", as many as of the longest text and the image."""
    patch = int(config["patch_size"])
    image = (height // vae_scale // patch) * (width // vae_scale // patch)
    return {"image": image, "text": text_tokens, "joint": text_tokens + image}


def text_tokens(configs: Mapping[str, Mapping[str, Any]], max_sequence_length: int | None) -> int:
    """See `Family.text_tokens`: Gemma-2's, of the system prompt and the prompt behind it."""
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
    """See `Family.encode`: Gemma-2's embeddings (n, text tokens, width), and which of them are text, (n, text tokens).

    Prompts, not negative ones, stand behind the pipeline's system prompt.
    """
    return reading.masked_text(pipeline, prompts, negative, max_sequence_length)


def example(
    denoiser: nn.Module, *, batch: int, size: tuple[int, ...], text_tokens: int, pixels: tuple[int, int]
) -> dict[str, Tensor]:
    """See `Family.example`."""
    config: Any = denoiser.config
    return parts.masked_example(denoiser, batch, size, text_tokens, config.cap_feat_dim)


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """See `Family.arguments`: the time that is 0 at noise, and the mask as the tokenizer gives it."""
    mask = inputs["encoder_attention_mask"].to(torch.int64)
    return {**inputs, "encoder_attention_mask": mask, "timestep": 1 - inputs["timestep"] / _TIMESTEPS}


class _Flat(parts.Flat):
    """The transformer, without options; (b, channels, h, w) to the same, b rows of s tokens in blocks."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor, timestep: Tensor
    ) -> Tensor:
        source, patch, rotary = self.source, self.source.config.patch_size, self.source.rope_embedder
        rows, columns = hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch
        shown = encoder_attention_mask.bool()
        time, text = source.time_caption_embed(hidden_states, 1 - timestep / _TIMESTEPS, encoder_hidden_states)
        image = source.x_embedder(parts.patches(hidden_states, patch))
        first, second = _places(shown, rows, columns)
        waves = waves_of(first, rotary.theta, rotary.axes_dim)
        for block in source.context_refiner:
            text = _block(block, text, waves, shown)
        waves = waves_of(second, rotary.theta, rotary.axes_dim)
        for block in source.noise_refiner:
            image = _block(block, image, waves, time=time)
        both = torch.cat([text, image], dim=1)
        shown = torch.cat([shown, torch.ones_like(image[..., 0], dtype=torch.bool)], dim=1)
        waves = waves_of(torch.cat([first, second], dim=1), rotary.theta, rotary.axes_dim)
        for block in source.layers:
            both = _block(block, both, waves, shown, time)
        return -parts.unpatched(source.norm_out(both[:, text.shape[1] :], time), rows, columns, patch)


def component(denoiser: nn.Module, *, height: int, width: int, vae_scale: int = 8) -> Component:
    """See `Family.component`."""
    config: Any = denoiser.config
    return parts.denoiser_component(
        _Flat(denoiser),
        example,
        name="transformer",
        output="out_hidden_states",
        latents="hidden_states",
        sizes=parts.latent_sizes(
            height, width, vae_scale=vae_scale, multiple=config.patch_size, limit=min(config.axes_lens[1:])
        ),
        pixels=(height, width),
        text=("encoder_hidden_states", "encoder_attention_mask"),
    )


def _inputs(sequence: str) -> layers.Inputs:
    return (
        (0, "norm1", sequence, ("attn.to_q", "attn.to_k", "attn.to_v")),
        (1, "attn.to_out.0", sequence, ("attn.to_out.0",)),
        (2, "ffn_norm1", sequence, ("feed_forward.linear_1", "feed_forward.linear_3")),
        (3, "feed_forward.linear_2", sequence, ("feed_forward.linear_2",)),
    )


def _blocks(denoiser: nn.Module) -> Iterator[tuple[str, str]]:
    """Name and sequence of each block, in forward order."""
    return layers.in_stages(denoiser, _SEQUENCES)


def _places(shown: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Of text (b, l, 3) and of patches (b, h / p * w / p, 3), float32, by which text tokens are shown, (b, l)."""

    def count(places: int) -> Tensor:
        return torch.arange(places, dtype=torch.float32, device=shown.device)

    order = count(shown.shape[1]).expand_as(shown)
    text = torch.stack([order, torch.zeros_like(order), torch.zeros_like(order)], dim=-1)
    length = shown.float().sum(dim=1)[:, None, None].expand(-1, rows, columns)
    row, column = count(rows)[:, None].expand_as(length), count(columns).expand_as(length)
    return text, torch.stack([length, row, column], dim=-1).flatten(1, 2)


def _block(
    block: Any,
    states: Tensor,
    waves: Waves,
    shown: Tensor | None = None,
    time: Tensor | None = None,
) -> Tensor:
    """A block of diffusers' with that attention; blocks of text are not told the time."""
    normed, *told = (block.norm1(states),) if time is None else block.norm1(states, time)
    gate, scale, last = (each[:, None] for each in told) if told else (None, 0, None)
    attended = block.norm2(attention(block.attn, normed, waves, shown))
    states = states + (attended if gate is None else gate.tanh() * attended)
    fed = block.ffn_norm2(block.feed_forward(block.ffn_norm1(states) * (1 + scale)))
    result: Tensor = states + (fed if last is None else last.tanh() * fed)
    return result
