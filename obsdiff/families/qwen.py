"""Qwen-Image: `QwenImageTransformer2DModel`, joint blocks of an image and a text stream.

A block reads eight distinct tensors:

    img_norm1, modulated   attn.to_q, to_k, to_v
    txt_norm1, modulated   attn.add_q_proj, add_k_proj, add_v_proj
    heads, image part      attn.to_out.0
    heads, text part       attn.to_add_out
    img_norm2, modulated   img_mlp.net.0.proj
    txt_norm2, modulated   txt_mlp.net.0.proj
    neurons, image         img_mlp.net.2
    neurons, text          txt_mlp.net.2

What the last block makes of the text is read by no one, so its attn.to_add_out and txt_mlp are in no graph and are left
as they are, and with them the heads of that block, which attn.to_add_out reads too.

Outside of this module the denoiser takes latents (b, channels, h, w) and the scheduler's timesteps, as FLUX's does:
packing 2 x 2 latent pixels into a token, the tokens' places and the timestep's unit are part of the graph. diffusers
rotates queries and keys as complex numbers, which ONNX has none of; the graph rotates them as pairs.

Text has the length of its prompt. Here it is padded to one length for all prompts, and the denoiser is told where.

Guidance is diffusers' true_cfg_scale, with the length of what the prompt alone gives.

Qwen-Image-Edit is the same denoiser told pictures; see references.py. That of 2511 (zero_cond_t) modulates their tokens
as at timestep 0: its img_mod gives twice as many rows, those of the told timesteps first. What is told still more
(Layered, a distilled guidance) is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import pad

from obsdiff.families import layers, parts, reading, references
from obsdiff.families.rotations import Places, rotating
from obsdiff.groups import ChunkGate, Group, LinearSpec, Write
from obsdiff_export.component import Component
from obsdiff_runtime.errors import ModelError
from obsdiff_runtime.kinds import PACKED as PATCH
from obsdiff_runtime.references import PLACES, STATES

name: str = "qwen"
denoiser: str = "transformer"
classes: tuple[str, ...] = ("QwenImageTransformer2DModel",)
pipeline: str = "QwenImagePipeline"
protect: tuple[int, int] = (1, 1)
vae_scale: int = parts.VAE_SCALE
negatives: bool = True
negative_first: bool = True
described: bool = True
text_mask: str | None = "encoder_hidden_states_mask"

_TIMESTEPS: Final = 1000
"""The denoiser is told timesteps as shares of so many."""

_TEXT_TOKENS: Final = 512
_SAMPLE_SIZE: Final = 128
_OPTIONS: Final = ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope")


def linears(denoiser: nn.Module) -> tuple[LinearSpec, ...]:
    """See `Family.linears`. Tiers: into the heads, out of them, into the neurons, out of them."""
    blocks = ((block, prefix, inputs) for block, (prefix, inputs) in enumerate(_blocks(denoiser)))
    return layers.of_blocks(denoiser, blocks, _writes)


def groups(denoiser: nn.Module) -> tuple[Group, ...]:
    """See `Family.groups`."""
    found: list[Group] = []
    for block, (prefix, inputs) in enumerate(_blocks(denoiser)):
        if inputs is _INPUTS:
            found.append(layers.heads(denoiser, f"{prefix}.attn", block=block))
        feeds = ("img_mlp", "txt_mlp") if inputs is _INPUTS else ("img_mlp",)
        found += [layers.neurons(denoiser, f"{prefix}.{feed}", block=block) for feed in feeds]
    return tuple(found)


def tokens(
    config: Mapping[str, Any], *, height: int, width: int, text_tokens: int, vae_scale: int = 8
) -> dict[str, int]:
    """See `Family.tokens`: "image", one token per 2 x 2 latent pixels, and "text"."""
    image = (height // vae_scale // PATCH) * (width // vae_scale // PATCH)
    return {"image": image, "text": text_tokens}


def text_tokens(configs: Mapping[str, Mapping[str, Any]], max_sequence_length: int | None) -> int:
    """See `Family.text_tokens`: of editors with a square picture among them."""
    told = references.of(str(configs.get("model_index", {}).get("_class_name")))
    length = _TEXT_TOKENS if max_sequence_length is None else max_sequence_length
    return length + (0 if told is None else told.seen_tokens(1, 1))


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
    """See `Family.encode`: Qwen2.5-VL's embeddings (n, text tokens, width), and which are text, (n, text tokens).

    Both are padded with zeros to max_sequence_length.

    Raises:
        ModelError: as `Family.encode`.
    """
    reading.need(pipeline, "text_encoder", "tokenizer")
    length, found = text_tokens({}, max_sequence_length), {}
    for prefix, texts in (("", prompts), ("negative_", negative)):
        if not texts:
            continue
        with torch.no_grad():
            embeds, mask = pipeline.encode_prompt(list(texts), max_sequence_length=length)
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device) if mask is None else mask
        found[f"{prefix}prompt_embeds"] = pad(embeds, (0, 0, 0, length - embeds.shape[1]))
        found[f"{prefix}prompt_embeds_mask"] = pad(mask, (0, length - mask.shape[1]))
    return found


def example(
    denoiser: nn.Module, *, batch: int, size: tuple[int, ...], text_tokens: int, pixels: tuple[int, int]
) -> dict[str, Tensor]:
    """See `Family.example`."""
    config: Any = denoiser.config
    dtype: Any = denoiser.dtype
    return {
        "hidden_states": parts.noise(batch, config.in_channels // PATCH**2, *size, dtype=dtype),
        "encoder_hidden_states": parts.noise(batch, text_tokens, config.joint_attention_dim, dtype=dtype),
        "encoder_hidden_states_mask": parts.padded(batch, text_tokens, dtype=dtype),
        "timestep": parts.timesteps(batch, dtype=dtype),
    }


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """See `Family.arguments`: latents as tokens, their rows and columns, and the timestep in the denoiser's unit."""
    shape, tokens = _tokens(inputs["hidden_states"])
    shapes = [(1, *shape)]
    if STATES in inputs:
        tokens = torch.cat([tokens, inputs[STATES]], dim=1)
        shapes += _shapes(inputs[PLACES])
    return {
        **{name: value for name, value in inputs.items() if name not in (STATES, PLACES)},
        "hidden_states": tokens,
        "timestep": inputs["timestep"] / _TIMESTEPS,
        "img_shapes": [shapes],  # of all rows
    }


