"""Pictures by which a ControlNet steers the denoiser, such as edges or depths, as their graph takes them.

Shapes: s pixels per side of a latent pixel, h w latent height and width, r rows of a drawing.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.autoencoder import Pixels
from obsdiff_runtime.errors import ConfigError

NETWORK: Final = "controlnet"
"""Folder of a ControlNet in a pipeline."""

PICTURE: Final = "controlnet_cond"
"""Input of the graph: the pixels of each latent pixel, (r, 3 * s * s, h, w), from 0 to 1."""

SCALE: Final = "conditioning_scale"
"""Input of the graph: how much it counts, (r,)."""

MOST_SCALE: Final = 10


@dataclass(frozen=True, kw_only=True)
class Control:
    """A picture (height, width, 3) of the size that is drawn, and how much it counts."""

    pixels: Pixels
    scale: float


def steering(pixels: Pixels | None, scale: float | None) -> Control | None:
    """What a call steers by, if anything; 1 where it says no scale.

    Raises:
        ConfigError: there is a scale and no picture.
    """
    if pixels is None:
        if scale is not None:
            raise ConfigError("control_scale says how much a control picture counts, and there is none")
        return None
    return Control(pixels=pixels, scale=1.0 if scale is None else scale)


def channels(scale: int) -> int:
    """Of PICTURE."""
    return 3 * scale**2


def packed(picture: Pixels, scale: int) -> NDArray[np.float32]:
    """(3 * s * s, h, w) of a picture (s * h, s * w, 3): pixels row by row behind each colour."""
    height, width = picture.shape[0] // scale, picture.shape[1] // scale
    cells = picture.reshape(height, scale, width, scale, 3).transpose(4, 1, 3, 0, 2)
    return cells.reshape(channels(scale), height, width).astype(np.float32) / np.float32(255)
