"""Pictures that a text encoder looks at: what Qwen2.5-VL's vision is given of them, and where they stand in the text.

A token of the text stands for a square of merge x merge patches, and layers of vision look at windows of side x side
such tokens. Here windows are rows of a batch; what of the last ones lies outside of the picture is masked out.

Shapes: w windows, s patches of a window, v numbers of a patch, r c rows and columns of a picture's tokens, m tokens of
all pictures, d width of a token, n texts, l their tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.autoencoder import Pixels
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.networks import Array, Networks

if TYPE_CHECKING:
    from PIL.Image import Image

VISION: Final = "vision_encoder"  # component
PATCHES: Final = "pixel_values"  # its inputs: (w, s, v)
PATCH_PLACES: Final = "patch_places"  # rows and columns of patches, (w, s, 2)
PATCH_MASK: Final = "patch_mask"  # 1 where there is a patch, (w, s)
WINDOWS: Final = "windows"  # what its graph calls w
STATES: Final = "picture_states"  # its output, (w, s / merge^2, d); input of the text encoder, (m, d)
PLACES: Final = "picture_places"  # input of the text encoder: 0 for words, i for the i-th token of pictures, (n, l)
POSITIONS: Final = "position_ids"  # likewise, (3, n, l)
TOKENS: Final = "picture_tokens"  # what its graph calls m

MARK: Final = "<|image_pad|>"
"""The word that stands for a token of a picture."""

PICTURE: Final = f"<|vision_start|>{MARK}<|vision_end|>"

TOKEN_PIXELS: Final = 28
WINDOW_TOKENS: Final = 4
"""A side of a token, and of a window, as Qwen2.5-VL is published; what is run is told by its configuration."""

MOST_SLENDER: Final = 200
"""How many times as long as wide a picture may be."""

_SIDES: Final = 32
"""diffusers' pipelines scale to multiples of so many pixels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What the vision made of a picture.

    Attributes:
        rows, columns: of its tokens.
        states: (rows * columns, d).
    """

    rows: int
    columns: int
    states: Array


def size_of(width: int, height: int, pixels: int) -> tuple[int, int]:
    """(width, height) of about so many pixels, of the shape of another size.

    Raises:
        ConfigError: it is too slender.
    """
    if max(width, height) > MOST_SLENDER * min(width, height):
        raise ConfigError(
            f"a reference of {width} x {height} pixels; the model reads none {MOST_SLENDER} times as long as wide"
        )
    shape = width / height
    wide = math.sqrt(pixels * shape)
    return round(wide / _SIDES) * _SIDES, round(wide / shape / _SIDES) * _SIDES


def grid_of(width: int, height: int, pixels: int) -> tuple[int, int]:
    """Rows and columns of tokens of a picture of such a shape that is looked at with about so many pixels."""
    wide, high = size_of(width, height, pixels)
    return round(high / TOKEN_PIXELS), round(wide / TOKEN_PIXELS)


def windows_of(width: int, height: int, pixels: int) -> int:
    """Windows of such a picture."""
    return math.prod(math.ceil(side / WINDOW_TOKENS) for side in grid_of(width, height, pixels))


def most_tokens_of(pixels: int) -> int:
    """Of a picture of any shape: sides of few tokens are rounded up by a quarter at most."""
    return pixels // TOKEN_PIXELS**2 * 5 // 4


def look(networks: Networks, pictures: Sequence[Pixels]) -> tuple[Seen, ...]:
    """What the vision makes of pictures, (height, width, 3) each."""
    from PIL import Image

    config = networks.bundle.config(VISION)
    found = []
    for picture in pictures:
        inputs, order = windowed(resized(Image.fromarray(picture), config), config)
        states = networks.run(VISION, inputs, [STATES])[STATES]
        rows, columns = order.max(axis=(0, 1)) + 1
        ordered = np.empty((rows * columns, states.shape[-1]), np.float32)
        shown = order[..., 0] >= 0
        ordered[order[shown] @ (columns, 1)] = states[shown]
        found.append(Seen(rows=int(rows), columns=int(columns), states=ordered))
    return tuple(found)


def resized(image: "Image", config: Mapping[str, Any]) -> "Image":
    """Scaled to whole tokens, and to between as few and as many pixels as the configuration says, as transformers'."""
    from PIL.Image import Resampling

    side = int(config["patch_size"]) * int(config["spatial_merge_size"])
    sides = (image.width, image.height)
    width, height = (round(each / side) * side for each in sides)
    least, most = int(config["min_pixels"]), int(config["max_pixels"])
    if width * height > most:
        scale = math.sqrt(image.width * image.height / most)
        width, height = (max(side, math.floor(each / scale / side) * side) for each in sides)
    elif width * height < least:
        scale = math.sqrt(least / (image.width * image.height))
        width, height = (math.ceil(each * scale / side) * side for each in sides)
    return image.resize((width, height), Resampling.BICUBIC)