def _tokens(latents: Tensor) -> tuple[tuple[int, int], Tensor]:
    """Rows and columns of the tokens of latents (b, channels, h, w), and these, (b, tokens, channels * 4)."""
    shape = latents.shape[-2] // PATCH, latents.shape[-1] // PATCH
    return shape, parts.packed(latents)


def _shapes(places: Tensor) -> list[tuple[int, int, int]]:
    """1, rows and columns of the pictures whose tokens have these places, (tokens, 3)."""
    pictures = (places[places[:, 0] == index] for index in torch.unique(places[:, 0]))
    return [(1, len(torch.unique(own[:, 1])), len(torch.unique(own[:, 2]))) for own in pictures]


class _Flat(parts.Flat):
    """The transformer, without options; (b, channels, h, w) to the same."""

    def __init__(self, source: Any) -> None:
        stage = source.transformer_blocks
        blocks = {child: parts.view(block, attn=rotating(block.attn)) for child, block in stage.named_children()}
        places = Places(source.pos_embed)
        super().__init__(parts.view(source, transformer_blocks=parts.view(stage, **blocks), pos_embed=places))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        timestep: Tensor,
        reference_states: Tensor | None = None,
        reference_places: Tensor | None = None,
    ) -> Tensor:
        model, ((rows, columns), tokens) = self.source, _tokens(hidden_states)
        drawn = tokens
        if reference_states is not None:
            tokens = torch.cat([tokens, reference_states], dim=1)
        image, text = model.img_in(tokens), model.txt_in(model.txt_norm(encoder_hidden_states))
        times, which = timestep / _TIMESTEPS, None
        if model.zero_cond_t:
            times = torch.cat([times, torch.zeros_like(times)])
            which = torch.arange(tokens.shape[1], device=tokens.device) >= drawn.shape[1]
            which = which.expand(tokens.shape[:2]).int()
        time = model.time_text_embed(times, image)
        places = model.pos_embed(rows, columns, text.shape[1], tokens.device, reference_places)
        told = {"text_mask": encoder_hidden_states_mask.bool()}  # diffusers counts its tokens: no graph of any length
        for block in model.transformer_blocks:
            text, image = block(image, text, None, time, places, told, which)
        time = time.chunk(2)[0] if model.zero_cond_t else time
        found = model.proj_out(model.norm_out(image[:, : drawn.shape[1]], time))  # (b, tokens, channels * 4)
        return parts.unpacked(found, *hidden_states.shape[-2:])


