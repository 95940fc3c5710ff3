"""Captioned shapes: the words, the pictures and the check that a picture obeys its words.

The shipped pipeline is trained on these pictures and quality is measured with this check, so that "did pruning hurt?"
has an answer a person can see. A caption names one object, perhaps with a place, or two objects and their relation:

    a small green triangle at the top
    a large red circle above a small blue square

The size may be left out ("a red circle"); then any size obeys. Lengths below are fractions of the picture's side unless
the name says pixels; pictures are (height, width, 3) uint8 with x to the right and y downwards.
"""

import itertools
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]
Split = Literal["train", "calibration", "evaluation"]

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (220, 40, 45),
    "green": (40, 165, 70),
    "blue": (40, 85, 220),
    "yellow": (245, 205, 35),
    "purple": (150, 55, 190),
    "black": (30, 30, 35),
}
SHAPES: Final = ("circle", "square", "triangle", "cross")
SIZES: Final[dict[str, tuple[float, float]]] = {"small": (0.22, 0.25), "large": (0.39, 0.44)}
RELATIONS: Final[dict[str, tuple[int, int]]] = {
    "above": (0, -1),
    "below": (0, 1),
    "left of": (-1, 0),
    "right of": (1, 0),
}
PLACES: Final[dict[str, tuple[int, int]]] = {
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "on the left": (-1, 0),
    "on the right": (1, 0),
}
HELD_OUT: Final = frozenset({("purple", "circle"), ("yellow", "square"), ("green", "triangle"), ("blue", "cross")})
"""(colour, shape) pairs the shipped pipeline never saw in training, though it saw each colour and each shape."""

SIZE_BOUNDARY: Final = 0.32
MIN_GAP: Final = 0.045
MIN_OVERLAP: Final = 0.7
"""Intersection over union with the ideal shape below which a blob has no shape at all."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One object as the caption names it; no size means any."""

    colour: str
    shape: str
    size: str | None = None

    def __str__(self) -> str:
        return " ".join(word for word in ("a", self.size, self.colour, self.shape) if word)

    @property
    def held_out(self) -> bool:
        return (self.colour, self.shape) in HELD_OUT


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a caption says: one item with or without a place, or two items and where the first is from the second."""

    items: tuple[Item, ...]
    relation: str | None = None
    place: str | None = None

    def __str__(self) -> str:
        if self.relation:
            return f"{self.items[0]} {self.relation} {self.items[1]}"
        return f"{self.items[0]} {self.place}" if self.place else str(self.items[0])

    @property
    def held_out(self) -> bool:
        return any(item.held_out for item in self.items)


@dataclass(frozen=True, kw_only=True)
class Blob:
    """An object found in a picture: centre and extent as fractions of the picture's sides."""

    colour: str
    shape: str | None
    x: float
    y: float
    extent: float

    @property
    def size(self) -> str:
        return "small" if self.extent < SIZE_BOUNDARY else "large"


@dataclass(frozen=True, kw_only=True)
class Obedience:
    """Which parts of its caption a picture obeys. An attribute holds only if it holds for every named object."""

    count: bool
    colour: bool
    shape: bool
    size: bool
    position: bool

    @property
    def all(self) -> bool:
        return self.count and self.colour and self.shape and self.size and self.position


_ITEM = rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"{_ITEM}(?: ({'|'.join(RELATIONS)}) {_ITEM}| ({'|'.join(PLACES)}))?")


def parse(caption: str) -> Scene:
    """The scene a caption describes.

    Raises:
        ValueError: the caption is not of the grammar in this module's docstring.
    """
    match = _CAPTION.fullmatch(" ".join(caption.lower().split()).rstrip("."))
    if match is None:
        raise ValueError(
            f"{caption!r} is no caption of shapes; expected 'a [size] COLOUR SHAPE [PLACE]' or two of them joined by a"
            f" relation; sizes: {', '.join(SIZES)}; colours: {', '.join(COLOURS)}; shapes: {', '.join(SHAPES)};"
            f" places: {', '.join(PLACES)}; relations: {', '.join(RELATIONS)}"
        )
    size, colour, shape, relation, other_size, other_colour, other_shape, place = match.groups()
    items = [Item(colour=colour, shape=shape, size=size)]
    if relation:
        items.append(Item(colour=other_colour, shape=other_shape, size=other_size))
    return Scene(items=tuple(items), relation=relation, place=place)


def _every_item() -> Iterator[Item]:
    for size, colour, shape in itertools.product(SIZES, COLOURS, SHAPES):
        yield Item(colour=colour, shape=shape, size=size)


@cache
def scenes(objects: Literal[1, 2]) -> tuple[Scene, ...]:
    """Every scene of one object (240) or of two that differ in colour or shape (8832), all with sizes."""
    if objects == 1:
        return tuple(Scene(items=(item,), place=place) for item in _every_item() for place in (None, *PLACES))
    return tuple(
        Scene(items=(first, second), relation=relation)
        for first, second in itertools.product(_every_item(), repeat=2)
        if (first.colour, first.shape) != (second.colour, second.shape)
        for relation in RELATIONS
    )


