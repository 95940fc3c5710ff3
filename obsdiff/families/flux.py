"""FLUX.1: `FluxTransformer2DModel`, joint blocks of an image and a text stream, then blocks over both as one sequence.

A joint block ("double") reads eight distinct tensors, as SD3's:

    norm1(image)       attn.to_q, to_k, to_v
    norm1(text)        attn.add_q_proj, add_k_proj, add_v_proj
    heads, image part  attn.to_out.0
    heads, text part   attn.to_add_out
    norm2(image)       ff.net.0.proj
    norm2(text)        ff_context.net.0.proj
    neurons, image     ff.net.2
    neurons, text      ff_context.net.2

A block behind them ("single") reads two, attention and feed-forward side by side:

    norm(text, image)  proj_mlp, attn.to_q, to_k, to_v
    heads | neurons    proj_out

Outside of this module the denoiser takes latents (b, channels, h, w) and the scheduler's timesteps, as the others do:
packing 2 x 2 latent pixels into a token, the tokens' places and the timestep's unit are part of the graph. Its guidance
is distilled: it is told the scale. True guidance, by a negative prompt and diffusers' true_cfg_scale, is left out.
FLUX.1 Kontext is the same denoiser told a picture; see references.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff.families import layers, parts, reading, references
from obsdiff.groups import Consumer, Group, LinearSpec, Producer, Size, Write
from obsdiff_export.component import Component
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.kinds import PACKED as PATCH

name: str = "flux"
denoiser: str = "transformer"
classes: tuple[str, ...] = ("FluxTransformer2DModel",)
pipeline: str = "FluxPipeline"
protect: tuple[int, int] = (1, 1)
vae_scale: int = parts.VAE_SCALE
negatives: bool = False
negative_first: bool = True
described: bool = True
text_mask: str | None = None

_TIMESTEPS: Final = 1000
"""The denoiser is told timesteps as shares of so many."""

_T5_TOKENS: Final = 512
_SAMPLE_SIZE: Final = 128


def linears(denoiser: nn.Module) -> tuple[LinearSpec, ...]:
    """See `Family.linears`. Tiers: into the heads, out of them, into the neurons, out of them; of single blocks two."""
    blocks = ((block, prefix, inputs) for block, (prefix, inputs) in enumerate(_blocks(denoiser)))
    return layers.of_blocks(denoiser, blocks, _writes)


def groups(denoiser: nn.Module) -> tuple[Group, ...]:
    """See `Family.groups`."""
    found: list[Group] = []
    for block, (prefix, inputs) in enumerate(_blocks(denoiser)):
        if inputs is _SINGLE:
            found += _parallel(denoiser, prefix, block)
        else:
            found.append(layers.heads(denoiser, f"{prefix}.attn", block=block))
            found += [layers.neurons(denoiser, f"{prefix}.{feed}", block=block) for feed in ("ff", "ff_context")]
    return tuple(found)


def tokens(
    config: Mapping[str, Any], *, height: int, width: int, text_tokens: int, vae_scale: int = 8
) -> dict[str, int]:
    """See `Family.tokens`: "image", one token per 2 x 2 latent pixels, "text", and "joint", one behind the other."""
    image = (height // vae_scale // PATCH) * (width // vae_scale // PATCH)
    return {"image": image, "text": text_tokens, "joint": text_tokens + image}


def text_tokens(configs: Mapping[str, Mapping[str, Any]], max_sequence_length: int | None) -> int:
    """See `Family.text_tokens`: T5's; of CLIP only the pooled text is read."""
    return _T5_TOKENS if max_sequence_length is None else max_sequence_length


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
    """See `Family.encode`: T5's embeddings (n, text tokens, width) and CLIP's pooled ones (n, width).

    Raises:
        ConfigError: negative prompts are given.
    """
    if negative:
        raise ConfigError(
            "FLUX takes no negative prompts here: its guidance is distilled, and true guidance (diffusers' "
            "true_cfg_scale) is not supported"
        )
    reading.need(pipeline, "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    limit = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    with torch.no_grad():
        embeds, pooled, _ = pipeline.encode_prompt(list(prompts), None, **limit)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def example(
    denoiser: nn.Module, *, batch: int, size: tuple[int, ...], text_tokens: int, pixels: tuple[int, int]
) -> dict[str, Tensor]:
    """See `Family.example`."""
    config: Any = denoiser.config
    dtype: Any = denoiser.dtype
    inputs = {
        "hidden_states": parts.noise(batch, config.in_channels // PATCH**2, *size, dtype=dtype),
        "encoder_hidden_states": parts.noise(batch, text_tokens, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": parts.noise(batch, config.pooled_projection_dim, dtype=dtype),
        "timestep": parts.timesteps(batch, dtype=dtype),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.linspace(3.5, 1.5, batch).to(dtype)
    return inputs


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """See `Family.arguments`: latents as tokens, their places, and the timestep in the denoiser's unit."""
    latents, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
    rows, columns = latents.shape[-2] // PATCH, latents.shape[-1] // PATCH
    return {
        **references.joined(inputs, parts.packed(latents), _places(rows, columns, latents.device)),
        "timestep": inputs["timestep"] / _TIMESTEPS,
        "txt_ids": torch.zeros(text.shape[1], 3, device=text.device),
    }


class _Flat(parts.Flat):
    """The transformer, without options; (b, channels, h, w) to the same."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
        reference_states: Tensor | None = None,
        reference_places: Tensor | None = None,
        fill_states: Tensor | None = None,
    ) -> Tensor:
        inputs = references.given(
            hidden_states=parts.beside(hidden_states, fill_states),
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            reference_states=reference_states,
            reference_places=reference_places,
        )
        found = self.source(**arguments(inputs), guidance=guidance, return_dict=False)[0]  # (b, tokens, channels * 4)
        if reference_states is not None:
            rows, columns = hidden_states.shape[-2] // PATCH, hidden_states.shape[-1] // PATCH
            found = found[:, : rows * columns]
        return parts.unpacked(found, *hidden_states.shape[-2:])


def component(denoiser: nn.Module, *, height: int, width: int, vae_scale: int = 8) -> Component:
    """See `Family.component`; what was distilled with guidance also reads `guidance`, its scale."""
    return parts.denoiser_component(
        _Flat(denoiser),
        example,
        name="transformer",
        output="out_hidden_states",
        latents="hidden_states",
        sizes=parts.latent_sizes(height, width, vae_scale=vae_scale, multiple=PATCH),
        pixels=(height, width),
    )


def _places(rows: int, columns: int, device: torch.device) -> Tensor:
    """(tokens, 3): 0, row and column of each token of the image."""
    row = torch.arange(rows, device=device, dtype=torch.float32)[:, None].expand(rows, columns)
    column = torch.arange(columns, device=device, dtype=torch.float32)[None].expand(rows, columns)
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)


_DOUBLE: Final[layers.Inputs] = (
    (0, "norm1", "image", ("attn.to_q", "attn.to_k", "attn.to_v")),
    (0, "norm1_context", "text", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    (1, "attn.to_out.0", "image", ("attn.to_out.0",)),
    (1, "attn.to_add_out", "text", ("attn.to_add_out",)),
    (2, "norm2", "image", ("ff.net.0.proj",)),
    (2, "norm2_context", "text", ("ff_context.net.0.proj",)),
    (3, "ff.net.2", "image", ("ff.net.2",)),
    (3, "ff_context.net.2", "text", ("ff_context.net.2",)),
)
_SINGLE: Final[layers.Inputs] = (
    (0, "norm", "joint", ("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v")),
    (1, "proj_out", "joint", ("proj_out",)),
)


def _blocks(denoiser: nn.Module) -> Iterator[tuple[str, layers.Inputs]]:
    """Name and inputs of each block, in forward order."""
    return layers.in_stages(denoiser, {"transformer_blocks": _DOUBLE, "single_transformer_blocks": _SINGLE})


def _parallel(denoiser: nn.Module, prefix: str, block: int) -> tuple[Group, Group]:
    """The heads and the neurons of a block whose last projection reads both, the heads first."""
    into, out = f"{prefix}.proj_mlp", f"{prefix}.proj_out"
    units = layers.size(denoiser.get_submodule(into), "out_features")
    start = layers.size(denoiser.get_submodule(out), "in_features") - units
    count = layers.size(denoiser.get_submodule(f"{prefix}.attn"), "heads")
    split = "_tp_packed_row_blocks"  # how many columns of proj_out are heads and neurons, for tensor parallelism
    splits = hasattr(denoiser.get_submodule(out), split)  # not Chroma's
    heads = layers.heads(
        denoiser,
        f"{prefix}.attn",
        block=block,
        consumers=(Consumer(name=out),),
        sizes=(Size(module=out, attribute=split, index=0, factor=start // count),) if splits else (),
    )
    neurons = layers.neurons_between(
        f"{prefix}.mlp",
        (Producer(name=into),),
        Consumer(name=out, start=start),
        units=units,
        block=block,
        sizes=(
            Size(module=prefix, attribute="mlp_hidden_dim"),
            *((Size(module=out, attribute=split, index=1),) if splits else ()),
        ),
    )
    return heads, neurons


def _writes(prefix: str, linear: str) -> Write | None:
    """The gates: of joint blocks the second and the fifth thing that the first norm gives, else the norm's second."""
    norm1, context, norm = f"{prefix}.norm1", f"{prefix}.norm1_context", f"{prefix}.norm"
    match linear:
        case "attn.to_out.0":
            return Write(stream=norm1, gate=(norm1, 1))
        case "attn.to_add_out":
            return Write(stream=context, gate=(context, 1))
        case "ff.net.2":
            return Write(stream=f"{prefix}.norm2", gate=(norm1, 4))
        case "ff_context.net.2":
            return Write(stream=f"{prefix}.norm2_context", gate=(context, 4))
        case "proj_out":
            return Write(stream=norm, gate=(norm, 1))
    return None
