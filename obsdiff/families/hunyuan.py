"""HunyuanDiT: `HunyuanDiT2DModel`, a transformer over the image that looks at two texts, with skips as in a UNet.

A block reads seven distinct tensors, in the second half of the model eight:

    skip_norm          skip_linear               (the stream beside that of a block in the first half)
    norm1              attn1.to_q, to_k, to_v    (self-attention)
    heads              attn1.to_out.0
    norm2              attn2.to_q                (cross-attention)
    the text           attn2.to_k, to_v          the very same tensor in all blocks of the model
    heads              attn2.to_out.0
    norm3              ff.net.0.proj
    neurons            ff.net.2

There are no gates. `skip_linear` does not add to the stream: what it gives is the stream from there on.

The text is a Chinese CLIP's (a BERT), 77 tokens, and mT5's, 256 tokens, one behind the other; where a token is padding
the denoiser puts a learned one in its place, and looks at it. mT5's text is also pooled, with its padding, and goes
with the timestep into norm1.

Outside of this module the denoiser is told no places and no style: they are part of the graph. It gives the predicted
noise alone: half of its channels are a variance that no sampler reads. A size is drawn as it is asked for, as with
use_resolution_binning=False.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff.families import layers, parts, reading
from obsdiff.families.places import rotations
from obsdiff.groups import Group, LinearSpec, Write
from obsdiff_export.component import Component
from obsdiff_runtime.errors import ConfigError

name: str = "hunyuan"
denoiser: str = "transformer"
classes: tuple[str, ...] = ("HunyuanDiT2DModel",)
pipeline: str = "HunyuanDiTPipeline"
protect: tuple[int, int] = (1, 1)
vae_scale: int = parts.VAE_SCALE
negatives: bool = True
negative_first: bool = True
described: bool = True
text_mask: str | None = None

_TEXT: Final = "encoder_hidden_states"
_TRAINED: Final = 64  # latent pixels a side of the image whose places the model learned first: 512 pixels
_ORIGINAL: Final = (1024, 1024)  # pixels; of the picture that the drawn one is told to be made of


def linears(denoiser: nn.Module) -> tuple[LinearSpec, ...]:
    """See `Family.linears`. Tiers: skip, attn1 in, attn1 out, attn2 in, attn2 out, into the neurons, out of them."""
    named = list(_blocks(denoiser))
    blocks = ((block, prefix, inputs) for block, (prefix, inputs) in enumerate(named))
    return tuple(
        replace(linear, since=len(named) - 1 - linear.block) if linear.name.endswith(".skip_linear") else linear
        for linear in layers.of_blocks(denoiser, blocks, _writes, common=(_TEXT,))
    )


def groups(denoiser: nn.Module) -> tuple[Group, ...]:
    """See `Family.groups`."""
    found: list[Group] = []
    for block, (prefix, _) in enumerate(_blocks(denoiser)):
        found += [layers.heads(denoiser, f"{prefix}.{attention}", block=block) for attention in ("attn1", "attn2")]
        found.append(layers.neurons(denoiser, f"{prefix}.ff", block=block))
    return tuple(found)


def tokens(
    config: Mapping[str, Any], *, height: int, width: int, text_tokens: int, vae_scale: int = 8
) -> dict[str, int]:
    """See `Family.tokens`: "image", one token per patch of the latents, and "text", which has always one length."""
    patch = config["patch_size"]
    image = (height // vae_scale // patch) * (width // vae_scale // patch)
    return {"image": image, "text": sum(_lengths(config))}


def text_tokens(configs: Mapping[str, Mapping[str, Any]], max_sequence_length: int | None) -> int:
    """See `Family.text_tokens`: CLIP's and T5's."""
    return sum(_lengths(configs[denoiser]))


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
    """See `Family.encode`: embeddings (n, text tokens, width) of each encoder, and which are text, (n, text tokens).

    Raises:
        ConfigError: max_sequence_length is given; both encoders always read their full lengths.
    """
    if max_sequence_length is not None:
        raise ConfigError(
            "--max-sequence-length: HunyuanDiT has learned how long its text is, 77 tokens and 256; leave it out"
        )
    reading.need(pipeline, "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    names = ("prompt_embeds", "negative_prompt_embeds", "prompt_attention_mask", "negative_prompt_attention_mask")
    found: dict[str, Tensor] = {}
    for encoder, suffix in enumerate(("", "_2")):
        with torch.no_grad():
            encoded = pipeline.encode_prompt(
                prompt=list(prompts),
                negative_prompt=list(negative),
                do_classifier_free_guidance=bool(negative),
                dtype=pipeline.transformer.dtype,
                text_encoder_index=encoder,
            )
        found |= {f"{key}{suffix}": value for key, value in zip(names, encoded, strict=True) if value is not None}
    return found


def example(
    denoiser: nn.Module, *, batch: int, size: tuple[int, ...], text_tokens: int, pixels: tuple[int, int]
) -> dict[str, Tensor]:
    """See `Family.example`; the text has the denoiser's own length."""
    config: Any = denoiser.config
    dtype: Any = denoiser.dtype
    clip, t5 = _lengths(config)
    inputs = {
        "hidden_states": parts.noise(batch, config.in_channels, *size, dtype=dtype),
        "timestep": parts.timesteps(batch, dtype=dtype),
        "encoder_hidden_states": parts.noise(batch, clip, config.cross_attention_dim, dtype=dtype),
        "text_embedding_mask": parts.padded(batch, clip, dtype=dtype),
        "encoder_hidden_states_t5": parts.noise(batch, t5, config.cross_attention_dim_t5, dtype=dtype),
        "text_embedding_mask_t5": parts.padded(batch, t5, dtype=dtype),
    }
    if config.use_style_cond_and_image_meta_size:
        inputs["image_meta_size"] = torch.tensor([*_ORIGINAL, *pixels, 0, 0], dtype=dtype).repeat(batch, 1)
    return inputs


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """See `Family.arguments`: with the one style there is, and without places, which turn queries and keys only."""
    return {**inputs, "style": torch.zeros_like(inputs["timestep"], dtype=torch.int64)}