def split_of(caption: str) -> Split:
    """The part of the caption space a caption belongs to: 70 % train, 10 % calibration, 20 % evaluation."""
    tenth = zlib.crc32(caption.encode()) % 10
    return "evaluation" if tenth < 2 else "calibration" if tenth == 2 else "train"


@cache
def _pool(objects: Literal[1, 2], held_out: bool | None, split: Split | None) -> tuple[str, ...]:
    every = (str(scene) for scene in scenes(objects) if held_out is None or scene.held_out == held_out)
    return tuple(caption for caption in every if split is None or split_of(caption) == split)


def captions(
    n: int, seed: int, two_objects: float = 0.5, held_out: bool | None = None, split: Split | None = None
) -> list[str]:
    """Random captions, distinct until the space asked for is used up.

    Args:
        n: how many.
        seed: of the choice and the order.
        two_objects: the share with two objects, met exactly up to rounding.
        held_out: True for captions with at least one held-out (colour, shape), False for none with any, None for both.
        split: only from this part of the caption space.
    """
    rng = np.random.default_rng(seed)
    twos = round(n * two_objects)
    chosen: list[str] = []
    shares: tuple[tuple[Literal[1, 2], int], ...] = ((1, n - twos), (2, twos))
    for objects, count in shares:
        pool = _pool(objects, held_out, split)
        order = [i for _ in range(math.ceil(count / len(pool))) for i in rng.permutation(len(pool))]
        chosen += [pool[i] for i in order[:count]]
    return [chosen[i] for i in rng.permutation(n)]


def calibration_captions(n: int, seed: int) -> list[str]:
    """Captions for calibration: in neither the training nor the evaluation part, half with two objects."""
    return captions(n, seed, two_objects=0.5, held_out=False, split="calibration")


def evaluation_captions(n: int, seed: int, held_out: bool = False) -> list[str]:
    """Captions to score by: never trained on, never calibrated on, four in five with two objects."""
    return captions(n, seed, two_objects=0.8, held_out=held_out, split="evaluation")


def _coverage(shape: str, x: Floats, y: Floats, radius: float) -> Floats:
    """How much of each pixel a shape covers, x and y being pixel offsets from its centre; its box is 2 radius wide."""
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - radius
    elif shape == "triangle":
        # The slanted side runs from (0, -radius) to (radius, radius).
        distance = np.maximum(y - radius, (2 * np.abs(x) - y - radius) / math.sqrt(5))
    elif shape == "cross":
        bar = radius * 0.36
        upright = np.maximum(np.abs(x) - bar, np.abs(y) - radius)
        distance = np.minimum(upright, np.maximum(np.abs(x) - radius, np.abs(y) - bar))
    else:
        raise ValueError(f"no shape {shape!r}; shapes: {', '.join(SHAPES)}")
    return np.clip(0.5 - distance, 0.0, 1.0)


def draw(scene: Scene, size: int = 64, seed: int = 0) -> Image:
    """A picture (size, size, 3) of the scene; what the caption leaves open (exact size, place, tint) is the seed's."""
    rng = np.random.default_rng(seed)
    extents = [rng.uniform(*SIZES[item.size or ("small", "large")[rng.integers(2)]]) for item in scene.items]
    picture: Floats = np.full((size, size, 3), rng.uniform(222, 242))
    grid: Floats = np.arange(size, dtype=np.float64) + 0.5
    for item, extent, (x, y) in zip(scene.items, extents, _centres(scene, extents, rng), strict=True):
        columns, rows = (grid - x * size)[None, :], (grid - y * size)[:, None]
        cover = _coverage(item.shape, columns, rows, extent * size / 2)[..., None]
        tint = np.array(COLOURS[item.colour]) + rng.uniform(-8, 8, 3)
        picture = picture * (1 - cover) + tint * cover
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _centres(scene: Scene, extents: list[float], rng: np.random.Generator) -> list[tuple[float, float]]:
    edge = 0.02
    if len(scene.items) == 1:
        room = 0.5 - edge - extents[0] / 2
        if scene.place is None:
            x, y = rng.uniform(-room, room, 2)
            return [(0.5 + x, 0.5 + y)]
        dx, dy = PLACES[scene.place]
        along, across = rng.uniform(0.19, min(room, 0.28)), rng.uniform(-0.07, 0.07)
        return [(0.5 + dx * along + dy * across, 0.5 + dy * along + dx * across)]
    first, second = extents
    dx, dy = RELATIONS[scene.relation or "above"]
    slack = 1 - 2 * edge - first - second - MIN_GAP
    apart = (first + second) / 2 + MIN_GAP + rng.uniform(0, min(slack, 0.12))
    # The pair's box along the axis, centred up to what slack is left.
    spare = (1 - 2 * edge - apart - (first + second) / 2) / 2
    middle = rng.uniform(-spare, spare)
    offsets = (middle + (second - first) / 4 + apart / 2, middle + (second - first) / 4 - apart / 2)
    across = rng.uniform(-0.1, 0.1)
    sides = (across + rng.uniform(-0.05, 0.05), across + rng.uniform(-0.05, 0.05))
    sign = dx + dy
    if sign < 0:
        offsets = (-offsets[0], -offsets[1])
    if dx:
        return [(0.5 + along, 0.5 + side) for along, side in zip(offsets, sides, strict=True)]
    return [(0.5 + side, 0.5 + along) for along, side in zip(offsets, sides, strict=True)]


