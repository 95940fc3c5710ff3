"""Chroma: `ChromaTransformer2DModel`, FLUX.1's blocks, modulated by one network for all of them, and guided.

Its linears and groups are those of flux.py. `distilled_guidance_layer` makes the scales, shifts and gates of all
blocks, each of the timestep and its own number: norms hold no linears, and there is no pooled text. It draws by
classifier-free guidance, in two calls.

T5 is told what is padding, and the denoiser is, too: it looks at a text and one token more. diffusers 0.42 has that
mask as numbers, and attention adds them to its scores (1 where both tokens are text or image, else 0), so that padding
is looked at; told booleans, as obsdiff does, it is left out, as the model was trained
(https://github.com/huggingface/diffusers/issues/12116).

Outside of this module the denoiser takes latents (b, channels, h, w), the scheduler's timesteps and the text's mask, as
others do.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from obsdiff.families import flux, parts, reading
from obsdiff_export.component import Component
from obsdiff_runtime.kinds import PACKED as PATCH

_MASK: Final = "attention_mask"  # the denoiser's, of text and image
_TEXT_MASK: Final = "encoder_attention_mask"

name: str = "chroma"
denoiser: str = "transformer"
classes: tuple[str, ...] = ("ChromaTransformer2DModel",)
pipeline: str = "ChromaPipeline"
protect: tuple[int, int] = flux.protect
vae_scale: int = flux.vae_scale
negatives: bool = True
negative_first: bool = True
described: bool = True
text_mask: str | None = _MASK

linears = flux.linears
groups = flux.groups
tokens = flux.tokens
text_tokens = flux.text_tokens
latent_size = flux.latent_size


def encode(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    negative: Sequence[str],
    *,
    max_sequence_length: int | None = None,
) -> dict[str, Tensor]:
    """See `Family.encode`: T5's embeddings (n, text tokens, width), and which the denoiser looks at, (n, text tokens).

    Raises:
        ModelError: as `Family.encode`.
    """
    reading.need(pipeline, "text_encoder", "tokenizer")
    limit = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    found = dict[str, Tensor]()
    for prefix, texts in (("", prompts), ("negative_", negative)):
        if not texts:
            continue
        with torch.no_grad():
            embeds, _, mask, *_ = pipeline.encode_prompt(list(texts), do_classifier_free_guidance=False, **limit)
        found |= {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_attention_mask": mask.bool()}
    return found


def example(
    denoiser: nn.Module, *, batch: int, size: tuple[int, ...], text_tokens: int, pixels: tuple[int, int]
) -> dict[str, Tensor]:
    """See `Family.example`."""
    config: Any = denoiser.config
    inputs = parts.masked_example(denoiser, batch, size, text_tokens, config.joint_attention_dim)
    channels = config.in_channels // PATCH**2
    return {**inputs, "hidden_states": parts.noise(batch, channels, *size, dtype=inputs["timestep"].dtype)}


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """See `Family.arguments`: as FLUX.1's, and what is looked at, (b, text and image tokens)."""
    told = flux.arguments({name: value for name, value in inputs.items() if name != _TEXT_MASK})
    text = inputs[_TEXT_MASK].bool()
    image = torch.ones_like(told["hidden_states"][..., 0], dtype=torch.bool)
    return {**told, _MASK: torch.cat([text, image], dim=1)}


class _Masked:
    """diffusers' processor, told which tokens are looked at, (b, tokens), bool.

    Those that are not see the others, too: a row of attention without a key is no number in a graph.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        *,
        shown: Tensor,
    ) -> Any:
        attend = FluxAttnProcessor()
        return attend(attn, hidden_states, encoder_hidden_states, shown[:, None, None], image_rotary_emb)


class _Numbered(nn.Module):
    """diffusers' ChromaCombinedTimestepTextProjEmbeddings for any batch: (b,) to (b, modulations, channels)."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self._count, self._channels = source.mod_proj.shape[0], source.time_proj.num_channels

    def forward(self, timestep: Tensor) -> Tensor:
        def waves(values: Tensor, channels: int) -> Tensor:
            found: Tensor = get_timestep_embedding(values, channels, flip_sin_to_cos=True, downscale_freq_shift=0)
            return found.to(timestep.dtype)

        number = torch.arange(self._count, device=timestep.device) * 1000
        numbers = waves(number, 2 * self._channels).expand(timestep.shape[0], -1, -1)
        told = [waves(values, self._channels) for values in (timestep, torch.zeros_like(timestep))]  # no guidance
        return torch.cat([torch.cat(told, dim=1)[:, None].expand(-1, self._count, -1), numbers], dim=-1)


def _masked(block: Any) -> Any:
    attention = parts.view(block.attn)
    attention.processor = _Masked()
    return parts.view(block, attn=attention)


class _Flat(parts.Flat):
    """The transformer, without options; (b, channels, h, w) to the same."""

    def __init__(self, source: Any) -> None:
        stages = {
            stage: parts.view(blocks, **{child: _masked(block) for child, block in blocks.named_children()})
            for stage in ("transformer_blocks", "single_transformer_blocks")
            for blocks in [source.get_submodule(stage)]
        }
        super().__init__(parts.view(source, time_text_embed=_Numbered(source.time_text_embed), **stages))

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor, timestep: Tensor
    ) -> Tensor:
        inputs = {
            "hidden_states": hidden_states,
            "encoder_hidden_states": encoder_hidden_states,
            _TEXT_MASK: encoder_attention_mask,
            "timestep": timestep,
        }
        told = arguments(inputs)
        shown = told.pop(_MASK)
        found = self.source(**told, joint_attention_kwargs={"shown": shown}, return_dict=False)[0]
        return parts.unpacked(found, *hidden_states.shape[-2:])


def component(denoiser: nn.Module, *, height: int, width: int, vae_scale: int = 8) -> Component:
    """See `Family.component`."""
    return parts.denoiser_component(
        _Flat(denoiser),
        example,
        name="transformer",
        output="out_hidden_states",
        latents="hidden_states",
        sizes=parts.latent_sizes(height, width, vae_scale=vae_scale, multiple=PATCH),
        pixels=(height, width),
        text=("encoder_hidden_states", _TEXT_MASK),
    )
