"""Image files as what a pipeline takes."""

from pathlib import Path

import numpy as np

from obsdiff_runtime.autoencoder import Pixels
from obsdiff_runtime.errors import ConfigError


def read_picture(path: Path, step: int, height: int | None = None, width: int | None = None) -> Pixels:
    """(height, width, 3) of an image file, resized as diffusers does it.

    Args:
        path: of any format that Pillow reads.
        step: the size is rounded down to multiples of this where none is asked for.
        height: in pixels, the file's own if None.
        width: in pixels, the file's own if None.

    Raises:
        ConfigError: the file is no image, or smaller than one step.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"{path}: no image that can be read: {reason}") from None
    size = (width or image.width // step * step, height or image.height // step * step)
    if 0 in size:
        raise ConfigError(f"{path}: {image.width} x {image.height} pixels, and the model draws no fewer than {step}")
    return np.asarray(image if size == image.size else image.resize(size, Image.Resampling.LANCZOS))
