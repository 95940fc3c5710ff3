"""Qwen-Image's attention for a graph: queries and keys rotated as pairs of numbers, at any size.

diffusers rotates complex numbers, which ONNX has none of, by angles that it keeps for the places it knows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from obsdiff.families import parts


class Places(nn.Module):
    """Cosines and sines of the tokens' angles, (tokens, head width / 2) each, text before image.

    An image's rows and columns are counted from its middle. The text goes on where the longer of them ends, with the
    same place along all axes. Float32 whatever the model is in.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        steps = (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width for width in source.axes_dim)
        self._frequencies = [(1 / torch.pow(source.theta, step)).tolist() for step in steps]

    def forward(self, img_shapes: Sequence[Any], max_txt_seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        _, rows, columns = img_shapes[0][0]

        def places(count: int) -> Tensor:
            return torch.arange(count, dtype=torch.float32, device=device)

        row, column = places(rows) - (rows - rows // 2), places(columns) - (columns - columns // 2)
        frame, down, across = (torch.tensor(axis, dtype=torch.float32, device=device) for axis in self._frequencies)
        grid = (
            torch.zeros_like(frame).expand(rows, columns, -1),
            (row[:, None] * down)[:, None].expand(rows, columns, -1),
            (column[:, None] * across)[None].expand(rows, columns, -1),
        )
        start = torch.maximum(row.max(), column.max()) + 1
        text = (start + places(max_txt_seq_len))[:, None] * torch.cat([frame, down, across])
        angles = torch.cat([text, torch.cat(grid, dim=-1).flatten(0, 1)])
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
