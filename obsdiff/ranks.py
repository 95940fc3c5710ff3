"""One run on several processes, which torchrun starts: the ranks.

Every rank runs its share of the batches of prompts, with the noise that they have in a run of one process, and sums up
what the layers see. The sums are added up over the ranks before anything is made of them, so that all have the
statistics of all prompts, and the same bits. What is solved is then solved on one rank, in turn, and handed to the
others. Outside `joined` a process is alone, and all of this does nothing.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from obsdiff.launch import Place, place
from obsdiff.results import Journal, PackageResult
from obsdiff_runtime.errors import ConfigError, RunError, first_line

T = TypeVar("T")

TIMEOUT: Final = timedelta(minutes=30)
"""How long a rank waits for the others: for the longest solve, and for shares of prompts that differ by a batch."""


@dataclass(frozen=True, kw_only=True)
class _Group:
    place: Place
    device: torch.device


_ALONE: Final = _Group(place=Place(), device=torch.device("cpu"))
_group = _ALONE
_stores: list[Store] = []
"""Where the ranks first meet; one for each time they joined, as a used one still holds addresses that are gone."""


def rank() -> int:
    """The number of this process among those that work together; the first is 0."""
    return _group.place.rank


def world() -> int:
    """How many processes work together."""
    return _group.place.world


def device_of(asked: str | None) -> str:
    """The device of this process: what was asked for, else cuda where there is one; of several ranks each its own GPU.

    Raises:
        ConfigError: several ranks were told to use the same GPU.
    """
    here = place()
    device = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    if here.world == 1 or torch.device(device).type != "cuda":
        return device
    if torch.device(device).index is not None:
        raise ConfigError(f"--device {device}: each of {here.world} ranks needs a GPU of its own; say --device cuda")
    return f"cuda:{here.local}"


@contextmanager
def joined(device: torch.device) -> Iterator[Place]:
    """Until the end, the processes that torchrun started work together; gives the place of this one.

    A process group that exists already is used and left; one made here is destroyed.

    Args:
        device: of the model: gloo carries what is on a CPU, nccl what is on a GPU.

    Raises:
        ConfigError: the environment contradicts itself.
        RunError: the others did not come, or one of them failed.
    """
    global _group
    here = place()
    if here.world == 1:
        yield here
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    made = not distributed.is_initialized()
    if made:
        with _answered():
            distributed.init_process_group(
                backend,
                store=_store(),
                timeout=TIMEOUT,
                rank=here.rank,
                world_size=here.world,
                device_id=device if backend == "nccl" else None,
            )
    before, _group = _group, _Group(place=here, device=device)
    try:
        yield here
    except BaseException:
        made = made and backend == "gloo"  # nccl would wait for a collective that the others are still in
        raise
    finally:
        _group = before
        if made:
            distributed.destroy_process_group()


def share(items: Sequence[T], what: str) -> Sequence[T]:
    """The part of `items` that is this rank's: consecutive ones, as many as the others have or one more.

    Raises:
        ConfigError: there are more ranks than items, which `what` names.
    """
    if len(items) < world():
        raise ConfigError(
            f"{world()} ranks, and {len(items)} {what} to share: start fewer with --nproc-per-node, give more prompts "
            "or lower --batch-size"
        )
    bounds = [part * len(items) // world() for part in range(world() + 1)]
    return items[bounds[rank()] : bounds[rank() + 1]]


def add_up(tensors: Iterable[Tensor]) -> None:
    """Adds up each of these over all ranks, in place; all ranks get the same bits.

    Args:
        tensors: on every rank as many, of the same shapes and dtypes, contiguous.

    Raises:
        RunError: another rank failed.
    """
    if world() == 1:
        return
    for tensor in tensors:
        with _answered():
            there = tensor.to(_group.device)  # nccl carries only what is on a GPU
            distributed.all_reduce(there)
        if there is not tensor:
            tensor.copy_(there)


def total(number: int) -> int:
    """The sum of every rank's number."""
    there = torch.tensor([number])
    add_up([there])
    return int(there)


def gather(numbers: Sequence[int]) -> list[list[int]]:
    """The numbers of every rank, by rank; each may have another count of them."""
    counts = torch.zeros(world(), dtype=torch.int64)
    counts[rank()] = len(numbers)
    add_up([counts])
    everything = torch.zeros(int(counts.sum()), dtype=torch.int64)
    before = int(counts[: rank()].sum())
    everything[before : before + len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
    add_up([everything])
    return [part.tolist() for part in torch.split(everything, counts.tolist())]


def solve(jobs: Sequence[T], work: Callable[[T], PackageResult]) -> list[PackageResult]:
    """Does each job on one rank and gives all results to all ranks, in the order of the jobs.

    Args:
        jobs: the same on every rank.
        work: of a job; may depend on nothing but what is the same on every rank.
    """
    own = {index: work(job) for index, job in enumerate(jobs) if index % world() == rank()}
    results = [_handed(own.get(index), index % world()) for index in range(len(jobs))]
    return [result for result in results if result is not None]


def shared(journal: Journal | None) -> Journal | None:
    """The journal of the first rank for all of them: only that one reads and writes."""
    return journal if journal is None or world() == 1 else _SharedJournal(journal)


class _SharedJournal:
    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def read(self, package: str) -> PackageResult | None:
        return _handed(self._journal.read(package) if rank() == 0 else None, 0)

    def write(self, package: str, result: PackageResult) -> None:
        if rank() == 0:
            self._journal.write(package, result)


def _handed(result: PackageResult | None, source: int) -> PackageResult | None:
    """What the rank `source` has, on every rank."""
    if world() == 1:
        return result
    tensors, record = b"", b""
    if rank() == source and result is not None:
        record = json.dumps(result.to_json()).encode()
        tensors = save({name: weight.contiguous() for name, weight in result.weights.items()})
    record, tensors = _sent(record, source), _sent(tensors, source)
    if rank() == source or not record:
        return result
    return PackageResult.of_json(json.loads(record), load(tensors))


def _sent(data: bytes, source: int) -> bytes:
    """The bytes of the rank `source`, on every rank."""
    size = torch.tensor([len(data)], device=_group.device)
    with _answered():
        distributed.broadcast(size, source)
    if not int(size):
        return b""
    if rank() == source:
        message = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(_group.device)
    else:
        message = torch.empty(int(size), dtype=torch.uint8, device=_group.device)
    with _answered():
        distributed.broadcast(message, source)
    return data if rank() == source else message.cpu().numpy().tobytes()


def _store() -> Store:
    root = _stores[0] if _stores else next(rendezvous("env://", timeout=TIMEOUT))[0]
    _stores.append(PrefixStore(f"obsdiff/{len(_stores)}", root) if _stores else root)
    return _stores[-1]


@contextmanager
def _answered() -> Iterator[None]:
    """Says what it means when another rank does not take its part."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            f"another rank failed, or did not answer for {TIMEOUT.seconds // 60} minutes; its own message says why. "
            f"The same command with --resume continues ({first_line(error)})"
        ) from error
