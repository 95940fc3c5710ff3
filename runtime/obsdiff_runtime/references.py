"""Pictures that a denoiser is told beside the text: what is made of them, and where their tokens stand.

Shapes: r tokens of all pictures of one drawing, a axes of a token's place, c latent channels, h w latent sides.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from obsdiff_runtime.autoencoder import Pixels
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.networks import Array

if TYPE_CHECKING:
    from PIL.Image import Image

STATES: Final = "reference_states"  # input of the denoiser: tokens, (rows, r, c * patch * patch)
PLACES: Final = "reference_places"  # likewise: their places, (r, a), the same for all rows
TOKENS: Final = "reference_tokens"  # what its graph calls r, which may be 0

_MEGAPIXEL: Final = 1024 * 1024
_PORTRAIT: Final = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
)
KONTEXT_SIZES: Final = (*_PORTRAIT, (1024, 1024), *((height, width) for width, height in _PORTRAIT))
"""(width, height) in pixels that FLUX.1 Kontext was trained on."""

Sides = tuple[int, int]
"""(rows, columns) of a picture's tokens."""


@dataclass(frozen=True, kw_only=True)
class References:
    """How a denoiser is told pictures.

    Attributes:
        most: of them for one drawing; None where there is no limit.
        served: of the drawn size, that engines take where nothing else is asked for.
        axes: a of a token's place: the picture, its row, its column, and what else is always 0.
        step: from one picture to the next on the first axis, on which what is drawn is at 0.
        pixels: of the largest picture that is fitted.
        fitted: what diffusers' pipeline makes of a picture by default; told the size of a token in pixels.
    """

    most: int | None
    served: int
    axes: int
    step: int
    pixels: int
    fitted: Callable[["Image", int], "Image"]

    def places(self, sides: Sequence[Sides]) -> Array:
        """(r, a) of pictures of so many tokens."""
        found = [np.zeros((0, self.axes), np.float32)]
        for index, (rows, columns) in enumerate(sides):
            own = np.zeros((rows, columns, self.axes), np.float32)
            own[..., 0] = self.step * (index + 1)
            own[..., 1] = np.arange(rows)[:, None]
            own[..., 2] = np.arange(columns)
            found.append(own.reshape(-1, self.axes))
        return np.concatenate(found)


def packed(latents: Array, patch: int) -> Array:
    """(c, h, w) -> (r, c * patch * patch)."""
    channels, height, width = latents.shape
    split = latents.reshape(channels, height // patch, patch, width // patch, patch)
    return split.transpose(1, 3, 0, 2, 4).reshape(-1, channels * patch * patch)


def pixels_of(image: "Image", step: int, references: References | None) -> Pixels:
    """(height, width, 3) of a picture as a drawing is told it: fitted, or at its own size in whole tokens if None.

    Raises:
        ConfigError: it is smaller than a token, of `step` pixels a side.
    """
    if min(image.size) < step:
        raise ConfigError(f"a reference of {image.width} x {image.height} pixels; the model reads no fewer than {step}")
    image = image.convert("RGB")
    if references is not None:
        return np.asarray(references.fitted(image, step))
    return np.asarray(_resized(image, image.width // step * step, image.height // step * step))


def fitted_by_shape(image: "Image", step: int) -> "Image":
    """FLUX.1 Kontext: scaled to that of KONTEXT_SIZES whose shape is nearest."""
    shape = image.width / image.height
    _, width, height = min((abs(shape - width / height), width, height) for width, height in KONTEXT_SIZES)
    return _resized(image, width // step * step, height // step * step)


def fitted_by_area(image: "Image", step: int) -> "Image":
    """FLUX.2: scaled down to a megapixel where it is larger; what is no whole token at the edges is cut off."""
    if image.width * image.height > _MEGAPIXEL:
        scale = math.sqrt(_MEGAPIXEL / (image.width * image.height))
        image = _resized(image, int(image.width * scale), int(image.height * scale))
    width, height = image.width // step * step, image.height // step * step
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _resized(image: "Image", width: int, height: int) -> "Image":
    from PIL.Image import Resampling

    return image if image.size == (width, height) else image.resize((width, height), Resampling.LANCZOS)


KONTEXT: Final = References(
    most=1,
    served=1,
    axes=3,
    step=1,
    pixels=max(width * height for width, height in KONTEXT_SIZES),
    fitted=fitted_by_shape,
)
FLUX2: Final = References(most=None, served=2, axes=4, step=10, pixels=_MEGAPIXEL, fitted=fitted_by_area)
