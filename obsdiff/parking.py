"""What is not needed for a while gives its memory back: it lies in a file, or in the memory of a GPU's host.

A pass that waits at a block (see pausing) keeps its hidden states in the frames of its own calls, where nothing can be
put in their place. So its tensors stay; their storages are emptied, and filled again before the pass is touched.
"""

import ctypes
import tempfile
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import psutil
import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from obsdiff import offloading, pausing
from obsdiff.pausing import Arguments, PausedPass
from obsdiff_export.quantities import size
from obsdiff_export.resources import free_bytes, gigabytes
from obsdiff_runtime.errors import ResourceError

ROOM: Final = 0.5
"""Share of what is free that waiting numbers may take: others need room too, and what is expected is an estimate."""

ADVICE: Final = "lower --draws, --kept-steps or --num-samples"


class Store(Protocol):
    """Where numbers lie meanwhile."""

    def put(self, values: Tensor) -> int:
        """Takes bytes, (count,) uint8, and says at what place they are now."""

    def get(self, place: int, values: Tensor) -> None:
        """Fills (count,) uint8 with what was put there."""

    def free(self, place: int, count: int) -> None:
        """Forgets what was put there."""

    def close(self) -> None:
        """Forgets everything."""


class Room:
    """Places in a row, of which the smallest that fits is taken, and neighbours that are free become one.

    Attributes:
        end: of the last place that ever was taken.
    """

    def __init__(self) -> None:
        self.end = 0
        self._gaps: list[tuple[int, int]] = []  # size and start, sorted
        self._sizes: dict[int, int] = {}  # by start
        self._starts: dict[int, int] = {}  # by end

    def take(self, count: int) -> int:
        """Where so many bytes are free."""
        index = bisect_left(self._gaps, (count, 0))
        if index < len(self._gaps):
            size, start = self._gaps[index]
            self._forget(start)
            if size > count:
                self._remember(start + count, size - count)
            return start
        start = self._starts.get(self.end, self.end)
        if start < self.end:
            self._forget(start)
        self.end = start + count
        return start

    def give(self, start: int, count: int) -> None:
        """They are free again."""
        if start in self._starts:
            before = self._starts[start]
            self._forget(before)
            start, count = before, start + count - before
        if start + count in self._sizes:
            more = self._sizes[start + count]
            self._forget(start + count)
            count += more
        self._remember(start, count)

    def _remember(self, start: int, size: int) -> None:
        insort(self._gaps, (size, start))
        self._sizes[start], self._starts[start + size] = size, start

    def _forget(self, start: int) -> None:
        size = self._sizes.pop(start)
        del self._starts[start + size]
        del self._gaps[bisect_left(self._gaps, (size, start))]


class File:
    """A file without a name: its room is given back however the process ends.

    Args:
        folder: on whose disk it lies.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._room = Room()

    @property
    def bytes(self) -> int:
        """That it takes on the disk."""
        return self._room.end

    def put(self, values: Tensor) -> int:
        place = self._room.take(len(values))
        here = values.cpu()
        left = _view(here)
        try:
            self._file.seek(place)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise ResourceError(
                f"{self._folder}: {error.strerror} for {size(self.bytes)} of hidden states; free some, or {ADVICE}"
            ) from error
        return place

    def get(self, place: int, values: Tensor) -> None:
        here = values if values.device.type == "cpu" else torch.empty(len(values), dtype=torch.uint8)
        left = _view(here)
        self._file.seek(place)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise ResourceError(f"{self._folder}: the file of hidden states was cut off")
            left = left[count:]
        if here is not values:
            values.copy_(here)

    def free(self, place: int, count: int) -> None:
        self._room.give(place, count)

    def close(self) -> None:
        self._file.close()


class Host:
    """The memory of a GPU's host; pinned, as copies are several times faster then."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._gaps: dict[int, list[int]] = {}  # places of buffers by size: to pin one takes long

    def put(self, values: Tensor) -> int:
        gaps = self._gaps.get(len(values))
        if not gaps:
            pinned = torch.cuda.is_available()
            self._buffers.append(torch.empty(len(values), dtype=torch.uint8, pin_memory=pinned))
        place = gaps.pop() if gaps else len(self._buffers) - 1
        self._buffers[place].copy_(values)
        return place

    def get(self, place: int, values: Tensor) -> None:
        values.copy_(self._buffers[place])

    def free(self, place: int, count: int) -> None:
        self._gaps.setdefault(count, []).append(place)

    def close(self) -> None:
        self._buffers.clear()


