"""What a user asks for in shapes: `--profile 512,768x512,1024@1-4`, and trtexec's `--min-shapes` and its two others.

    profile   one or more of SIZE[-SIZE][@IMAGES[-IMAGES]], joined by commas
    SIZE      pixels: 512 for a square, 768x512 for width and height; two of them for a range
    IMAGES    drawn at once; two of them for a range; 1-4 where nothing is said

Each becomes one optimisation profile of the engine. Its best shape, which the builder times its kernels at, is the
served one: the bundle's own size where the profile holds it, else the largest; one image where it holds that.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from obsdiff_export.ports import Port
from obsdiff_export.profiles import Size, Sizes
from obsdiff_runtime.errors import ConfigError

IMAGES: Final = (1, 4)
"""Images at once where nothing is said."""

_ITEM: Final = re.compile(
    r"(?P<w0>[0-9]{1,6})(?:x(?P<h0>[0-9]{1,6}))?(?:-(?P<w1>[0-9]{1,6})(?:x(?P<h1>[0-9]{1,6}))?)?"
    r"(?:@(?P<few>[0-9]{1,5})(?:-(?P<many>[0-9]{1,5}))?)?"
)
_SHAPE: Final = re.compile(r"(?P<name>.+):(?P<shape>[0-9]{1,9}(?:x[0-9]{1,9})*)")


@dataclass(frozen=True, kw_only=True)
class SizeProfile:
    """One item of `--profile`.

    Attributes:
        smallest, largest: (width, height) in pixels.
        images: fewest and most at once.
    """

    smallest: tuple[int, int]
    largest: tuple[int, int]
    images: tuple[int, int] = IMAGES

    def __str__(self) -> str:
        ends = dict.fromkeys((_size(*self.smallest), _size(*self.largest)))
        images = dict.fromkeys(map(str, self.images))
        return "-".join(ends) + ("" if self.images == IMAGES else "@" + "-".join(images))


@dataclass(frozen=True, kw_only=True)
class Served:
    """What engines are for.

    Attributes:
        sizes: of every dynamic axis at the served size: a bundle's own table.
        rows: of the denoiser's batch for one image: 2 under guidance.
        scale: pixels per side of a latent pixel.
        step: sizes in pixels must be multiples of it.
        largest: pixels per side that the denoiser can draw, None where there is no limit.
        tile: pixels per side of the tiles that pictures go through the autoencoder in; None where they go whole.
        read_times: how many times as high and wide those are that they are read in.
    """

    sizes: Sizes
    rows: int
    scale: int
    step: int
    largest: int | None
    tile: int | None = None
    read_times: int = 1

    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return _best(self.sizes["width"]) * self.scale, _best(self.sizes["height"]) * self.scale

    def own(self) -> SizeProfile:
        """The profile where none is asked for."""
        return SizeProfile(smallest=self.size(), largest=self.size())


def parse_profiles(texts: Sequence[str]) -> tuple[SizeProfile, ...]:
    """The items of `--profile`, which may be repeated.

    Raises:
        ConfigError: one is none, or its ends are in the wrong order.
    """
    items = [item.strip() for text in texts for item in text.split(",")]
    return tuple(dict.fromkeys(_parse(item) for item in items))


def tables(asked: Sequence[SizeProfile], served: Served, *, denoiser: bool) -> tuple[Sizes, ...]:
    """The sizes of all dynamic axes, one table per profile.

    The denoiser takes `rows` rows per image, or one where guidance is off. The other networks are given one image or
    one prompt at a time, and may be given more.

    Args:
        asked: in pixels.
        served: what the bundle is exported for.
        denoiser: whether they are the denoiser's.

    Raises:
        ConfigError: a size that cannot be drawn.
    """
    return tuple(_table(item, served, denoiser) for item in asked)


def in_tiles(table: Sizes, served: Served) -> Sizes:
    """A table for networks that are given one tile at a time: any part of a tile, timed at a whole one."""
    if served.tile is None:
        return table
    sizes: dict[str, Size] = {"batch": 1}
    for name in ("height", "width"):
        most = _ends(table[name])[2]
        made, read = (min(times * served.tile // served.scale, most) for times in (1, served.read_times))
        sizes |= {name: (1, made, made), f"image_{name}": (served.scale, read * served.scale, read * served.scale)}
    return {**table, **sizes}


def parse_shapes(flag: str, text: str | None) -> dict[str, tuple[int, ...]]:
    """trtexec's spelling: "name:1x16x64x64,other:1" -> shapes by input.

    Raises:
        ConfigError: it is not of that form, or names an input twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for item in text.split(",") if text is not None else ():
        found = _SHAPE.fullmatch(item.strip())
        if found is None:
            raise ConfigError(f"{flag} {item.strip()!r}: expected name:1x16x64x64, several joined by commas")
        if found["name"] in shapes:
            raise ConfigError(f"{flag}: {found['name']} is given twice")
        shapes[found["name"]] = tuple(map(int, found["shape"].split("x")))
    return shapes


