"""A plane in overlapping tiles, and what is made of each of them joined without seams.

Tiles are cut and blended as diffusers does it: they begin a stride apart, the last ones end where the plane does, and
each goes over into the next within their overlap, in equal steps. What is made of a plane can have `scale` pixels a
side for each of its own, as a picture has for latents, and `patch` of them a side are blended alike.

Shapes: h w height and width of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A part of a plane.

    Attributes:
        row, column: which one it is.
        height, width: of the plane that it covers.
        own_height, own_width: what of that is settled by it; tiles behind it blend into the rest.
    """

    row: int
    column: int
    height: slice
    width: slice
    own_height: slice
    own_width: slice

    @property
    def size(self) -> tuple[int, int]:
        return _length(self.height), _length(self.width)

    def covers(self, scale: int) -> tuple[slice, slice]:
        """`height` and `width` of the plane at that scale."""
        return _scaled(self.height, scale), _scaled(self.width, scale)

    def settles(self, scale: int) -> tuple[slice, slice]:
        """`own_height` and `own_width` of the plane at that scale."""
        return _scaled(self.own_height, scale), _scaled(self.own_width, scale)


def tiles(height: int, width: int, side: int, overlap: int) -> Iterator[Tile]:
    """The tiles of a plane, row by row; one where it is no larger than a tile.

    Args:
        height: of the plane.
        width: of the plane.
        side: of a tile; the last ones can be smaller.
        overlap: of neighbours.
    """
    stride = side - overlap if max(height, width) > side else side
    for row, top in enumerate(range(0, height, stride)):
        for column, left in enumerate(range(0, width, stride)):
            yield Tile(
                row=row,
                column=column,
                height=slice(top, min(top + side, height)),
                width=slice(left, min(left + side, width)),
                own_height=slice(top, min(top + stride, height)),
                own_width=slice(left, min(left + stride, width)),
            )


@dataclass
class Seams:
    """What was made of tiles and reaches into those behind them."""

    patch: int = 1
    _above: dict[int, Array] = field(default_factory=dict)
    _left: Array = field(default_factory=lambda: np.zeros(0, np.float32))

    def settled(self, tile: Tile, made: Array) -> Array:
        """What is made of a tile, (..., h scale, w scale), blended with its neighbours: of `own_height`, `own_width`.

        Args:
            tile: in the order of `tiles`.
            made: of it.
        """
        high, wide = map(_length, tile.settles(made.shape[-1] // _length(tile.width)))
        if tile.row:
            made = _blended(self._above[tile.column], made, -2, self.patch)
        if tile.column:
            made = _blended(self._left, made, -1, self.patch)
        self._above[tile.column] = made[..., high:, :].copy()
        self._left = made[..., wide:].copy()
        return made[..., :high, :wide]


def _scaled(part: slice, scale: int) -> slice:
    return slice(part.start * scale, part.stop * scale)


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _blended(before: Array, made: Array, axis: int, patch: int) -> Array:
    """`made`, which goes over from `before` along an axis, as far as that reaches."""
    reach = before.shape[axis]
    steps = np.arange(reach, dtype=made.dtype) // patch * patch / reach
    share = steps.reshape(-1, *(1,) * (-1 - axis))
    within, behind = np.split(made, [reach], axis)
    return np.concatenate([before * (1 - share) + within * share, behind], axis)
