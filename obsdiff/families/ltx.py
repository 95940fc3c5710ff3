"""LTX-Video: `LTXVideoTransformer3DModel`, a transformer over a film that looks at a text.

A block reads six distinct tensors:

    norm1              attn1.to_q, to_k, to_v    (self-attention over all frames)
    heads              attn1.to_out.0
    its stream         attn2.to_q                (cross-attention)
    the text           attn2.to_k, to_v          projected once: the very same tensor in all blocks of the model
    heads              attn2.to_out.0
    norm2              ff.net.0.proj
    neurons            ff.net.2

Queries and keys are normalised over all heads at once, so a head that goes would change the others: only neurons are
removed. Scales, shifts and gates of all blocks come from one projection of the timestep; a block adds a table of its
own.

Outside of the family latents have an axis of frames, (b, channels, frames, h, w), FRAMES of them where nothing else is
said; the pipeline's denoiser is told tokens of one latent pixel each. Tokens are turned by where they are in pixels and
seconds. When each latent frame begins the graph is told (`TIMES`), because diffusers' pipelines count it in different
ways from a number of frames a second, which is not the denoiser's; SIDE pixels along a side of a latent pixel are.

Latents of a picture can stand in place of the first ones. Then the denoiser is told a timestep for each token, of which
that of the given frames' is 0. A graph is told one timestep and which frames are drawn, and modulates whole frames; in
torch the denoiser can do so, too (`by_frames`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformerBlock
from torch import Tensor, nn

from obsdiff.families import layers, parts, reading
from obsdiff.groups import Group, LinearSpec
from obsdiff_export.component import Component
from obsdiff_runtime.errors import ModelError
from obsdiff_runtime.kinds.ltx import TIMES, times

SIDE: Final = 32
"""Pixels along a side of a latent pixel."""

name: str = "ltx"
denoiser: str = "transformer"
classes: tuple[str, ...] = ("LTXVideoTransformer3DModel",)
pipeline: str = "LTXPipeline"
protect: tuple[int, int] = (1, 1)
vae_scale: int = SIDE
negatives: bool = True
negative_first: bool = True
described: bool = True
text_mask: str | None = "encoder_attention_mask"

FRAMES: Final = 21
"""Of the latents of 161 frames."""

TEXT_TOKENS: Final = 128

_TEXT: Final = "encoder_hidden_states"
_PIXELS: Final = (512, 704)  # that the pipeline draws


def linears(denoiser: nn.Module) -> tuple[LinearSpec, ...]:
    """See `Family.linears`. Tiers: attn1 in, attn1 out, attn2 in, attn2 out, into the neurons, out of them."""
    blocks = ((block, prefix, _INPUTS) for block, prefix in enumerate(_blocks(denoiser)))
    return layers.of_blocks(denoiser, blocks, _WRITES, common=(_TEXT,))


def groups(denoiser: nn.Module) -> tuple[Group, ...]:
    """See `Family.groups`: neurons alone."""
    blocks = enumerate(_blocks(denoiser))
    return tuple(layers.neurons(denoiser, f"{prefix}.ff", block=block) for block, prefix in blocks)


def tokens(
    config: Mapping[str, Any], *, height: int, width: int, text_tokens: int, vae_scale: int = SIDE
) -> dict[str, int]:
    """See `Family.tokens`: "image", one token per latent pixel of all FRAMES, and "text"."""
    return {"image": FRAMES * (height // vae_scale) * (width // vae_scale), "text": text_tokens}


def text_tokens(configs: Mapping[str, Mapping[str, Any]], max_sequence_length: int | None) -> int:
    """See `Family.text_tokens`: T5's."""
    return TEXT_TOKENS if max_sequence_length is None else max_sequence_length


def latent_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """See `Family.latent_size`: fixed by the pipeline."""
    return _PIXELS[0] // SIDE, _PIXELS[1] // SIDE


