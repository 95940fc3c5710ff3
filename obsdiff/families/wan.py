"""Wan: `WanTransformer3DModel`, a transformer over a film that looks at a text.

A block reads six distinct tensors:

    norm1              attn1.to_q, to_k, to_v    (self-attention over all frames)
    heads              attn1.to_out.0
    norm2              attn2.to_q                (cross-attention)
    the text           attn2.to_k, to_v          projected once: the very same tensor in all blocks of the model
    heads              attn2.to_out.0
    norm3              ffn.net.0.proj
    neurons            ffn.net.2

Queries and keys are normalised over all heads at once, so a head that goes would change the others: only neurons are
removed. Scales, shifts and gates of all blocks come from one projection of the timestep; a block adds a table of its
own.

Latents have an axis of frames, (b, channels, frames, h, w). There are FRAMES of them, which is what the pipeline's call
draws, where nothing else is said.

Known are the pipelines that make a film of a text: those of Wan 2.1 and 2.2, of which A14B has two denoisers that take
turns (turns.py), and TI2V 5B tells its denoiser a timestep for each token, which without a picture are all the same:
here it is told one. Those that are also told a picture are refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from obsdiff.families import layers, parts, reading
from obsdiff.families.rotations import rotated
from obsdiff.groups import Group, LinearSpec, ToldGate, Write
from obsdiff_export.component import Component
from obsdiff_runtime.errors import ModelError

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

_TEXT: Final = "encoder_hidden_states"
_PIXELS: Final = (480, 832)  # that the pipeline draws


def linears(denoiser: nn.Module) -> tuple[LinearSpec, ...]:
    """See `Family.linears`. Tiers: attn1 in, attn1 out, attn2 in, attn2 out, into the neurons, out of them."""
    blocks = ((block, prefix, _INPUTS) for block, prefix in enumerate(_blocks(denoiser)))
    return layers.of_blocks(denoiser, blocks, _writes, common=(_TEXT,))


def output(denoiser: nn.Module) -> LinearSpec | None:
    """See `Family.output`."""
    return layers.output(denoiser, "proj_out", blocks=sum(1 for _ in _blocks(denoiser)))


def groups(denoiser: nn.Module) -> tuple[Group, ...]:
    """See `Family.groups`: neurons alone."""
    blocks = enumerate(_blocks(denoiser))
    return tuple(layers.neurons(denoiser, f"{prefix}.ffn", block=block) for block, prefix in blocks)


def tokens(
    config: Mapping[str, Any], *, height: int, width: int, text_tokens: int, vae_scale: int = 8
) -> dict[str, int]:
    """See `Family.tokens`: "image", one token per patch of all FRAMES of the latents, and "text"."""
    frames, rows, columns = config["patch_size"]
    image = (FRAMES // frames) * (height // vae_scale // rows) * (width // vae_scale // columns)
    return {"image": image, "text": text_tokens}


def text_tokens(configs: Mapping[str, Mapping[str, Any]], max_sequence_length: int | None) -> int:
    """See `Family.text_tokens`: UMT5's, padded."""
    return TEXT_TOKENS if max_sequence_length is None else max_sequence_length


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
    with torch.no_grad():
        given, without = pipeline.encode_prompt(
            prompt=list(prompts),
            negative_prompt=list(negative),
            do_classifier_free_guidance=bool(negative),
            max_sequence_length=text_tokens({}, max_sequence_length),
        )
    return {"prompt_embeds": given} | ({} if without is None else {"negative_prompt_embeds": without})


def example(
    denoiser: nn.Module, *, batch: int, size: tuple[int, ...], text_tokens: int, pixels: tuple[int, int]
) -> dict[str, Tensor]:
    """See `Family.example`; a film has FRAMES latent frames where `size` says none."""
    config: Any = denoiser.config
    dtype: Any = denoiser.dtype
    size = size if len(size) == 3 else (FRAMES, *size)
    return {
        "hidden_states": parts.noise(batch, config.in_channels, *size, dtype=dtype),
        "encoder_hidden_states": parts.noise(batch, text_tokens, config.text_dim, dtype=dtype),
        "timestep": parts.timesteps(batch, dtype=dtype),
    }


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """See `Family.arguments`."""
    return dict(inputs)


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
        super().__init__(parts.view(source, blocks=parts.view(source.blocks, **blocks)))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        velocity: Tensor = self.source(hidden_states, timestep, encoder_hidden_states, return_dict=False)[0]
        return velocity


def component(denoiser: nn.Module, *, height: int, width: int, vae_scale: int = 8) -> Component:
    """See `Family.component`."""
    config: Any = denoiser.config
    _refuse_pictures(denoiser)
    sizes = parts.latent_sizes(height, width, vae_scale=vae_scale, multiple=config.patch_size[-1])
    return parts.denoiser_component(
        _Flat(denoiser),
        example,
        name="transformer",
        output="out_hidden_states",
        latents="hidden_states",
        sizes=[(frames, *size) for frames, size in zip((FRAMES, 5, 1), sizes, strict=True)],
        pixels=(height, width),
    )


_INPUTS: Final[layers.Inputs] = (
    (0, "norm1", "image", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    (1, "attn1.to_out.0", "image", ("attn1.to_out.0",)),
    (2, "norm2", "image", ("attn2.to_q",)),
    (2, _TEXT, "text", ("attn2.to_k", "attn2.to_v")),
    (3, "attn2.to_out.0", "image", ("attn2.to_out.0",)),
    (4, "norm3", "image", ("ffn.net.0.proj",)),
    (5, "ffn.net.2", "image", ("ffn.net.2",)),
)


def _blocks(denoiser: nn.Module) -> Iterator[str]:
    _refuse_pictures(denoiser)
    for child, block in denoiser.get_submodule("blocks").named_children():
        for attention in ("attn1", "attn2"):
            layers.require_unfused(block.get_submodule(attention), f"blocks.{child}.{attention}")
        yield f"blocks.{child}"


def _refuse_pictures(denoiser: nn.Module) -> None:
    config: Any = denoiser.config
    if (
        config.image_dim
        or config.added_kv_proj_dim
        or config.in_channels != (config.out_channels or config.in_channels)
    ):
        raise ModelError(
            "this WanTransformer3DModel is told a picture beside the text (image to video), and obsdiff knows only "
            "those that make a film of a text"
        )


def _writes(prefix: str, linear: str) -> Write | None:
    """The gates are the third and the sixth row of shift, scale, gate of the self-attention and of the feed-forward."""
    match linear:
        case "attn1.to_out.0":
            return Write(stream=f"{prefix}.norm1", gate=_gate(prefix, 2))
        case "attn2.to_out.0":
            return Write(stream=f"{prefix}.norm2")
        case "ffn.net.2":
            return Write(stream=f"{prefix}.norm3", gate=_gate(prefix, 5))
    return None


def _gate(prefix: str, row: int) -> ToldGate:
    return ToldGate(block=prefix, told="temb", row=row, table="scale_shift_table")