@dataclass(frozen=True, kw_only=True)
class _Parked:
    """A storage that is empty while its pass waits.

    Attributes:
        place: of its numbers in the store.
    """

    storage: UntypedStorage
    bytes: int
    place: int


@dataclass
class _Spot:
    """Of a pass.

    Attributes:
        shared: addresses of memory that is another's too; it stays.
        block: where the pass waited when it was left last.
        parked: what was taken from it then.
    """

    shared: frozenset[int]
    block: nn.Module | None = None
    parked: list[_Parked] = field(default_factory=list)


class Lot:
    """Takes what waits away from where it is computed with.

    Args:
        store: None leaves everything where it is.
    """

    def __init__(self, store: Store | None = None) -> None:
        self._store = store
        self._spots: dict[PausedPass, _Spot] = {}

    def keep(self, tree: Any) -> "Kept":
        """A tree of tensors for later."""
        return Kept(tree, self._store)

    def take(self, twins: Sequence[PausedPass]) -> None:
        """Takes over two passes or more of one call. Memory that they share is others' too, and stays."""
        if self._store is not None:
            shared = set.intersection(*({_address(tensor) for tensor in each.tensors()} for each in twins))
            for each in twins:
                self._spots[each] = _Spot(frozenset(shared))
                self._leave(each, self._store)

    @contextmanager
    def here(self, *passes: PausedPass) -> Iterator[None]:
        """Until the end these passes, which were taken over, are whole and can be run or go on."""
        if self._store is None:
            yield
            return
        for each in passes:
            for parked in self._spots[each].parked:
                parked.storage.resize_(parked.bytes)
                self._store.get(parked.place, _memory_of(parked.storage))
        yield
        for each in passes:
            self._leave(each, self._store)

    def _leave(self, waiting: PausedPass, store: Store) -> None:
        """What has lain in the store since the pass came to its block is there still: a block changes no input."""
        spot = self._spots[waiting]
        known = {parked.storage.data_ptr(): parked for parked in spot.parked}
        found: dict[int, _Parked] = {}
        for storage in () if waiting.block is None else (tensor.untyped_storage() for tensor in waiting.tensors()):
            address = storage.data_ptr()
            if not address or address in spot.shared or address in found or not storage.resizable():
                continue
            if waiting.block is spot.block and address in known:
                found[address] = known.pop(address)
            else:
                place = store.put(_memory_of(storage))
                found[address] = _Parked(storage=storage, bytes=storage.nbytes(), place=place)
        for parked in known.values():
            store.free(parked.place, parked.bytes)
        spot.block, spot.parked = waiting.block, list(found.values())
        for parked in spot.parked:
            parked.storage.resize_(0)


STAYING: Final = Lot()
"""Leaves everything where it is."""


class Kept:
    """A tree of tensors for later; without a store it stays as it is."""

    def __init__(self, tree: Any, store: Store | None) -> None:
        self._store = store
        self._tree = tree if store is None else tree_map_only(Tensor, partial(_Lying.of, store), tree)

    def tree(self) -> Any:
        """Out of a store in new memory."""
        return self._tree if self._store is None else tree_map_only(_Lying, _Lying.values, self._tree)

    def drop(self) -> None:
        """Gives its room to others; there is no tree any more."""
        if self._store is not None:
            tree_map_only(_Lying, _Lying.drop, self._tree)
        self._tree = None