def encode(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    negative: Sequence[str],
    *,
    max_sequence_length: int | None = None,
) -> dict[str, Tensor]:
    """See `Family.encode`: T5's embeddings (n, text tokens, width), and which of them are text, (n, text tokens)."""
    return reading.masked_text(pipeline, prompts, negative, max_sequence_length)


def example(
    denoiser: nn.Module, *, batch: int, size: tuple[int, ...], text_tokens: int, pixels: tuple[int, int]
) -> dict[str, Tensor]:
    """See `Family.example`; a film has FRAMES latent frames where `size` says none."""
    config: Any = denoiser.config
    size = size if len(size) == 3 else (FRAMES, *size)
    inputs = parts.masked_example(denoiser, batch, size, text_tokens, config.caption_channels)
    return {**inputs, TIMES: torch.from_numpy(times(size[0])).repeat(batch, 1)}


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """See `Family.arguments`: latents as tokens, and where these are, (b, 3, tokens): in seconds, and down and across.

    The last two are in pixels.
    """
    told = dict(inputs)
    latents, begins = told["hidden_states"], told.pop(TIMES)
    down, across = (torch.arange(side, dtype=torch.float32, device=begins.device) for side in latents.shape[3:])
    places = (begins[..., None, None], SIDE * down[:, None], SIDE * across)
    whole = (*begins.shape, *latents.shape[3:])
    told["hidden_states"] = latents.flatten(2).transpose(1, 2)
    told["video_coords"] = torch.stack([place.expand(whole).flatten(1) for place in places], dim=1)
    return told


