"""Text encoders that look at pictures, as they are exported: Qwen2.5-VL's vision and its language model.

    w         windows of the vision
    s         patches of a window, s / 4 tokens
    v         numbers of a patch
    d         width of a token of the text
    b, l      rows and tokens of the text
    m         tokens of all pictures

What depends on a picture's size alone, the runtime computes; see its seeing.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from obsdiff.families import parts, reading, references
from obsdiff.instead import instead
from obsdiff_export.component import Component
from obsdiff_runtime import seeing

TYPES: Final = "mm_token_type_ids"
"""Argument of the model: 1 where a token stands for a picture."""

_THETA: Final = 10000.0
_SIZES: Final = ((3, 5), (2, 4), (4, 7))
"""Windows of the examples, and tokens of pictures."""


class _Vision(parts.Flat):
    """Patches (w, s, v), their rows and columns (w, s, 2), and 0 where there is none (w, s), to tokens (w, s / 4, d).

    Most layers look at a window each, some at the whole picture.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(reading.only(model, "visual"))

    def forward(self, pixel_values: Tensor, patch_places: Tensor, patch_mask: Tensor) -> Tensor:
        vision = self.source.model.visual
        count, config = pixel_values.shape[1], vision.config
        states = linear(pixel_values, vision.patch_embed.proj.weight.flatten(1))  # a convolution of patches of its size
        half = config.hidden_size // config.num_heads // 2
        steps = torch.arange(0, half, 2, dtype=torch.float32, device=pixel_values.device) / half
        angles = (
            (patch_places[..., None] * _THETA**-steps).flatten(2).repeat(1, 1, 2)[:, :, None]
        )  # (w, s, 1, half * 2)
        waves, shown = (angles.cos(), angles.sin()), patch_mask.bool()
        for index, block in enumerate(vision.blocks):
            whole = index in config.fullatt_block_indexes
            states = states + _attention(block.attn, block.norm1(states), waves, shown, whole=whole)
            states = states + block.mlp(block.norm2(states))
        merged: Tensor = vision.merger(states)
        return merged.view(-1, count // config.spatial_merge_size**2, config.out_hidden_size)


def _attention(module: Any, states: Tensor, waves: tuple[Tensor, Tensor], shown: Tensor, *, whole: bool) -> Tensor:
    """Attention within each window, (w, s, width), or over all of them."""
    query, key, value = module.qkv(states).unflatten(-1, (3, module.num_heads, -1)).unbind(2)  # (w, s, heads, size)
    query, key = (_turned(each, *waves) for each in (query, key))
    if whole:
        query, key, value = (each.flatten(0, 1)[None] for each in (query, key, value))
        shown = shown.flatten()[None]
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    found = scaled_dot_product_attention(query, key, value, attn_mask=shown[:, None, None]).transpose(1, 2)
    result: Tensor = module.proj(found.reshape(states.shape))
    return result


def _turned(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """(w, s, heads, size), each channel of its first half turned with one of its second."""
    wide = heads.float()
    one, other = wide.chunk(2, dim=-1)
    return (wide * cosines + torch.cat([-other, one], dim=-1) * sines).to(heads.dtype)


class _Language(parts.Flat):
    """Text (b, l) among tokens of pictures to the language model's last hidden state, (b, l, d).

    `picture_places`, (b, l), are 0 for words, and i for the i-th of `picture_states`, (m, d).
    """

    def __init__(self, model: Any) -> None:
        super().__init__(reading.only(model, "language_model"))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        picture_places: Tensor,
        picture_states: Tensor,
    ) -> Tensor:
        model = self.source.model.language_model
        words = model.embed_tokens(input_ids)
        pictures = torch.cat([torch.zeros_like(picture_states[:1]), picture_states])[picture_places]
        states = torch.where((picture_places > 0)[..., None], pictures, words)
        found = model(inputs_embeds=states, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
        last: Tensor = found.last_hidden_state
        return last


def components(pipeline: DiffusionPipeline, encoders: Sequence[Component]) -> list[Component]:
    """The text encoders of a pipeline, one of which may look at pictures: then behind its vision."""
    told = references.of(type(pipeline).__name__)
    if told is None or told.seen is None or not encoders:
        return list(encoders)
    reading.need(pipeline, "processor")
    untyped: Any = pipeline
    (encoder,) = encoders
    return [_vision(untyped.text_encoder, untyped.processor.image_processor), _language(encoder, untyped.text_encoder)]


def _vision(model: Any, processor: Any) -> Component:
    config = model.config.vision_config
    merge = config.spatial_merge_size
    count = (config.window_size // config.patch_size) ** 2
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    dtype = model.dtype
    examples = []
    for windows, missing in _SIZES:
        shown = torch.ones(windows, count // merge**2, dtype=torch.int64)
        shown[-1, missing:] = 0  # a window at the edge has few tokens, here fewer than it can
        places = torch.arange(windows * count)[:, None] // torch.tensor([count // 2, 1]) % 16
        examples.append(
            {
                seeing.PATCHES: parts.noise(windows, count, width, dtype=dtype),
                seeing.PATCH_PLACES: places.view(windows, count, 2),
                seeing.PATCH_MASK: shown.repeat_interleave(merge**2, dim=1),
            }
        )
    size = processor.size
    return Component(
        name=seeing.VISION,
        module=_Vision(model),
        inputs=examples[0],
        dynamic_axes={key: {0: seeing.WINDOWS} for key in examples[0]},
        outputs=(seeing.STATES,),
        config={
            **parts.config_of(config),
            "image_mean": list(processor.image_mean),
            "image_std": list(processor.image_std),
            "min_pixels": size["shortest_edge"],
            "max_pixels": size["longest_edge"],
        },
        more_inputs=tuple(examples[1:]),
    )


def _language(encoder: Component, model: Any) -> Component:
    examples = []
    for inputs, (_, tokens) in zip((encoder.inputs, *encoder.more_inputs), _SIZES, strict=True):
        rows, length = inputs["input_ids"].shape
        places = (torch.arange(length) - 1).clamp(0)
        positions = torch.stack([torch.arange(length) // step for step in (3, 2, 1)])
        examples.append(
            {
                **inputs,
                seeing.POSITIONS: positions[:, None].expand(3, rows, length).contiguous(),
                seeing.PLACES: (places * (places <= tokens)).expand(rows, length).contiguous(),
                seeing.STATES: parts.noise(tokens, model.config.text_config.hidden_size, dtype=model.dtype),
            }
        )
    return replace(
        encoder,
        module=_Language(model),
        inputs=examples[0],
        dynamic_axes={
            **encoder.dynamic_axes,
            seeing.POSITIONS: {1: "batch", 2: "sequence"},
            seeing.PLACES: {0: "batch", 1: "sequence"},
            seeing.STATES: {0: seeing.TOKENS},
        },
        more_inputs=tuple(examples[1:]),
    )


@contextmanager
def looking(pipeline: DiffusionPipeline, pictures: Sequence[Image]) -> Iterator[None]:
    """The pipeline encodes prompts beside pictures, until the block ends.

    Its text encoder is told which tokens stand for them: transformers 5 places these in rows and columns only then, as
    the model was trained, and diffusers does not tell it.
    """
    untyped: Any = pipeline
    model: Any = untyped.text_encoder

    def tell(_: nn.Module, args: tuple[Any, ...], told: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {TYPES: (told["input_ids"] == model.config.image_token_id).int(), **told}

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(tell, with_kwargs=True).remove)
        encode = partial(untyped.encode_prompt, image=list(pictures))
        stack.enter_context(instead(pipeline, "encode_prompt", encode))
        yield
