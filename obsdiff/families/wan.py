"""Wan: `WanTransformer3DModel`, a transformer over a film that looks at a text, and at a picture that it begins with.

A block reads six distinct tensors, and one more where an image encoder sees that picture:

    norm1              attn1.to_q, to_k, to_v    (self-attention over all frames)
    heads              attn1.to_out.0
    norm2              attn2.to_q                (cross-attention)
    the text           attn2.to_k, to_v          projected once: the very same tensor in all blocks of the model
    the picture        attn2.add_k_proj, add_v_proj
    heads              attn2.to_out.0
    norm3              ffn.net.0.proj
    neurons            ffn.net.2

Queries and keys are normalised over all heads at once, so a head that goes would change the others: only neurons are
removed. Scales, shifts and gates of all blocks come from one projection of the timestep; a block adds a table of its
own.

Latents have an axis of frames, (b, channels, frames, h, w). There are FRAMES of them, which is what the pipeline's call
draws, where nothing else is said.

Of Wan 2.2 A14B's pipelines two denoisers take turns (turns.py). Where films begin with a picture, the denoiser is told
latents of a film that shows it first and then nothing, and which frames are given, behind the channels of what is drawn
(openings.py). Wan 2.1's is also told what CLIP sees in it, and FLF2V's what it sees in the picture that the film ends
with: diffusers puts those tokens in front of the text, which it takes to have TEXT_TOKENS.

TI2V 5B's pipeline tells its denoiser a timestep for each token. Without a picture all are the same, and here it is told
one; with a picture, whose latents stand in place of the first frame, those of its tokens are 0. A graph is told one
timestep and which frames are drawn, and modulates whole frames; in torch the denoiser can do so, too (`by_frames`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline, WanPipeline
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from obsdiff.families import layers, parts, reading, references
from obsdiff.families.parts import modulated
from obsdiff.families.rotations import rotated
from obsdiff.groups import Group, LinearSpec
from obsdiff.instead import instead
from obsdiff_export.component import Component
from obsdiff_runtime.autoencoder import FRAME_SCALE
from obsdiff_runtime.errors import ConfigError, ModelError
from obsdiff_runtime.openings import MASK, SEEN, STATES, ends

name: str = "wan"
denoiser: str = "transformer"
classes: tuple[str, ...] = ("WanTransformer3DModel",)
pipeline: str = "WanPipeline"
protect: tuple[int, int] = (1, 1)
vae_scale: int = parts.VAE_SCALE
negatives: bool = True
negative_first: bool = True
described: bool = True
text_mask: str | None = None

FRAMES: Final = 21
"""Of the latents of 81 frames."""

TEXT_TOKENS: Final = 512

SEEN_TOKENS: Final = 257
"""Of a picture of 224 pixels a side in patches of 14, and one for all of it: CLIP's."""

_PATCH: Final = 2  # pixels of the latents along a side, where tokens have timesteps of their own
_TEXT: Final = "encoder_hidden_states"
_PIXELS: Final = (480, 832)  # that the pipeline draws


def linears(denoiser: nn.Module) -> tuple[LinearSpec, ...]:
    """See `Family.linears`. Tiers: attn1 in, attn1 out, attn2 in, attn2 out, into the neurons, out of them."""
    config: Any = denoiser.config
    sees = references.sees(config)
    inputs = (*_INPUTS, _SEEN) if sees else _INPUTS
    blocks = ((block, prefix, inputs) for block, prefix in enumerate(_blocks(denoiser)))
    return layers.of_blocks(denoiser, blocks, _WRITES, common=() if sees else (_TEXT,))  # cut out in each block


def groups(denoiser: nn.Module) -> tuple[Group, ...]:
    """See `Family.groups`: neurons alone."""
    blocks = enumerate(_blocks(denoiser))
    return tuple(layers.neurons(denoiser, f"{prefix}.ffn", block=block) for block, prefix in blocks)