class _Block(LTXVideoTransformerBlock):  # type: ignore[misc]
    """diffusers' block, whose modulations may be those of whole frames, (b, frames, 6 width)."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        rows = temb.unflatten(2, (6, -1))  # type: ignore[no-untyped-call]
        shift, scale, gate, shift_2, scale_2, gate_2 = (self.scale_shift_table + rows).unbind(2)
        read = parts.modulated(self.norm1(hidden_states), 1 + scale, shift)
        written = self.attn1(hidden_states=read, encoder_hidden_states=None, image_rotary_emb=image_rotary_emb)
        hidden_states = hidden_states + parts.modulated(written, gate)
        hidden_states = hidden_states + self.attn2(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            image_rotary_emb=None,
            attention_mask=encoder_attention_mask,
        )
        read = parts.modulated(self.norm2(hidden_states), 1 + scale_2, shift_2)
        return hidden_states + parts.modulated(self.ff(read), gate_2)


@contextmanager
def by_frames(denoiser: Any) -> Iterator[None]:
    """Until the end, a denoiser that is told timesteps of tokens modulates all tokens of a frame by the same tensors.

    Those of single tokens would take six times the memory of the hidden states, in every call that is kept. Tokens of a
    frame then have one timestep.
    """
    embed, tokens = denoiser.time_embed.forward, 1

    def count(_: nn.Module, __: tuple[Any, ...], given: dict[str, Any]) -> None:
        nonlocal tokens
        places = given.get("video_coords")
        tokens = given["height"] * given["width"] if places is None else int((places[0, 0] == places[0, 0, 0]).sum())

    def embedded(timestep: Tensor, *, batch_size: int, hidden_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        told = {"batch_size": batch_size, "hidden_dtype": hidden_dtype}
        if len(timestep) == batch_size:
            plain: tuple[Tensor, Tensor] = embed(timestep, **told)
            return plain
        modulations, time = embed(timestep.view(batch_size, -1)[:, ::tokens].flatten(), **told)
        return modulations, time.repeat_interleave(tokens, dim=0)

    blocks = dict.fromkeys(denoiser.transformer_blocks, _Block)
    with parts.exchanged(denoiser, count, {denoiser.time_embed: embedded}, blocks):
        yield


class _Flat(parts.Flat):
    """The transformer, without options; (b, channels, frames, h, w) to the same."""

    def __init__(self, source: Any) -> None:
        blocks = {child: parts.view(block) for child, block in source.transformer_blocks.named_children()}
        for block in blocks.values():
            block.__class__ = _Block
        super().__init__(parts.view(source, transformer_blocks=parts.view(source.transformer_blocks, **blocks)))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep: Tensor,
        frame_times: Tensor,
        frame_mask: Tensor | None = None,
    ) -> Tensor:
        told = arguments(
            {
                "hidden_states": hidden_states,
                "encoder_hidden_states": encoder_hidden_states,
                "encoder_attention_mask": encoder_attention_mask,
                "timestep": timestep,
                TIMES: frame_times,
            }
        )
        if frame_mask is None:
            tokens: Tensor = self.source(**told, return_dict=False)[0]
        else:
            tokens = self._by_frames(told, timestep[:, None] * frame_mask)
        velocity: Tensor = tokens.transpose(1, 2).unflatten(2, hidden_states.shape[2:])  # type: ignore[no-untyped-call]
        return velocity

    def _by_frames(self, told: Mapping[str, Any], timesteps: Tensor) -> Tensor:
        """The call with timesteps (b, frames)."""
        model, latents = self.source, told["hidden_states"]
        places = model.rope(latents, video_coords=told["video_coords"])
        unseen = -10000.0 * (1 - told["encoder_attention_mask"])[:, None]
        rows = {"batch_size": timesteps.shape[0], "hidden_dtype": latents.dtype}
        found = model.time_embed(timesteps.flatten(), **rows)
        modulations, time = (each.view(*timesteps.shape, -1) for each in found)
        tokens, text = model.proj_in(latents), model.caption_projection(told["encoder_hidden_states"])
        for block in model.transformer_blocks:
            tokens = block(tokens, text, modulations, places, unseen)
        shift, scale = (model.scale_shift_table + time[:, :, None]).unbind(2)
        velocity: Tensor = model.proj_out(parts.modulated(model.norm_out(tokens), 1 + scale, shift))
        return velocity


def component(denoiser: nn.Module, *, height: int, width: int, vae_scale: int = SIDE) -> Component:
    """See `Family.component`."""
    sizes = parts.latent_sizes(height, width, vae_scale=vae_scale, multiple=1)
    found = parts.denoiser_component(
        _Flat(denoiser),
        example,
        name="transformer",
        output="out_hidden_states",
        latents="hidden_states",
        sizes=[(frames, *size) for frames, size in zip((FRAMES, 5, 1), sizes, strict=True)],
        pixels=(height, width),
        text=(_TEXT, "encoder_attention_mask"),
    )
    return replace(found, dynamic_axes={**found.dynamic_axes, TIMES: {0: "batch", 1: "frames"}})


_INPUTS: Final[layers.Inputs] = (
    (0, "norm1", "image", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    (1, "attn1.to_out.0", "image", ("attn1.to_out.0",)),
    (2, "attn2", "image", ("attn2.to_q",)),
    (2, _TEXT, "text", ("attn2.to_k", "attn2.to_v")),
    (3, "attn2.to_out.0", "image", ("attn2.to_out.0",)),
    (4, "norm2", "image", ("ff.net.0.proj",)),
    (5, "ff.net.2", "image", ("ff.net.2",)),
)
_WRITES: Final = layers.adaln_single("temb", out="ff.net.2")


def _blocks(denoiser: nn.Module) -> Iterator[str]:
    config: Any = denoiser.config
    if (config.patch_size, config.patch_size_t) != (1, 1):
        raise ModelError("this LTXVideoTransformer3DModel has patches of latent pixels; obsdiff knows those without")
    for child, block in denoiser.get_submodule("transformer_blocks").named_children():
        for attention in ("attn1", "attn2"):
            layers.require_unfused(block.get_submodule(attention), f"transformer_blocks.{child}.{attention}")
        yield f"transformer_blocks.{child}"
