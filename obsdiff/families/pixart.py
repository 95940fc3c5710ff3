"""PixArt-alpha and PixArt-sigma: `PixArtTransformer2DModel`, a transformer over the image that looks at T5's text.

A block reads seven distinct tensors:

    norm1              attn1.to_q, to_k, to_v    (self-attention)
    heads              attn1.to_out.0
    the stream         attn2.to_q                (cross-attention; there is no norm in front of it)
    the text           attn2.to_k, to_v          projected once: the very same tensor in all blocks of the model
    heads              attn2.to_out.0
    norm2              ff.net.0.proj
    neurons            ff.net.2

Scales, shifts and gates of all blocks come from one projection of the timestep; a block adds a table of its own.

The denoiser as exported gives the predicted noise alone: half of its channels are a variance that no sampler reads.
Text is read as the pipeline does with clean_caption=False (lower case, without spaces at its ends), and a size is drawn
as it is asked for, as with use_resolution_binning=False: diffusers' default draws the nearest size of a table and
scales the picture.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff.families import layers, parts, reading
from obsdiff.families.places import Patches
from obsdiff.groups import Group, LinearSpec
from obsdiff_export.component import Component
from obsdiff_runtime.errors import ModelError

name: str = "pixart"
denoiser: str = "transformer"
classes: tuple[str, ...] = ("PixArtTransformer2DModel", "Transformer2DModel")
"""The second is what alpha's published configurations call the first; DiT's call theirs so, too."""

pipeline: str = "PixArtAlphaPipeline"
protect: tuple[int, int] = (1, 1)
vae_scale: int = parts.VAE_SCALE
negatives: bool = True
negative_first: bool = True
described: bool = True
text_mask: str | None = "encoder_attention_mask"

_TEXT: Final = "encoder_hidden_states"
_TEXT_TOKENS: Final = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
_ADDED: Final = ("resolution", "aspect_ratio")


def linears(denoiser: nn.Module) -> tuple[LinearSpec, ...]:
    """See `Family.linears`. Tiers: attn1 in, attn1 out, attn2 in, attn2 out, into the neurons, out of them."""
    blocks = ((block, prefix, _INPUTS) for block, prefix in enumerate(_blocks(denoiser)))
    return layers.of_blocks(denoiser, blocks, _WRITES, common=(_TEXT,))


def groups(denoiser: nn.Module) -> tuple[Group, ...]:
    """See `Family.groups`."""
    found: list[Group] = []
    for block, prefix in enumerate(_blocks(denoiser)):
        found += [layers.heads(denoiser, f"{prefix}.{attention}", block=block) for attention in ("attn1", "attn2")]
        found.append(layers.neurons(denoiser, f"{prefix}.ff", block=block))
    return tuple(found)


def tokens(
    config: Mapping[str, Any], *, height: int, width: int, text_tokens: int, vae_scale: int = 8
) -> dict[str, int]:
    """See `Family.tokens`: "image", one token per patch of the latents, and "text"."""
    patch = config["patch_size"]
    return {"image": (height // vae_scale // patch) * (width // vae_scale // patch), "text": text_tokens}


def text_tokens(configs: Mapping[str, Mapping[str, Any]], max_sequence_length: int | None) -> int:
    """See `Family.text_tokens`: T5's, of which alpha reads 120 and sigma 300."""
    if max_sequence_length is not None:
        return max_sequence_length
    return _TEXT_TOKENS.get(str(configs.get("model_index", {}).get("_class_name")), _TEXT_TOKENS[pipeline])


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
    """See `Family.encode`: T5's embeddings (n, text tokens, width), and which of them are text, (n, text tokens)."""
    return reading.masked_text(pipeline, prompts, negative, max_sequence_length)


def example(
    denoiser: nn.Module, *, batch: int, size: tuple[int, ...], text_tokens: int, pixels: tuple[int, int]
) -> dict[str, Tensor]:
    """See `Family.example`."""
    config: Any = denoiser.config
    dtype: Any = denoiser.dtype
    text_width = config.caption_channels or config.cross_attention_dim
    inputs = parts.masked_example(denoiser, batch, size, text_tokens, text_width)
    if denoiser.use_additional_conditions:
        height, width = pixels
        inputs["resolution"] = torch.tensor([height, width], dtype=dtype).repeat(batch, 1)
        inputs["aspect_ratio"] = torch.tensor([height / width], dtype=dtype).repeat(batch, 1)
    return inputs


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """See `Family.arguments`: what only alpha at 1024 pixels has goes into `added_cond_kwargs`."""
    plain = {key: value for key, value in inputs.items() if key not in _ADDED}
    return {**plain, "added_cond_kwargs": {key: inputs.get(key) for key in _ADDED}}


class _Flat(parts.Flat):
    """The transformer, without options; (b, channels, h, w) to the same."""

    def __init__(self, source: Any) -> None:
        super().__init__(parts.view(source, pos_embed=Patches(source.pos_embed)))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep: Tensor,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        noise: Tensor = self.source(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            timestep=timestep,
            added_cond_kwargs={"resolution": resolution, "aspect_ratio": aspect_ratio},
            return_dict=False,
        )[0]
        return noise[:, : hidden_states.shape[1]]


def component(denoiser: nn.Module, *, height: int, width: int, vae_scale: int = 8) -> Component:
    """See `Family.component`; alpha's denoiser at 1024 pixels also reads `resolution` and `aspect_ratio`."""
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
    (4, "norm2", "image", ("ff.net.0.proj",)),
    (5, "ff.net.2", "image", ("ff.net.2",)),
)
_WRITES: Final = layers.adaln_single("timestep", out="ff.net.2")


def _blocks(denoiser: nn.Module) -> Iterator[str]:
    for child, module in denoiser.get_submodule("transformer_blocks").named_children():
        if not layers.present(module, "attn2"):
            raise ModelError(
                f"this {type(denoiser).__name__} does not look at a text, so it is no PixArt; no other kind of "
                "Transformer2DModel is known"
            )
        yield f"transformer_blocks.{child}"