def tokens(
    config: Mapping[str, Any], *, height: int, width: int, text_tokens: int, vae_scale: int = 8
) -> dict[str, int]:
    """See `Family.tokens`: "image", one token per patch of all FRAMES of the latents, "text", and "picture"."""
    frames, rows, columns = config["patch_size"]
    image = (FRAMES // frames) * (height // vae_scale // rows) * (width // vae_scale // columns)
    told = {"text": text_tokens}
    if references.sees(config):
        told = {"text": TEXT_TOKENS, "picture": SEEN_TOKENS * (2 if ends(config) else 1)}
    return {"image": image, **told}


def text_tokens(configs: Mapping[str, Mapping[str, Any]], max_sequence_length: int | None) -> int:
    """See `Family.text_tokens`: UMT5's, padded.

    Raises:
        ConfigError: the denoiser takes no such number.
    """
    length = TEXT_TOKENS if max_sequence_length is None else max_sequence_length
    if length != TEXT_TOKENS and references.sees(configs.get(denoiser, {})):
        raise ConfigError(
            f"--max-sequence-length {length}: behind what an image encoder sees diffusers takes texts of {TEXT_TOKENS} "
            "tokens alone; leave it out"
        )
    return length


def latent_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """See `Family.latent_size`: fixed by the pipeline."""
    return _PIXELS[0] // vae_scale, _PIXELS[1] // vae_scale


def encode(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    negative: Sequence[str],
    *,
    max_sequence_length: int | None = None,
) -> dict[str, Tensor]:
    """See `Family.encode`: UMT5's embeddings (n, text tokens, width), and zeros behind a text, which are looked at."""
    reading.need(pipeline, "text_encoder", "tokenizer")
    with torch.no_grad(), plainly(pipeline):
        given, without = pipeline.encode_prompt(
            prompt=list(prompts),
            negative_prompt=list(negative),
            do_classifier_free_guidance=bool(negative),
            max_sequence_length=text_tokens({denoiser: pipeline.transformer.config}, max_sequence_length),
        )
    return {"prompt_embeds": given} | ({} if without is None else {"negative_prompt_embeds": without})


@contextmanager
def plainly(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Until the end, a pipeline reads prompts as `WanPipeline` does, which goes without ftfy where that is absent."""
    with instead(pipeline, "_get_t5_prompt_embeds", partial(WanPipeline._get_t5_prompt_embeds, pipeline)):
        yield


def example(
    denoiser: nn.Module, *, batch: int, size: tuple[int, ...], text_tokens: int, pixels: tuple[int, int]
) -> dict[str, Tensor]:
    """See `Family.example`; a film has FRAMES latent frames where `size` says none."""
    config: Any = denoiser.config
    dtype: Any = denoiser.dtype
    size = size if len(size) == 3 else (FRAMES, *size)
    channels, told = _channels(config)
    length = TEXT_TOKENS if references.sees(config) else text_tokens
    found = {
        "hidden_states": parts.noise(batch, channels, *size, dtype=dtype),
        "encoder_hidden_states": parts.noise(batch, length, config.text_dim, dtype=dtype),
        "timestep": parts.timesteps(batch, dtype=dtype),
    }
    if told:
        found[STATES] = parts.noise(batch, told, *size, dtype=dtype)
    if references.sees(config):
        pictures = (2,) if ends(config) else ()
        found[SEEN] = parts.noise(batch, *pictures, SEEN_TOKENS, config.image_dim, dtype=dtype)
    return found


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """See `Family.arguments`."""
    told = dict(inputs)
    if STATES in told:
        told["hidden_states"] = torch.cat([told["hidden_states"], told.pop(STATES)], dim=1)
    if SEEN in told:
        told[SEEN] = told[SEEN].flatten(0, -3)  # rows of both pictures, where a film ends with one
    if MASK in told:
        frames = told["timestep"][:, None] * told.pop(MASK)  # (b, frames)
        told["timestep"] = frames.repeat_interleave(_frame_tokens(told["hidden_states"]), dim=1)
    return told


class _Block(WanTransformerBlock):  # type: ignore[misc]
    """diffusers' block, whose modulations may be those of whole frames, (b, frames, 6, width)."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
    ) -> Tensor:
        if temb.ndim == 3:
            found: Tensor = super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
            return found
        shift, scale, gate, shift_3, scale_3, gate_3 = (self.scale_shift_table + temb.float()).unbind(2)
        read = modulated(self.norm1(hidden_states.float()), scale + 1, shift).type_as(hidden_states)
        written = modulated(self.attn1(read, None, None, rotary_emb), gate)
        hidden_states = (hidden_states.float() + written).type_as(hidden_states)
        read = self.norm2(hidden_states.float()).type_as(hidden_states)
        hidden_states = hidden_states + self.attn2(read, encoder_hidden_states, None, None)
        read = modulated(self.norm3(hidden_states.float()), scale_3 + 1, shift_3).type_as(hidden_states)
        written = modulated(self.ffn(read).float(), gate_3)
        return (hidden_states.float() + written).type_as(hidden_states)


@contextmanager
def by_frames(denoiser: Any) -> Iterator[None]:
    """Until the end, a denoiser that is told timesteps of tokens modulates all tokens of a frame by the same tensors.

    Those of single tokens would take six times the memory of the hidden states, in every call that is kept. Tokens of a
    frame then have one timestep.
    """
    embed, tokens = denoiser.condition_embedder.forward, 1

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal tokens
        tokens = _frame_tokens(args[0] if args else kwargs["hidden_states"])

    def embedded(
        timestep: Tensor, text: Tensor, picture: Tensor | None = None, timestep_seq_len: int | None = None
    ) -> tuple[Tensor | None, ...]:
        if timestep_seq_len is None:
            return tuple(embed(timestep, text, picture))
        frames = timestep[::tokens]  # of all rows
        time, *found = embed(frames, text, picture, timestep_seq_len=timestep_seq_len // tokens)
        return (time.repeat_interleave(tokens, dim=1), *found)

    with parts.exchanged(
        denoiser, count, {denoiser.condition_embedder: embedded}, dict.fromkeys(denoiser.blocks, _Block)
    ):
        yield


def _frame_tokens(latents: Tensor) -> int:
    """Of a frame of latents (b, channels, frames, h, w)."""
    return (latents.shape[-2] // _PATCH) * (latents.shape[-1] // _PATCH)


class _Turned:
    """diffusers' processor of self-attention, whose rotations write into no slices."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, _: None, mask: None, rotary_emb: tuple[Tensor, Tensor]
    ) -> Tensor:
        cosines, sines = rotary_emb[0][0, :, 0, ::2], rotary_emb[1][0, :, 0, ::2]  # (tokens, d / 2)

        def heads(tokens: Tensor) -> Tensor:
            found: Tensor = tokens.unflatten(-1, (attn.heads, -1))  # type: ignore[no-untyped-call]
            return found  # (b, tokens, heads, d)

        query = rotated(heads(attn.norm_q(attn.to_q(hidden_states))), cosines, sines).transpose(1, 2)
        key = rotated(heads(attn.norm_k(attn.to_k(hidden_states))), cosines, sines).transpose(1, 2)
        value = heads(attn.to_v(hidden_states)).transpose(1, 2)
        found = scaled_dot_product_attention(query, key, value)  # (b, heads, tokens, d)
        attended: Tensor = attn.to_out[0](found.transpose(1, 2).flatten(2))
        return attended


class _Flat(parts.Flat):
    """The transformer, without options; (b, channels, frames, h, w) to the same."""

    def __init__(self, source: Any) -> None:
        blocks = {}
        for child, block in source.blocks.named_children():
            attention = parts.view(block.attn1)
            attention.processor = _Turned()
            blocks[child] = parts.view(block, attn1=attention)
            blocks[child].__class__ = _Block
        super().__init__(parts.view(source, blocks=parts.view(source.blocks, **blocks)))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        opening_states: Tensor | None = None,
        encoder_hidden_states_image: Tensor | None = None,
        frame_mask: Tensor | None = None,
    ) -> Tensor:
        if frame_mask is not None:
            return self._by_frames(hidden_states, encoder_hidden_states, timestep[:, None] * frame_mask)
        inputs = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states, "timestep": timestep}
        told = references.given(**inputs, **{STATES: opening_states, SEEN: encoder_hidden_states_image})
        velocity: Tensor = self.source(**arguments(told), return_dict=False)[0]
        return velocity

    def _by_frames(self, hidden_states: Tensor, text: Tensor, timesteps: Tensor) -> Tensor:
        """The call with timesteps (b, frames)."""
        model = self.source
        places, patches = model.rope(hidden_states), model.patch_embedding(hidden_states)
        tokens = patches.flatten(2).transpose(1, 2)
        time, modulations, text, _ = model.condition_embedder(
            timesteps.flatten(), text, timestep_seq_len=timesteps.shape[1]
        )
        for block in model.blocks:
            tokens = block(tokens, text, modulations.unflatten(2, (6, -1)), places)
        shift, scale = (model.scale_shift_table + time[:, :, None]).unbind(2)
        read = modulated(model.norm_out(tokens.float()), scale + 1, shift).type_as(tokens)
        grid = model.proj_out(read).unflatten(1, patches.shape[2:])  # (b, frames, rows, columns, patch)
        pixels = grid.unflatten(-1, (*model.config.patch_size, -1)).permute(0, 7, 1, 4, 2, 5, 3, 6)
        velocity: Tensor = pixels.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return velocity


def component(denoiser: nn.Module, *, height: int, width: int, vae_scale: int = 8) -> Component:
    """See `Family.component`."""
    config: Any = denoiser.config
    _require_known(config)
    sizes = parts.latent_sizes(height, width, vae_scale=vae_scale, multiple=config.patch_size[-1])
    found = parts.denoiser_component(
        _Flat(denoiser),
        example,
        name="transformer",
        output="out_hidden_states",
        latents="hidden_states",
        sizes=[(frames, *size) for frames, size in zip((FRAMES, 5, 1), sizes, strict=True)],
        pixels=(height, width),
        text=() if references.sees(config) else (_TEXT,),
    )
    axes = found.dynamic_axes
    return replace(found, dynamic_axes={**axes, STATES: axes["hidden_states"]}) if STATES in axes else found


_INPUTS: Final[layers.Inputs] = (
    (0, "norm1", "image", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    (1, "attn1.to_out.0", "image", ("attn1.to_out.0",)),
    (2, "norm2", "image", ("attn2.to_q",)),
    (2, _TEXT, "text", ("attn2.to_k", "attn2.to_v")),
    (3, "attn2.to_out.0", "image", ("attn2.to_out.0",)),
    (4, "norm3", "image", ("ffn.net.0.proj",)),
    (5, "ffn.net.2", "image", ("ffn.net.2",)),
)
_SEEN: Final = (2, SEEN, "picture", ("attn2.add_k_proj", "attn2.add_v_proj"))
_WRITES: Final = layers.adaln_single("temb", out="ffn.net.2", streams=("norm2", "norm3"))


def _blocks(denoiser: nn.Module) -> Iterator[str]:
    _require_known(denoiser.config)
    for child, block in denoiser.get_submodule("blocks").named_children():
        for attention in ("attn1", "attn2"):
            layers.require_unfused(block.get_submodule(attention), f"blocks.{child}.{attention}")
        yield f"blocks.{child}"


def _channels(config: Any) -> tuple[int, int]:
    """Of the latents that are drawn, and of what the denoiser is told of a film's beginning."""
    drawn = config.out_channels or config.in_channels
    return drawn, config.in_channels - drawn


def _require_known(config: Any) -> None:
    drawn, told = _channels(config)
    known = (FRAME_SCALE + drawn,) if references.sees(config) else (0, FRAME_SCALE + drawn)
    if told not in known or references.sees(config) != bool(config.added_kv_proj_dim):
        raise ModelError(
            f"this WanTransformer3DModel is told {told} channels beside the {drawn} that it draws, and obsdiff knows "
            "those that are told a text, or how a film begins"
        )
    if ends(config) and (not references.sees(config) or config.pos_embed_seq_len != 2 * SEEN_TOKENS):
        raise ModelError(
            f"this WanTransformer3DModel has places for {config.pos_embed_seq_len} tokens of what an image encoder "
            f"sees, and obsdiff knows those that have {2 * SEEN_TOKENS}, of the first and the last frame of a film"
        )
