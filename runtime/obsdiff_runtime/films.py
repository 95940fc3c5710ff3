"""Films as files: WebP, GIF, APNG, numpy's array, or a folder of frames. No video encoder is needed."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from obsdiff_runtime.autoencoder import Pixels
from obsdiff_runtime.errors import ConfigError, require_file

FPS: Final = 16.0
"""Frames a second; Wan 2.1's and 2.2 A14B's."""
MOST_FPS: Final = 50
"""Faster than that players of GIF slow down."""
QUALITY: Final = 90
"""Of WebP."""

Writer = Callable[[Pixels, Path, float], None]


def check(output: Path, fps: float) -> None:
    """Raises ConfigError where no film can be written to such a file, or shown at so many frames a second."""
    if not 1 <= fps <= MOST_FPS:
        raise ConfigError(f"--fps {fps:g}: should be between 1 and {MOST_FPS}")
    if output.suffix.lower() not in WRITERS:
        known = ", ".join(filter(None, WRITERS))
        raise ConfigError(f"-o {output}: no film has such a file; use {known}, or a folder for a file a frame")
    if output.suffix:
        require_file("-o", output)
    elif output.exists():
        raise ConfigError(f"-o {output}: is there already, and a film's frames want a folder of their own")


def write(film: Pixels, output: Path | str, fps: float = FPS) -> None:
    """Writes a film (frames, height, width, 3); the name says the format, and one without an ending is a folder.

    Raises:
        ConfigError: see `check`.
    """
    path = Path(output)
    check(path, fps)
    WRITERS[path.suffix.lower()](film, path, fps)


def animate(film: Pixels, output: Path | BinaryIO, format: str, fps: float, **options: Any) -> None:
    """Writes a film as an image that moves, again and again.

    Args:
        film: (frames, height, width, 3).
        output: the file.
        format: "webp", "gif" or "png", which are APNGs.
        fps: frames a second. What is lost by rounding to the format's unit of time does not add up.
        **options: of Pillow's writer.
    """
    from PIL import Image

    unit = 10 if format == "gif" else 1  # ms
    ends = [round(1000 * index / fps / unit) * unit for index in range(len(film) + 1)]
    first, *others = (Image.fromarray(frame) for frame in film)
    durations = [end - start for start, end in pairwise(ends)]
    first.save(output, format, save_all=True, append_images=others, duration=durations, loop=0, **options)


def _webp(film: Pixels, output: Path, fps: float) -> None:
    animate(film, output, "webp", fps, quality=QUALITY)


def _gif(film: Pixels, output: Path, fps: float) -> None:
    animate(film, output, "gif", fps)


def _apng(film: Pixels, output: Path, fps: float) -> None:
    animate(film, output, "png", fps)


def _array(film: Pixels, output: Path, fps: float) -> None:
    np.save(output, film)


def _folder(film: Pixels, output: Path, fps: float) -> None:
    from PIL import Image

    output.mkdir()
    for index, frame in enumerate(film):
        Image.fromarray(frame).save(output / f"{index:04}.png")


WRITERS: Final[dict[str, Writer]] = {
    ".webp": _webp,
    ".gif": _gif,
    ".png": _apng,
    ".apng": _apng,
    ".npy": _array,
    "": _folder,
}
