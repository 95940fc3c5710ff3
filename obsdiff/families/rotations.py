"""Attention for a graph: queries and keys rotated as pairs of numbers, at any size.

diffusers rotates complex numbers, which ONNX has none of, by angles that it keeps for the places it knows. Qwen-Image's
places are those of all rows alike, and its text and image have projections of their own; in Lumina-2 and Z-Image places
differ from row to row, and attention runs over one sequence.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from obsdiff.families import parts

Waves = tuple[Tensor, Tensor]
"""Cosines and sines by which each channel of a head is turned, (b, tokens, 1, size of a head) each."""


class Places(nn.Module):
    """Cosines and sines of the tokens' angles, (tokens, head width / 2) each, text before image.

    An image's rows and columns are counted from its middle, of pictures that the denoiser is told, too. The text goes
    on where the longest of all sides ends, with the same place along all axes. Float32 whatever the model is in.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        steps = (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width for width in source.axes_dim)
        self._frequencies = [(1 / torch.pow(source.theta, step)).tolist() for step in steps]

    def forward(
        self, rows: int, columns: int, text_tokens: int, device: torch.device, told: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`told` are the places of tokens of pictures, (tokens, 3): which one, its row and its column."""

        def places(count: int) -> Tensor:
            return torch.arange(count, dtype=torch.float32, device=device)

        row = (places(rows) - (rows - rows // 2))[:, None].expand(rows, columns)
        column = (places(columns) - (columns - columns // 2))[None].expand(rows, columns)
        grid = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
        grid = grid if told is None else torch.cat([grid, told.float()])
        axes = [torch.tensor(axis, dtype=torch.float32, device=device) for axis in self._frequencies]
        text = (grid[:, 1:].max() + 1 + places(text_tokens))[:, None] * torch.cat(axes)
        image = torch.cat([grid[:, index, None] * axis for index, axis in enumerate(axes)], dim=-1)
        angles = torch.cat([text, image])
        return angles.cos(), angles.sin()


class Pairs:
    """diffusers' processor of these attentions, told where text is padded, (b, text tokens), false for padding."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        text_mask: Tensor,
        encoder_hidden_states_mask: None = None,
        attention_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        image, text = hidden_states, encoder_hidden_states

        def heads(tokens: Tensor) -> Tensor:
            found: Tensor = tokens.unflatten(-1, (attn.heads, -1))  # type: ignore[no-untyped-call]
            return found  # (b, tokens, heads, d)

        texts = attn.norm_added_q(heads(attn.add_q_proj(text))), attn.norm_added_k(heads(attn.add_k_proj(text)))
        images = attn.norm_q(heads(attn.to_q(image))), attn.norm_k(heads(attn.to_k(image)))
        query, key = (rotated(torch.cat(both, dim=1), *image_rotary_emb) for both in zip(texts, images, strict=True))
        value = torch.cat([heads(attn.add_v_proj(text)), heads(attn.to_v(image))], dim=1)
        mask = torch.cat([text_mask, torch.ones_like(image[..., 0], dtype=torch.bool)], dim=1)
        found = scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask[:, None, None]
        )
        joint = found.transpose(1, 2).flatten(2)  # (b, tokens, heads * d)
        return attn.to_out[0](joint[:, text.shape[1] :]), attn.to_add_out(joint[:, : text.shape[1]])


def rotated(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """(b, tokens, heads, d), each pair of d turned by one of its token's angles, (tokens, d / 2)."""
    cos, sin = cosines[:, None], sines[:, None]
    one, other = heads.float().unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
    return torch.stack([one * cos - other * sin, one * sin + other * cos], dim=-1).flatten(-2).to(heads.dtype)


def rotating(attention: Any) -> Any:
    """A view of an attention of diffusers that has this processor."""
    view = parts.view(attention)
    view.processor = Pairs()
    return view


def waves_of(places: Tensor, theta: float, widths: Sequence[int]) -> Waves:
    """Of places (b, tokens, axes), each axis turning so many channels of a head; float32 whatever the model is in."""
    angles = []
    for axis, width in enumerate(widths):
        frequencies = [theta ** (-2 * index / width) for index in range(width // 2)]
        angles.append(places[..., axis, None] * torch.tensor(frequencies, dtype=torch.float32, device=places.device))
    angle = torch.cat(angles, dim=-1)
    cosine, sine = angle.cos(), angle.sin()  # of a pair of channels the first one loses what the second one gets
    return _paired(cosine, cosine), _paired(-sine, sine)


def attention(module: Any, states: Tensor, waves: Waves, shown: Tensor | None) -> Tensor:
    """Self-attention of diffusers' module over states (b, tokens, width); `shown`, (b, tokens), is what is looked at.

    Several heads of queries may read the same keys and values.
    """
    size = module.to_q.out_features // module.heads
    shared = module.to_q.out_features // module.to_k.out_features
    query, key, value = (
        project(states).unflatten(2, (-1, size)) for project in (module.to_q, module.to_k, module.to_v)
    )  # (b, tokens, heads, size)
    query, key = _turned(module.norm_q, query, waves), _turned(module.norm_k, key, waves)
    key, value = (each[:, :, :, None].expand(-1, -1, -1, shared, -1).flatten(2, 3) for each in (key, value))
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    mask = None if shown is None else shown[:, None, None]
    found = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=module.scale)
    result: Tensor = module.to_out[0](found.transpose(1, 2).flatten(2))
    return result


class Turned:
    """diffusers' processor of Z-Image's attention, told waves in place of complex numbers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None,
        attention_mask: Tensor | None,
        freqs_cis: Waves,
    ) -> Tensor:
        return attention(attn, hidden_states, freqs_cis, attention_mask)


def turning(block: Any) -> Any:
    """A view of a block of Z-Image whose attention has this processor."""
    seen = parts.view(block.attention)
    seen.processor = Turned()
    return parts.view(block, attention=seen)


def _paired(first: Tensor, second: Tensor) -> Tensor:
    """(b, tokens, pairs) each -> (b, tokens, 1, 2 pairs), in turns."""
    return torch.stack([first, second], dim=-1).flatten(-2)[:, :, None]


def _turned(norm: nn.Module | None, heads: Tensor, waves: Waves) -> Tensor:
    """Pairs of channels of (b, tokens, heads, size), normalised, each turned by its wave's angle."""
    heads = heads if norm is None else norm(heads)
    wide, (cosine, sine) = heads.float(), waves
    swapped = torch.unflatten(wide, -1, (-1, 2)).flip(-1).flatten(-2)
    return (wide * cosine + swapped * sine).to(heads.dtype)