class _Conditions(parts.Flat):
    """What norms are told of timestep, text and sizes, in the text's dtype: diffusers takes the timestep's."""

    def forward(
        self, timestep: Tensor, text: Tensor, sizes: Tensor | None, style: Tensor, hidden_dtype: torch.dtype
    ) -> Tensor:
        told: Tensor = self.source(timestep, text, sizes, style, hidden_dtype=text.dtype)
        return told


class _Flat(parts.Flat):
    """The transformer, without options; (b, channels, h, w) to the same."""

    def __init__(self, source: Any) -> None:
        view = copy.copy(source)
        view._modules = {**source._modules, "time_extra_emb": _Conditions(source.time_extra_emb)}
        super().__init__(view)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embedding_mask: Tensor,
        encoder_hidden_states_t5: Tensor,
        text_embedding_mask_t5: Tensor,
        image_meta_size: Tensor | None = None,
    ) -> Tensor:
        config = self.source.config
        rows, columns = (side // config.patch_size for side in hidden_states.shape[-2:])
        noise: Tensor = self.source(
            hidden_states,
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            text_embedding_mask=text_embedding_mask,
            encoder_hidden_states_t5=encoder_hidden_states_t5,
            text_embedding_mask_t5=text_embedding_mask_t5,
            image_meta_size=image_meta_size,
            style=torch.zeros_like(timestep, dtype=torch.int64),
            image_rotary_emb=rotations(
                rows,
                columns,
                width=config.attention_head_dim,
                span=_TRAINED // config.patch_size,
                device=hidden_states.device,
            ),
            return_dict=False,
        )[0]
        return noise[:, : hidden_states.shape[1]]


def component(denoiser: nn.Module, *, height: int, width: int, vae_scale: int = 8) -> Component:
    """See `Family.component`; the denoiser of versions up to 1.1 also reads `image_meta_size`."""
    config: Any = denoiser.config
    return parts.denoiser_component(
        _Flat(denoiser),
        example,
        name="transformer",
        output="out_hidden_states",
        latents="hidden_states",
        sizes=parts.latent_sizes(height, width, vae_scale=vae_scale, multiple=config.patch_size),
        pixels=(height, width),
        text=(),
    )


_SKIP: Final[layers.Inputs] = ((0, "skip_norm", "image", ("skip_linear",)),)
_INPUTS: Final[layers.Inputs] = (
    (1, "norm1", "image", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    (2, "attn1.to_out.0", "image", ("attn1.to_out.0",)),
    (3, "norm2", "image", ("attn2.to_q",)),
    (3, _TEXT, "text", ("attn2.to_k", "attn2.to_v")),
    (4, "attn2.to_out.0", "image", ("attn2.to_out.0",)),
    (5, "norm3", "image", ("ff.net.0.proj",)),
    (6, "ff.net.2", "image", ("ff.net.2",)),
)


def _blocks(denoiser: nn.Module) -> Iterator[tuple[str, layers.Inputs]]:
    """Name and inputs of each block, in forward order."""
    for child, module in denoiser.get_submodule("blocks").named_children():
        yield f"blocks.{child}", (*_SKIP, *_INPUTS) if layers.present(module, "skip_linear") else _INPUTS


def _lengths(config: Mapping[str, Any]) -> tuple[int, int]:
    """Text tokens of CLIP and of T5."""
    return int(config["text_len"]), int(config["text_len_t5"])


def _writes(prefix: str, linear: str) -> Write | None:
    norms = {"attn1.to_out.0": "norm1", "attn2.to_out.0": "norm2", "ff.net.2": "norm3"}
    return Write(stream=f"{prefix}.{norms[linear]}") if linear in norms else None