@dataclass(frozen=True, kw_only=True)
class _Lying:
    """A tensor in a store; `like` has its shape and type, and no numbers."""

    store: Store
    place: int
    like: Tensor
    device: torch.device

    @classmethod
    def of(cls, store: Store, tensor: Tensor) -> "_Lying":
        values = tensor.detach().contiguous()
        place = store.put(values.reshape(-1).view(torch.uint8))
        return cls(store=store, place=place, like=torch.empty_like(values, device="meta"), device=tensor.device)

    def values(self) -> Tensor:
        found = torch.empty_like(self.like, device=self.device)
        self.store.get(self.place, found.view(-1).view(torch.uint8))
        return found

    def drop(self) -> None:
        self.store.free(self.place, self.like.nbytes)


@contextmanager
def lot(
    denoiser: nn.Module, blocks: Sequence[nn.Module], calls: Sequence[Arguments], folder: Path | None
) -> Iterator[Lot]:
    """Where what waits of a denoiser's calls lies, until the end; see `store`.

    Args:
        denoiser: whole.
        blocks: of it.
        calls: that will wait, all of about the same size.
        folder: on whose disk a file may lie; None: where the system has such files.

    Raises:
        ResourceError: there is room nowhere.
    """
    held, gpu = _held(denoiser, blocks, calls[0])
    offloaded = any(offloading.is_away(block) for block in blocks)
    expected = (2 * len(calls) + len(blocks)) * held
    found = store(expected, gpu, folder or Path(tempfile.gettempdir()), offloaded=offloaded)
    try:
        yield Lot(found)
    finally:
        if found is not None:
            found.close()


def store(expected: int, gpu: torch.device | None, folder: Path, *, offloaded: bool) -> Store | None:
    """Where so many bytes can lie; None: where they are.

    On a GPU they stay while half of its free memory holds them, unless the denoiser is offloaded; else they go to the
    host's memory, or to a file. On a CPU they go to a file, whose pages the system keeps in memory while it can, and
    stay only where the disk has no room.

    Raises:
        ResourceError: there is room nowhere.
    """
    if gpu is not None and not offloaded and expected <= ROOM * _free_on(gpu):
        return None
    in_memory = expected <= ROOM * psutil.virtual_memory().available
    if gpu is not None and in_memory:
        return Host()
    if expected <= ROOM * free_bytes(folder):
        return File(folder)
    if in_memory:
        return None
    raise ResourceError(
        f"about {gigabytes(expected)} of hidden states fit neither in memory nor on the disk of {folder}; {ADVICE}"
    )


@torch.no_grad()
def _held(denoiser: nn.Module, blocks: Sequence[nn.Module], call: Arguments) -> tuple[int, torch.device | None]:
    """Bytes that a pass holds at its first block beside what it was told, and the GPU where they are."""
    with pausing.gated(blocks):
        tensors = PausedPass(denoiser, call).tensors()
    told = {_address(leaf) for leaf in tree_leaves(call) if isinstance(leaf, Tensor)}
    found = {_address(each): each.untyped_storage() for each in tensors if _address(each) not in told}
    gpu = next((storage.device for storage in found.values() if storage.device.type == "cuda"), None)
    return sum(storage.nbytes() for storage in found.values()), gpu


def _free_on(gpu: torch.device) -> int:
    """With what torch keeps for itself and does not use."""
    free, _ = torch.cuda.mem_get_info(gpu)
    return free + torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _memory_of(storage: UntypedStorage) -> Tensor:
    """(bytes,) uint8, the very memory."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _view(values: Tensor) -> memoryview:
    """Of (count,) uint8 of the host; as a numpy array its storage could not be resized any more."""
    return memoryview((ctypes.c_ubyte * len(values)).from_address(values.data_ptr())).cast("B")
