"""Which part of a picture is drawn anew, where the rest of it stays.

Shapes: (height, width) in pixels; h w latent height and width.
"""

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.pictures import resized

if TYPE_CHECKING:
    from PIL.Image import Image

Mask = NDArray[Any]
"""(height, width), bool, or uint8 of which HALF and more counts: what is drawn anew."""

HALF: Final = 128


def mask_of(image: "Image", width: int, height: int) -> Mask:
    """What is drawn anew by an image, at a size: what is transparent in it, as OpenAI's clients tell it.

    Where nothing is, what is white, as in diffusers.
    """
    opaque = image.convert("RGBA").getchannel("A")
    if opaque.getextrema() != (255, 255):
        return np.asarray(resized(opaque, width, height) < HALF)
    return np.asarray(resized(image.convert("L"), width, height) >= HALF)


def is_redrawn(mask: Mask) -> NDArray[np.bool_]:
    """(height, width) of a mask."""
    return np.asarray(mask >= (HALF if mask.dtype == np.uint8 else 1))


def on_latents(mask: Mask, scale: int, height: int, width: int) -> NDArray[np.bool_]:
    """(h, w) of a mask, where a latent pixel is `scale` pixels wide: what its first pixel is, as in diffusers.

    Raises:
        ConfigError: the mask is none, or of another size than (height, width).
    """
    if mask.dtype not in (np.bool_, np.uint8) or mask.shape != (height, width):
        raise ConfigError(
            f"mask should be {(height, width)} of bool or uint8, as the image, not {mask.shape} of {mask.dtype}"
        )
    redrawn = is_redrawn(mask)[::scale, ::scale]
    if not redrawn.any():
        raise ConfigError(f"mask: nothing is drawn anew; true or white should be {scale} x {scale} pixels at least")
    return redrawn