def windowed(image: "Image", config: Mapping[str, Any]) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64]]:
    """Inputs of the vision, and the row and column of each token in them, (w, s / merge^2, 2), -1 where there is none.

    Args:
        image: of whole tokens.
        config: of the vision.
    """
    patch, merge = int(config["patch_size"]), int(config["spatial_merge_size"])
    side = int(config["window_size"]) // merge // patch  # tokens of a window
    mean, deviation = (np.array(config[name], np.float32) for name in ("image_mean", "image_std"))
    values = (np.asarray(image, np.float32) / np.float32(255) - mean) / deviation
    rows, columns = image.height // (patch * merge), image.width // (patch * merge)
    split = values.reshape(rows, merge, patch, columns, merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    flat = split.reshape(rows, columns, merge**2, 3, 1, patch**2)
    flat = flat.repeat(int(config["temporal_patch_size"]), axis=4).reshape(rows, columns, merge**2, -1)

    down, across = (math.ceil(count / side) * side for count in (rows, columns))
    grid = np.stack(np.meshgrid(np.arange(down), np.arange(across), indexing="ij"), axis=-1)
    grid[(grid >= (rows, columns)).any(axis=-1)] = -1
    order = grid.reshape(down // side, side, across // side, side, 2).transpose(0, 2, 1, 3, 4).reshape(-1, side**2, 2)
    shown = order[..., 0] >= 0  # (w, tokens)
    within = np.stack(np.meshgrid(np.arange(merge), np.arange(merge), indexing="ij"), axis=-1).reshape(-1, 2)
    places = np.maximum(order, 0)[:, :, None] * merge + within  # (w, tokens, merge^2, 2)
    patches = flat[order[..., 0], order[..., 1]] * shown[..., None, None]
    count = side**2 * merge**2
    return {
        PATCHES: patches.reshape(len(order), count, -1).astype(np.float32),
        PATCH_PLACES: places.reshape(len(order), count, 2),
        PATCH_MASK: shown.repeat(merge**2, axis=1).astype(np.int64),
    }, order


def written(text: str, seen: Sequence[Seen]) -> str:
    """A text with one mark for each picture, with one for each of their tokens."""
    first, *others = text.split(MARK)
    marks = (MARK * len(each.states) for each in seen)
    return first + "".join(mark + other for mark, other in zip(marks, others, strict=True))


def told(ids: NDArray[np.int64], mark: int, seen: Sequence[Seen]) -> dict[str, NDArray[Any]]:
    """What the text encoder is told of pictures beside the ids (n, l), of which those that are `mark` stand for them.

    Positions go on by one from word to word. Tokens of a picture are all at one position of the first axis, on the
    others at those of their row and column, and what follows goes on where the longer side ends.
    """
    shown = ids == mark
    positions = np.zeros((3, *ids.shape), np.int64)
    for row, own in enumerate(shown):
        begins = np.flatnonzero(own & ~np.roll(own, 1)).tolist()
        behind, now = 0, 0
        for picture, begin in zip(seen, begins, strict=True):
            end = begin + len(picture.states)
            positions[:, row, behind:begin] = now + np.arange(begin - behind)
            now += begin - behind
            grid = np.stack(np.meshgrid(np.arange(picture.rows), np.arange(picture.columns), indexing="ij"))
            positions[0, row, begin:end] = now
            positions[1:, row, begin:end] = now + grid.reshape(2, -1)
            now += max(picture.rows, picture.columns)
            behind = end
        positions[:, row, behind:] = now + np.arange(ids.shape[1] - behind)
    return {
        STATES: np.concatenate([each.states for each in seen]),
        PLACES: np.where(shown, np.cumsum(shown, axis=1), 0),
        POSITIONS: positions,
    }