@dataclass(frozen=True, kw_only=True)
class ShapeBounds:
    """trtexec's three flags: input name -> shape. Without `opt` it is `max`; without another one it is `opt`."""

    min: Mapping[str, tuple[int, ...]]
    opt: Mapping[str, tuple[int, ...]]
    max: Mapping[str, tuple[int, ...]]

    def __bool__(self) -> bool:
        return bool(self.min or self.opt or self.max)

    def sizes(self, inputs: Sequence[Port]) -> dict[str, Size]:
        """What they say of the dynamic axes of these inputs.

        Raises:
            ConfigError: another number of axes, another size of an axis that is fixed, or two sizes for one symbol.
        """
        found: dict[str, Size] = {}
        for port in inputs:
            for axis, triple in enumerate(self._triples(port)):
                symbol = port.shape[axis]
                if isinstance(symbol, int) and triple != (symbol,) * 3:
                    raise ConfigError(f"axis {axis} of {port.name} is {symbol} in the graph, not {_told(triple)}")
                if isinstance(symbol, str) and found.setdefault(symbol, triple) != triple:
                    other = f"another input has {_told(found[symbol])}"
                    raise ConfigError(f"{port.name} has {symbol} {_told(triple)}, {other}; they are one")
        return found

    def require_known(self, names: Sequence[str]) -> None:
        """Raises ConfigError for an input that no graph has; names the nearest."""
        for name in {**self.min, **self.opt, **self.max}:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(set(names)))}"
                raise ConfigError(f"{name}: no graph has an input of that name; {hint}")

    def _triples(self, port: Port) -> list[tuple[int, int, int]]:
        """(min, opt, max) per axis; none where nothing is said of the input."""
        high = self.max.get(port.name) or self.opt.get(port.name) or self.min.get(port.name)
        if high is None:
            return []
        best = self.opt.get(port.name, high)
        high = self.max.get(port.name, best)
        low = self.min.get(port.name, best)
        for shape in (low, best, high):
            if len(shape) != len(port.shape):
                raise ConfigError(
                    f"{port.name} has {len(port.shape)} axes in the graph, {_shape(shape)} has {len(shape)}"
                )
        return list(zip(low, best, high, strict=True))


def _parse(item: str) -> SizeProfile:
    found = _ITEM.fullmatch(item)
    if found is None:
        raise ConfigError(
            f"--profile {item!r}: expected a size in pixels such as 512, 768x512 or 512-1024, and @4 or @1-4 for images"
        )
    w0, h0, w1, h1, few, many = (None if text is None else int(text) for text in found.group(*_FIELDS))
    smallest = (w0 or 0, (w0 if h0 is None else h0) or 0)
    largest = smallest if w1 is None else (w1, w1 if h1 is None else h1)
    images = IMAGES if few is None else (few, few if many is None else many)
    if min(*smallest, *images) < 1:
        raise ConfigError(f"--profile {item}: sizes and numbers of images are 1 or more")
    if smallest[0] > largest[0] or smallest[1] > largest[1] or images[0] > images[1]:
        raise ConfigError(f"--profile {item}: a range is from its smaller to its larger end")
    return SizeProfile(smallest=smallest, largest=largest, images=images)


_FIELDS: Final = ("w0", "h0", "w1", "h1", "few", "many")


def _table(item: SizeProfile, served: Served, denoiser: bool) -> Sizes:
    table = dict(served.sizes)
    for axis, name in enumerate(("width", "height")):
        low, high, own = item.smallest[axis], item.largest[axis], served.size()[axis]
        for pixels in (low, high):
            _check(item, name, pixels, served)
        best = own if low <= own <= high else high
        table[name] = (low // served.scale, best // served.scale, high // served.scale)
        table[f"image_{name}"] = (low, best, high)
    few, many = item.images
    one = min(max(1, few), many)
    table["batch"] = (few, one * served.rows, many * served.rows) if denoiser else (1, 1, many)
    return table


def _check(item: SizeProfile, name: str, pixels: int, served: Served) -> None:
    if pixels % served.step:
        below = max(pixels // served.step * served.step, served.step)
        raise ConfigError(
            f"--profile {item}: {name} {pixels} is no multiple of {served.step}; near are {below} and "
            f"{below + served.step}"
        )
    if served.largest is not None and pixels > served.largest:
        raise ConfigError(f"--profile {item}: this denoiser draws at most {served.largest} pixels a side, not {pixels}")


def _best(size: Size) -> int:
    return _ends(size)[1]


def _ends(size: Size) -> tuple[int, int, int]:
    return (size, size, size) if isinstance(size, int) else size


def _size(width: int, height: int) -> str:
    return str(width) if width == height else f"{width}x{height}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _told(size: Size) -> str:
    return str(size) if isinstance(size, int) else "/".join(map(str, dict.fromkeys(size)))