def component(denoiser: nn.Module, *, height: int, width: int, vae_scale: int = 8) -> Component:
    """See `Family.component`."""
    _refuse_options(denoiser)
    return parts.denoiser_component(
        _Flat(denoiser),
        example,
        name="transformer",
        output="out_hidden_states",
        latents="hidden_states",
        sizes=parts.latent_sizes(height, width, vae_scale=vae_scale, multiple=PATCH),
        pixels=(height, width),
        text=("encoder_hidden_states", "encoder_hidden_states_mask"),
    )


_INPUTS: Final[layers.Inputs] = (
    (0, "img_norm1", "image", ("attn.to_q", "attn.to_k", "attn.to_v")),
    (0, "txt_norm1", "text", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    (1, "attn.to_out.0", "image", ("attn.to_out.0",)),
    (1, "attn.to_add_out", "text", ("attn.to_add_out",)),
    (2, "img_norm2", "image", ("img_mlp.net.0.proj",)),
    (2, "txt_norm2", "text", ("txt_mlp.net.0.proj",)),
    (3, "img_mlp.net.2", "image", ("img_mlp.net.2",)),
    (3, "txt_mlp.net.2", "text", ("txt_mlp.net.2",)),
)
_LAST: Final[layers.Inputs] = tuple(
    each for each in _INPUTS if not each[1].startswith(("attn.to_add_out", "txt_norm2", "txt_mlp"))
)


def _blocks(denoiser: nn.Module) -> Iterator[tuple[str, layers.Inputs]]:
    """Name and inputs of each block, in forward order."""
    _refuse_options(denoiser)
    blocks = [child for child, _ in denoiser.get_submodule("transformer_blocks").named_children()]
    for child in blocks:
        yield f"transformer_blocks.{child}", _LAST if child == blocks[-1] else _INPUTS


def _refuse_options(denoiser: nn.Module) -> None:
    config: Any = denoiser.config
    asked = [option for option in _OPTIONS if config.get(option)]
    if asked:
        raise ModelError(
            f"this QwenImageTransformer2DModel has {asked[0]}, which those of Qwen-Image and Qwen-Image-Edit have not, "
            "and obsdiff knows these"
        )


def _writes(prefix: str, linear: str) -> Write | None:
    """The gates are the third and the sixth part of what each stream's modulation gives."""
    places = {"attn.to_out.0": ("img", 1), "attn.to_add_out": ("txt", 1), "img_mlp.net.2": ("img", 2)}
    place = (places | {"txt_mlp.net.2": ("txt", 2)}).get(linear)
    if place is None:
        return None
    stream, norm = place
    told = "modulate_index" if stream == "img" else None
    gate = ChunkGate(module=f"{prefix}.{stream}_mod", chunks=6, chunk=3 * norm - 1, told=told)
    return Write(stream=f"{prefix}.{stream}_norm{norm}", gate=gate)
