"""Image files as what a pipeline takes."""

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from obsdiff_runtime.autoencoder import Pixels
from obsdiff_runtime.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image


def open_picture(
    source: Path | str | BinaryIO,
    name: str | None = None,
    *,
    formats: tuple[str, ...] | None = None,
    most_pixels: int | None = None,
    mode: str | None = "RGB",
) -> "Image":
    """An image, upright where a camera says how it was held.

    Args:
        source: a file, by its place or opened.
        name: what messages call it; its place if None.
        formats: that are read, as Pillow calls them; None for all of its.
        most_pixels: of it; None where that is Pillow's own limit.
        mode: of the image, as Pillow calls it; None for its own.

    Raises:
        ConfigError: it is no image, or too large.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(source, formats=formats) as opened:
            pixels = opened.width * opened.height
            if most_pixels is not None and pixels > most_pixels:
                raise ConfigError(f"{name or source}: {pixels} pixels; at most {most_pixels} are read")
            upright = ImageOps.exif_transpose(opened)
            return upright.copy() if mode is None else upright.convert(mode)
    except (OSError, EOFError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason: object = error.strerror if isinstance(error, OSError) and error.strerror else error
        if isinstance(error, UnidentifiedImageError):  # which says the same of the file, or of its place in memory
            reason = "it is none of a known format" if formats is None else f"it is none of {', '.join(formats)}"
        raise ConfigError(f"{name or source}: no image that can be read: {reason}") from None


def read_picture(path: Path | str, step: int, height: int | None = None, width: int | None = None) -> Pixels:
    """(height, width, 3) of an image file, resized as diffusers does it.

    Args:
        path: of any format that Pillow reads.
        step: the size is rounded down to multiples of this where none is asked for.
        height: in pixels, the file's own if None.
        width: in pixels, the file's own if None.

    Raises:
        ConfigError: the file is no image, or smaller than one step.
    """
    image = open_picture(path)
    size = (width or image.width // step * step, height or image.height // step * step)
    if 0 in size:
        raise ConfigError(f"{path}: {image.width} x {image.height} pixels, and the model draws no fewer than {step}")
    return resized(image, *size)


def resized(image: "Image", width: int, height: int) -> Pixels:
    """(height, width, 3) of an image, as diffusers resizes it."""
    return np.asarray(scaled(image, width, height))


def scaled(image: "Image", width: int, height: int) -> "Image":
    """The same as an image."""
    from PIL.Image import Resampling

    return image if image.size == (width, height) else image.resize((width, height), Resampling.LANCZOS)
