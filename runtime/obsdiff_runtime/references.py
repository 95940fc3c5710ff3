"""Pictures that a denoiser is told beside the text: what is made of them, and where their tokens stand.

Shapes: r tokens of all pictures of one drawing, a axes of a token's place, c latent channels, h w latent sides.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from obsdiff_runtime import seeing
from obsdiff_runtime.autoencoder import Pixels
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.networks import Array
from obsdiff_runtime.pictures import resized, scaled

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


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """A picture as a drawing is told it.

    Attributes:
        pixels: (height, width, 3), what the denoiser is told.
        seen: (height, width, 3), what the text encoder looks at, where it does; None: the same, scaled.
    """

    pixels: Pixels
    seen: Pixels | None = None

    def looked_at(self, pixels: int) -> Pixels:
        """What the text encoder looks at, which is to have about so many pixels."""
        from PIL import Image

        return _seen(Image.fromarray(self.pixels), pixels) if self.seen is None else self.seen


@dataclass(frozen=True, kw_only=True)
class References:
    """How a denoiser is told pictures.

    Attributes:
        most: of them for one drawing; None where there is no limit.
        least: likewise.
        served: of the drawn size, that engines take where nothing else is asked for.
        axes: a of a token's place: the picture, its row, its column, and what else is always 0.
        step: from one picture to the next on the first axis, on which what is drawn is at 0.
        pixels: of the largest picture that is fitted.
        fitted: what diffusers' pipeline makes of a picture by default; told the size of a token in pixels.
        centred: whether rows and columns are counted from the picture's middle.
        seen: pixels, about, of what the text encoder looks at beside the denoiser; None where it reads text alone.
    """

    most: int | None
    least: int = 0
    served: int
    axes: int
    step: int
    pixels: int
    fitted: Callable[["Image", int], "Image"]
    centred: bool = False
    seen: int | None = None

    def seen_tokens(self, width: int, height: int) -> int:
        """Tokens that a picture of such a shape adds to the text."""
        return 0 if self.seen is None else math.prod(seeing.grid_of(width, height, self.seen))

    def seen_sizes(self, width: int, height: int) -> dict[str, tuple[int, int, int]]:
        """Of a picture that the text encoder looks at, what engines take: least, of such a shape, and most.

        Windows are of one picture, up to half as many again as a square has, which is one of four to one; tokens of
        `served` pictures, of any shape.
        """
        pixels = self.seen or 0
        windows = [seeing.windows_of(*shape, pixels) for shape in ((width, height), (1, 1))]
        tokens = self.served * seeing.most_tokens_of(pixels)
        return {
            seeing.WINDOWS: (1, windows[0], max(windows[0], windows[1] * 3 // 2)),
            seeing.TOKENS: (1, self.seen_tokens(width, height), tokens),
        }

    def places(self, sides: Sequence[Sides]) -> Array:
        """(r, a) of pictures of so many tokens."""
        found = [np.zeros((0, self.axes), np.float32)]
        for index, (rows, columns) in enumerate(sides):
            own = np.zeros((rows, columns, self.axes), np.float32)
            own[..., 0] = self.step * (index + 1)
            middle = (rows - rows // 2, columns - columns // 2) if self.centred else (0, 0)
            own[..., 1] = np.arange(rows)[:, None] - middle[0]
            own[..., 2] = np.arange(columns) - middle[1]
            found.append(own.reshape(-1, self.axes))
        return np.concatenate(found)


def packed(latents: Array, patch: int) -> Array:
    """(c, h, w) -> (r, c * patch * patch)."""
    channels, height, width = latents.shape
    split = latents.reshape(channels, height // patch, patch, width // patch, patch)
    return split.transpose(1, 3, 0, 2, 4).reshape(-1, channels * patch * patch)


def reference_of(image: "Image", step: int, references: References, *, own_size: bool) -> Reference:
    """A picture as a drawing is told it; see `pixels_of`.

    Raises:
        ConfigError: it is too small, or too slender.
    """
    pixels = pixels_of(image, step, None if own_size else references)
    if references.seen is None:
        return Reference(pixels=pixels)
    return Reference(pixels=pixels, seen=_seen(image.convert("RGB"), references.seen))


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
    return resized(image, image.width // step * step, image.height // step * step)


def fitted_by_shape(image: "Image", step: int) -> "Image":
    """FLUX.1 Kontext: scaled to that of KONTEXT_SIZES whose shape is nearest."""
    shape = image.width / image.height
    _, width, height = min((abs(shape - width / height), width, height) for width, height in KONTEXT_SIZES)
    return scaled(image, width // step * step, height // step * step)


def fitted_by_area(image: "Image", step: int) -> "Image":
    """FLUX.2: scaled down to a megapixel where it is larger; what is no whole token at the edges is cut off."""
    if image.width * image.height > _MEGAPIXEL:
        scale = math.sqrt(_MEGAPIXEL / (image.width * image.height))
        image = scaled(image, int(image.width * scale), int(image.height * scale))
    width, height = image.width // step * step, image.height // step * step
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def fitted_to_a_megapixel(image: "Image", step: int) -> "Image":
    """Qwen-Image-Edit: scaled to about that, whatever it has."""
    return scaled(image, *seeing.size_of(image.width, image.height, _MEGAPIXEL))


def _seen(image: "Image", pixels: int) -> Pixels:
    return resized(image, *seeing.size_of(image.width, image.height, pixels))


KONTEXT: Final = References(
    most=1,
    served=1,
    axes=3,
    step=1,
    pixels=max(width * height for width, height in KONTEXT_SIZES),
    fitted=fitted_by_shape,
)
FLUX2: Final = References(most=None, served=2, axes=4, step=10, pixels=_MEGAPIXEL, fitted=fitted_by_area)
QWEN_EDIT: Final = References(
    most=1,
    least=1,
    served=1,
    axes=3,
    step=1,
    pixels=_MEGAPIXEL,
    fitted=fitted_to_a_megapixel,
    centred=True,
    seen=_MEGAPIXEL,
)
QWEN_EDIT_PLUS: Final = replace(QWEN_EDIT, most=None, served=2, seen=384 * 384)
