"""Denoisers that are told what stays of a picture of which a part is drawn anew: FLUX.1 Fill, 9-channel UNets.

Shapes: s pixels per side of a latent pixel, c latent channels, h w latent height and width, r rows of a drawing.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.networks import Array

STATES: Final = "fill_states"
"""Input of the graph: the mask and latents of what stays, (r, channels, h, w)."""


@dataclass(frozen=True, kw_only=True)
class Fill:
    """How a denoiser is told.

    Attributes:
        pixels: of the mask, one channel for each pixel of a latent pixel, behind the latents; else its first pixel
            alone, in front of them.
        reads_all: whether diffusers draws latents of the whole picture, too, where nothing of what is drawn anew stays.
    """

    pixels: bool
    reads_all: bool

    def states(self, redrawn: NDArray[np.bool_], latents: Array, scale: int) -> Array:
        """(channels, h, w), float32, of a mask (s * h, s * w), true where it is drawn anew, and what stays."""
        height, width = latents.shape[-2:]
        cells = redrawn.reshape(height, scale, width, scale).transpose(1, 3, 0, 2).reshape(-1, height, width)
        parts = [latents, cells] if self.pixels else [cells[:1], latents]
        return np.concatenate(parts).astype(np.float32)
