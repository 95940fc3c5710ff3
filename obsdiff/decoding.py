"""What decoding will take, from an autoencoder's configuration alone: the memory of ONNX Runtime on a CPU, in float32.

The decoder runs on shapes alone, and every tensor that it makes is put where ONNX Runtime's allocator would put it:

    region    memory that the allocator gets at once: twice the last, up to MOST_AT_ONCE, or what a tensor needs
    chunk     part of a region that holds a tensor, or is free; free neighbours become one, but never across regions

So a picture of 768 pixels a side takes four fifths of one of 1024: a region holds one tensor of its widest level, and
not two. Memory counts that a tensor ever lay in. Tensors are made and given up in diffusers' order; of an operation
that is several in ONNX (`SPLIT`) those between count, too, and attention has all its scores at once.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Final

import diffusers
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from obsdiff import costs
from obsdiff.families.autoencoders import AUTOENCODERS, autoencoder
from obsdiff_export.component import Component
from obsdiff_export.quantities import size as in_words
from obsdiff_runtime.autoencoder import frame_scale, latent_frames, nearest_tile, tile_side, vae_scale
from obsdiff_runtime.bundle import DECODER, NEXT_DECODER

log = logging.getLogger(__name__)

FIRST_AT_ONCE: Final = 2**20
MOST_AT_ONCE: Final = 2**30
UNIT: Final = 256
"""Bytes; sizes of chunks are multiples."""

SPARE: Final = 128 * 2**20
"""A free chunk is divided where the rest is at least as much, or as large as the tensor."""

SPLIT: Final = {"aten.silu.default": 1, "aten.native_group_norm.default": 2}
"""Tensors between input and output: the sigmoid; what is normalised, before and after it is scaled."""

WORKSPACE: Final = 1.1
"""What convolutions hold while they compute, over all tensors: fitted to what `benchmarks/decoding.py` measured."""

PROCESS_BYTES: Final = 50_000_000
"""The interpreter, numpy and ONNX Runtime."""

TILE: Final = 512
"""Pixels per side of the tiles that are told of where decoding takes much; of pictures not larger, half of it."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Estimates of what a process holds at its peak that decodes one picture or film in float32.

    Attributes:
        whole_bytes: undivided.
        tile: pixels per side of tiles.
        tile_bytes: in such tiles.
    """

    whole_bytes: int
    tile: int
    tile_bytes: int

    def notes(self, denoiser_bytes: int) -> tuple[str, ...]:
        """What a user should know beside a denoiser with weights of so many bytes; nothing where tiles are no help."""
        if self.whole_bytes <= denoiser_bytes or self.tile_bytes >= self.whole_bytes:
            return ()
        return (
            f"decoding takes {in_words(self.whole_bytes)}, more than the denoiser's weights; in tiles (--vae-tile "
            f"{self.tile} of generate, serve, bench) {in_words(self.tile_bytes)}",
        )


def decoding(
    configs: Mapping[str, Mapping[str, Any]], *, height: int, width: int, num_frames: int | None, tile: int | None
) -> Decoding | None:
    """What decoding takes; None where there is no autoencoder, or none whose decoder is known and runs.

    Args:
        configs: of a pipeline, as `load_configs` gives them.
        height: in pixels.
        width: in pixels.
        num_frames: of a film; None of pictures.
        tile: pixels per side of tiles; None for usual ones.

    Raises:
        ConfigError: there are no such tiles.
    """
    config = configs.get("vae")
    name = configs.get("model_index", {}).get("vae", [None, None])[1]
    if config is None or name not in AUTOENCODERS:
        return None
    rest: tuple[Any, ...] = (vae_scale(config), latent_frames(num_frames or 1, frame_scale(config)))
    try:
        with torch.device("meta"):
            vae = getattr(diffusers, name).from_config(dict(config)).eval()
        components = {each.name: each for each in autoencoder(SimpleNamespace(vae=vae, config={}), height=64, width=64)}
        whole = _bytes(components, height, width, *rest)
    except (RuntimeError, TypeError, ValueError) as error:  # of a configuration that contradicts itself
        log.warning("what decoding takes is not known: this %s does not run: %s", name, error)
        return None
    own = {**config, "_class_name": name}
    usual = nearest_tile(TILE if max(height, width) > TILE else TILE // 2, own)
    side = tile_side(tile, usual, own) or usual
    tile_bytes = _bytes(components, min(side, height), min(side, width), *rest)
    return Decoding(whole_bytes=whole, tile=side, tile_bytes=tile_bytes)


def _bytes(components: Mapping[str, Component], height: int, width: int, scale: int, frames: int) -> int:
    """Of a film of so many latent frames; of the frames behind the first another network is loaded, too."""
    total = PROCESS_BYTES
    for name in (DECODER, NEXT_DECODER) if NEXT_DECODER in components and frames > 1 else (DECODER,):
        component = components[name]
        inputs = _resized(component, frames, height // scale, width // scale)
        caches = [tensor for port, tensor in inputs.items() if port != "latent_sample"]
        total += costs.weight_bytes(component.module) + round(WORKSPACE * peak_bytes(component, inputs))
        total += min(frames - 1, 2) * sum(cache.nbytes for cache in caches)  # those given, and those told, in numpy
    return total


def _resized(component: Component, frames: int, height: int, width: int) -> dict[str, Tensor]:
    """Its inputs for one picture with latents of that size, on the meta device: all have sides as their last axes.

    Where films are decoded whole, for all frames.
    """
    rows, columns = component.inputs["latent_sample"].shape[-2:]
    found = {}
    for name, example in component.inputs.items():
        *_, high, wide = example.shape
        inner = (example.shape[1], frames) if component.dynamic_axes[name].get(2) == "frames" else example.shape[1:-2]
        shape = (1, *inner, high * height // rows, wide * width // columns)
        found[name] = torch.empty(shape, dtype=torch.float32, device="meta")
    return found


def peak_bytes(component: Component, inputs: Mapping[str, Tensor]) -> int:
    """What ONNX Runtime holds beside weights and inputs in one call; on the meta device."""
    module, recorder = component.module, _Recorder()
    with torch.no_grad(), recorder:
        given = module(**inputs)
    held = {costs.storage(tensor) for tensor in (*module.parameters(), *module.buffers(), *inputs.values())}
    return recorder.touched_bytes(held, [recorder.origin(costs.storage(tensor)) for tensor in tree_leaves(given)])


@dataclass(frozen=True, kw_only=True)
class _Operation:
    """One operation: the tensors that it reads, and those that it makes with their bytes."""

    reads: tuple[int, ...]
    makes: Mapping[int, int]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operations that run inside it. What pads a tensor is none: ONNX Runtime has convolutions pad."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept: list[Any] = []  # so that no place is taken twice
        self._operations: list[_Operation] = []
        self._unpadded: dict[int, int] = {}

    def origin(self, place: int) -> int:
        return self._unpadded.get(place, place)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        reads = tuple(self.origin(costs.storage(tensor)) for tensor in read)
        made = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
        self._kept += [tensor.untyped_storage() for tensor in made]
        makes = {
            costs.storage(tensor): tensor.untyped_storage().nbytes()
            for tensor in made
            if self.origin(costs.storage(tensor)) not in reads
        }
        if func is torch.ops.aten.constant_pad_nd.default and makes:
            self._unpadded |= dict.fromkeys(makes, reads[0])
            return output
        for _ in range(SPLIT.get(str(func), 0)):
            between = -1 - len(self._operations)
            self._operations.append(_Operation(reads=reads, makes={between: next(iter(makes.values()))}))
            reads = (*reads, between) if func is torch.ops.aten.silu.default else (between,)
        self._operations.append(_Operation(reads=reads, makes=makes))
        return output

    def touched_bytes(self, held: set[int], given: Iterable[int]) -> int:
        """Bytes that tensors ever lay in, where each is given up behind its last reader; those `given` never are."""
        last = {place: index for index, each in enumerate(self._operations) for place in (*each.makes, *each.reads)}
        last |= dict.fromkeys(given, len(self._operations))
        arena, chunks = Arena(), dict[int, _Chunk]()
        for index, operation in enumerate(self._operations):
            for place, size in operation.makes.items():
                if place not in held and place not in chunks:
                    chunks[place] = arena.take(size)
            for place in [place for place in chunks if last[place] <= index]:
                arena.give(chunks.pop(place))
        return arena.touched_bytes


@dataclass(eq=False)
class _Chunk:
    region: int
    start: int
    size: int
    free: bool = True


@dataclass
class Arena:
    """ONNX Runtime's allocator of a CPU, as far as sizes go.

    Attributes:
        regions: chunks in their order, by region.
        touched: by region, the parts that tensors ever lay in.
    """

    regions: list[list[_Chunk]] = field(default_factory=list)
    touched: list[list[tuple[int, int]]] = field(default_factory=list)
    _next: int = FIRST_AT_ONCE

    @property
    def touched_bytes(self) -> int:
        total = 0
        for parts in self.touched:
            end = 0
            for start, stop in sorted(parts):
                total += max(stop - max(start, end), 0)
                end = max(end, stop)
        return total

    def take(self, size: int) -> _Chunk:
        """The smallest free chunk that holds so many bytes."""
        size = max(-(-size // UNIT), 1) * UNIT
        fitting = [chunk for chunks in self.regions for chunk in chunks if chunk.free and chunk.size >= size]
        chunk = min(fitting, key=lambda each: each.size) if fitting else self._extend(size)
        rest = chunk.size - size
        if rest >= min(size, SPARE):
            own = self.regions[chunk.region]
            own.insert(own.index(chunk) + 1, _Chunk(chunk.region, chunk.start + size, rest))
            chunk.size = size
        chunk.free = False
        self.touched[chunk.region].append((chunk.start, chunk.start + size))
        return chunk

    def give(self, chunk: _Chunk) -> None:
        """Takes it back."""
        own = self.regions[chunk.region]
        chunk.free, place = True, own.index(chunk)
        for left in (place, place - 1):
            if 0 <= left < len(own) - 1 and own[left].free and own[left + 1].free:
                own[left].size += own.pop(left + 1).size

    def _extend(self, size: int) -> _Chunk:
        fits = size <= self._next
        while size > self._next:
            self._next *= 2
        found = _Chunk(len(self.regions), 0, max(min(self._next, MOST_AT_ONCE), size))
        self._next = min(self._next * 2 if fits else self._next, MOST_AT_ONCE)
        self.regions.append([found])
        self.touched.append([])
        return found