def _grow(mask: Mask, diagonal: bool) -> Mask:
    """The mask and its neighbours; neighbours across the corner too if diagonal."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    wide = grown.copy() if diagonal else mask
    grown[:, 1:] |= wide[:, :-1]
    grown[:, :-1] |= wide[:, 1:]
    return grown


def _components(mask: Mask) -> Iterator[Mask]:
    """The mask's four-connected parts."""
    left = mask.copy()
    while left.any():
        part = np.zeros_like(mask)
        part.flat[int(left.argmax())] = True
        while True:
            grown = _grow(part, diagonal=False) & left
            if (grown == part).all():
                break
            part = grown
        left &= ~part
        yield part


def find(image: Image) -> list[Blob]:
    """The objects in a picture, largest first.

    Pixels far from the background (the median of the border) are foreground; its interior is labelled by the nearest
    named colour and split into connected parts, so that neither soft edges nor touching objects confuse the colours.
    """
    pixels = image.astype(np.float64)
    height, width, _ = pixels.shape
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    contrast = np.linalg.norm(pixels - background, axis=-1)
    foreground = contrast > 60
    interior = ~_grow(~foreground, diagonal=False)
    palette = np.array(list(COLOURS.values()), dtype=np.float64)
    nearest = np.linalg.norm(pixels[:, :, None] - palette, axis=-1).argmin(axis=-1)
    blobs: list[tuple[int, Blob]] = []
    for index, colour in enumerate(COLOURS):
        for core in _components(interior & (nearest == index)):
            if not (core & ~_grow(~core, diagonal=False)).any():
                continue  # A thin rim, where a soft edge passes near another colour.
            depth = np.median(contrast[core])
            mask = _grow(core, diagonal=True) & (contrast > depth / 2)
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
            blob = Blob(
                colour=colour,
                shape=_shape_of(mask[top:bottom, left:right]),
                x=float(left + right) / 2 / width,
                y=float(top + bottom) / 2 / height,
                extent=max(float(bottom - top) / height, float(right - left) / width),
            )
            blobs.append((int(mask.sum()), blob))
    return [blob for _, blob in sorted(blobs, key=lambda pair: -pair[0])]


def _shape_of(mask: Mask) -> str | None:
    """The shape whose ideal, drawn into the mask's box, overlaps it most; None if no shape overlaps it well."""
    height, width = mask.shape
    if max(height, width) > 1.35 * min(height, width):
        return None
    radius = max(height, width) / 2
    x = ((np.arange(width) + 0.5 - width / 2) * max(height, width) / width)[None, :]
    y = ((np.arange(height) + 0.5 - height / 2) * max(height, width) / height)[:, None]
    overlaps: dict[str, float] = {}
    for shape in SHAPES:
        ideal = _coverage(shape, x, y, radius) > 0.5
        overlaps[shape] = float((mask & ideal).sum() / (mask | ideal).sum())
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= MIN_OVERLAP else None


def _clearly(direction: tuple[int, int], x: float, y: float, least: float) -> bool:
    """Whether the offset (x, y) points mainly in the direction, by at least this much."""
    dx, dy = direction
    along, across = dx * x + dy * y, dx * y + dy * x
    return along >= least and along > abs(across)


def obeys(image: Image, caption: str | Scene) -> Obedience:
    """Which parts of the caption a picture obeys, judged from its pixels alone.

    The objects found are matched with those named in the way that obeys most.

    Raises:
        ValueError: the caption cannot be parsed.
    """
    scene = caption if isinstance(caption, Scene) else parse(caption)
    blobs = find(image)
    wanted = len(scene.items)
    if len(blobs) < wanted:
        return Obedience(count=False, colour=False, shape=False, size=False, position=False)
    verdicts = [_verdict(scene, chosen, len(blobs)) for chosen in itertools.permutations(blobs[: wanted + 2], wanted)]
    return max(verdicts, key=lambda v: (v.all, v.colour + v.shape + v.size + v.position))


def _verdict(scene: Scene, chosen: tuple[Blob, ...], found: int) -> Obedience:
    pairs = list(zip(scene.items, chosen, strict=True))
    first = chosen[0]
    position = True
    if scene.relation:
        second = chosen[1]
        position = _clearly(RELATIONS[scene.relation], first.x - second.x, first.y - second.y, 0.15)
    elif scene.place:
        position = _clearly(PLACES[scene.place], first.x - 0.5, first.y - 0.5, 0.12)
    return Obedience(
        count=found == len(scene.items),
        colour=all(item.colour == blob.colour for item, blob in pairs),
        shape=all(item.shape == blob.shape for item, blob in pairs),
        size=all(item.size in (None, blob.size) for item, blob in pairs),
        position=position,
    )
