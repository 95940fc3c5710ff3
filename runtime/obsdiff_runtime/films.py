"""Films as files: WebP, GIF, APNG, numpy's array, or a folder of frames. No video encoder is needed."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from obsdiff_runtime.autoencoder import Pixels
from obsdiff_runtime.errors import ConfigError

FPS: Final = 16.0
"""Frames a second; Wan 2.1's."""

Writer = Callable[[Pixels, Path, float], None]


def writer(output: Path, fps: float) -> Writer:
    """What writes a film (frames, height, width, 3) to such a file; one without an ending is a folder.

    Raises:
        ConfigError: there is none for that ending, or so many frames a second there cannot be.
    """
    if not 1 <= fps <= MOST_FPS:
        raise ConfigError(f"--fps {fps:g}: should be between 1 and {MOST_FPS}")
    if output.suffix.lower() not in WRITERS:
        known = ", ".join(filter(None, WRITERS))
        raise ConfigError(f"-o {output}: no film has such a file; use {known}, or a folder for a file a frame")
    return WRITERS[output.suffix.lower()]


MOST_FPS: Final = 50
"""Faster than that players of GIF slow down."""


def _webp(film: Pixels, output: Path, fps: float) -> None:
    _animated(film, output, _durations(len(film), fps, unit=1), format="WEBP", quality=90)


def _gif(film: Pixels, output: Path, fps: float) -> None:
    _animated(film, output, _durations(len(film), fps, unit=10), format="GIF")


def _apng(film: Pixels, output: Path, fps: float) -> None:
    _animated(film, output, _durations(len(film), fps, unit=1), format="PNG")


def _array(film: Pixels, output: Path, fps: float) -> None:
    np.save(output, film)


def _folder(film: Pixels, output: Path, fps: float) -> None:
    from PIL import Image

    output.mkdir(exist_ok=True)
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


def _animated(film: Pixels, output: Path, durations: list[int], **options: Any) -> None:
    from PIL import Image

    first, *others = (Image.fromarray(frame) for frame in film)
    first.save(output, save_all=True, append_images=others, duration=durations, loop=0, **options)


def _durations(frames: int, fps: float, *, unit: int) -> list[int]:
    """Of each frame in ms, in whole units, so that what is lost by rounding does not add up."""
    ends = [round(1000 * index / fps / unit) * unit for index in range(frames + 1)]
    return [end - start for start, end in pairwise(ends)]
