"""Places of patches at any size, computed in the graph: sines on top of patches, or turns of queries and keys."""

from typing import Any, Final

import torch
from torch import Tensor, nn

_LONGEST_PERIOD: Final = 10000  # of the places' sines, over 2 pi, in steps of the size that the model was trained on


class Patches(nn.Module):
    """diffusers' PatchEmbed at any size: the places are computed in the graph, not cached for the size of training.

    A token in column x and row y of a grid of (h, w) has sines and cosines of x S / w f, then of y S / h f. S is the
    side of the grid in training over the model's interpolation scale, f from 1 down to 1 / _LONGEST_PERIOD.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.proj = source.proj
        self._span = source.base_size / source.interpolation_scale
        self._frequencies = _frequencies(source.proj.out_channels // 4)

    def forward(self, latent: Tensor) -> Tensor:
        patches: Tensor = self.proj(latent)  # (b, width, h, w)
        rows, columns = patches.shape[-2:]
        across, down = self._waves(columns, latent.device), self._waves(rows, latent.device)
        half = across.shape[-1]
        grid = torch.cat([across.expand(rows, columns, half), down[:, None].expand(rows, columns, half)], dim=-1)
        return (patches.flatten(2).transpose(1, 2) + grid.flatten(0, 1)).to(patches.dtype)  # (b, tokens, width)

    def _waves(self, places: int, device: torch.device) -> Tensor:
        """(places, width / 2), float32 whatever the model is in."""
        frequencies = torch.tensor(self._frequencies, dtype=torch.float32, device=device)
        steps = torch.arange(places, dtype=torch.float32, device=device) * self._span / places
        angles = steps[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def rotations(rows: int, columns: int, *, width: int, span: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (tokens, width) each, by which HunyuanDiT's pipeline turns queries and keys.

    The grid of the patches is laid into a square of side `span`, its longer side from edge to edge and its shorter one
    in the middle, both at whole places. The first half of a head is turned by the column, the second by the row.

    Args:
        rows: of patches.
        columns: of patches.
        width: of a head, a multiple of 4.
        span: patches a side of the first images in training.
        device: of the result.
    """
    count = width // 4
    frequencies = _LONGEST_PERIOD ** (torch.arange(count, dtype=torch.float32, device=device) / -count)
    turns = frequencies[:, None].expand(count, 2).flatten()  # the two channels of a pair turn alike
    height, breadth = (torch.full((), side, dtype=torch.float32, device=device) for side in (rows, columns))
    scale = span / torch.maximum(height, breadth)
    down = _laid(rows, height, scale, span)[:, None] * turns
    across = _laid(columns, breadth, scale, span)[:, None] * turns
    half = width // 2
    angles = torch.cat([across.expand(rows, columns, half), down[:, None].expand(rows, columns, half)], dim=-1)
    return angles.flatten(0, 1).cos(), angles.flatten(0, 1).sin()


def _laid(count: int, side: Tensor, scale: Tensor, span: int) -> Tensor:
    """(count,): places of patches in the middle of the square; `side` is their number as a tensor."""
    length = torch.round(scale * side)
    start = torch.round((length - span) / -2)  # half of what is left beside it
    last = (start + length) * (side - 1) / side
    return start + torch.arange(count, dtype=torch.float32, device=side.device) * (
        (last - start) / (side - 1).clamp_min(1)
    )


def _frequencies(count: int) -> tuple[float, ...]:
    return tuple(float(_LONGEST_PERIOD ** (-index / count)) for index in range(count))
