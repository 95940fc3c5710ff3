"""What waits gives its memory back, and comes back bit by bit."""

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import obsdiff
from kinds import EVERY, latents_of
from obsdiff import parking, pausing, pruning
from obsdiff.families.table import family_of
from obsdiff.job import given, open_job
from obsdiff.parking import File, Host, Lot, Room, Store
from obsdiff.pausing import PausedPass
from obsdiff.residuals import block_modules
from obsdiff.resolving import resolve
from obsdiff.sampling import velocity_of
from obsdiff.settings import Settings
from obsdiff_runtime.errors import ResourceError

GB = 10**9
PROMPTS = ("a red circle", "a blue square")


@pytest.fixture
def file(tmp_path: Path) -> Any:
    found = File(tmp_path)
    yield found
    found.close()


def test_room_is_taken_where_it_fits_and_neighbours_become_one() -> None:
    room, chance, taken = Room(), random.Random(0), dict[int, int]()
    live = most = 0
    for _ in range(3000):
        if taken and chance.random() < 0.5:
            start = chance.choice(list(taken))
            live -= taken[start]
            room.give(start, taken.pop(start))
        else:
            count = chance.choice((7, 7, 7, 30, 64, 500))
            start = room.take(count)
            assert all(start + count <= other or other + size <= start for other, size in taken.items())
            taken[start] = count
            live += count
            most = max(most, live)
    assert most <= room.end < 1.3 * most
    for start, count in taken.items():
        room.give(start, count)
    end = room.end
    assert room.take(end) == 0
    assert room.end == end


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("sd15", {}),
        ("sdxl", {}),
        ("hunyuan", {}),
        ("sana", {}),
        ("lumina2", {}),
        ("ltx", {"num_frames": 17}),
        ("wan", {"num_frames": 9}),
        ("controlnet", {"references": True}),
    ],
)
def test_a_plan_counts_what_waits_on_the_disk(
    kind: str,
    more: dict[str, Any],
    build_pipeline: Callable[[str], DiffusionPipeline],
    picture_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Skip connections, waves of places and what a ControlNet hands on among it."""
    made: list[File] = []

    def remembered(_: int, __: object, folder: Path, *, offloaded: bool) -> File:
        made.append(File(folder))
        return made[-1]

    monkeypatch.setattr(parking, "store", remembered)
    build_pipeline(kind).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    asked: dict[str, Any] = {"sparsity": "2:4", "prompts_file": str(tmp_path / "prompts.txt"), "draws": 2, "steps": 4}
    asked |= {"height": 128, "width": 128, "batch_size": 2, "protect_first": 0, **more}
    asked |= {"references": str(picture_folder)} if "references" in more else {}
    planned = open_job(Settings(model=str(tmp_path / "model"), **asked)).plan().streams
    assert planned is not None
    obsdiff.prune(tmp_path / "model", **asked)
    assert planned.waiting_bytes == pytest.approx(max(each.bytes for each in made), rel=0.25)


def prepared(denoiser: Any, kind: str) -> tuple[list[nn.Module], dict[str, Any]]:
    """Its blocks, and what a call of two rows is told."""
    family = family_of(denoiser)
    size = (4, 8) if kind == "wan" else latents_of(kind)
    inputs = family.example(denoiser, batch=2, size=size, text_tokens=7, pixels=(24, 32))
    blocks = [denoiser.get_submodule(name) for name in block_modules(family.linears(denoiser))]
    return blocks, {**family.arguments(inputs), "return_dict": False}


def held(waiting: PausedPass) -> int:
    return sum({each.untyped_storage(): each.untyped_storage().nbytes() for each in waiting.tensors()}.values())


@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_passes_of_every_family_wait_without_memory_and_end_like_the_plain_call(
    kind: str, build_denoiser: Callable[..., nn.Module], file: File
) -> None:
    denoiser = build_denoiser(kind)
    blocks, told = prepared(denoiser, kind)
    expected = velocity_of(denoiser, denoiser(**told), told)
    lot = Lot(file)
    with pausing.gated(blocks):
        twins = [PausedPass(denoiser, ((), told)) for _ in range(2)]
        one, other = ({each.untyped_storage() for each in waiting.tensors()} for waiting in twins)
        shared = sum(storage.nbytes() for storage in one & other)  # the caller's, and the denoiser's own
        lot.take(twins)
        for place in range(len(blocks)):
            for waiting in twins:
                args, kwargs = waiting.arguments
                leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
                assert not leaves[0].untyped_storage().nbytes(), f"at block {place}"
                assert held(waiting) <= shared
                with lot.here(waiting):
                    assert waiting.block is not None
                    waiting.resume(pausing.run(waiting.block, waiting.arguments))
        for waiting in twins:
            assert torch.equal(velocity_of(denoiser, waiting.output, told), expected)


@torch.no_grad()
def test_skip_connections_wait_in_the_file_too(build_denoiser: Callable[..., nn.Module], file: File) -> None:
    """They are in the frames of the pass alone, no block is told them."""
    denoiser = build_denoiser("sd15")
    blocks, told = prepared(denoiser, "sd15")
    with pausing.gated(blocks):
        twins = [PausedPass(denoiser, ((), told)) for _ in range(2)]
        lot = Lot(file)
        lot.take(twins)
        waiting = twins[0]
        while waiting.block is not blocks[-1]:
            with lot.here(waiting):
                assert waiting.block is not None
                waiting.resume(pausing.run(waiting.block, waiting.arguments))
        empty = held(waiting)
        with lot.here(waiting):
            args, kwargs = waiting.arguments
            arguments = {each.untyped_storage() for each in (*args, *kwargs.values()) if isinstance(each, Tensor)}
            assert held(waiting) - empty > 3 * sum(storage.nbytes() for storage in arguments)


@torch.no_grad()
def test_the_file_is_as_long_as_what_waits_at_once(build_denoiser: Callable[..., nn.Module], file: File) -> None:
    denoiser = build_denoiser("sd3", num_layers=4)
    blocks, told = prepared(denoiser, "sd3")
    lot = Lot(file)
    with pausing.gated(blocks):
        twins = [PausedPass(denoiser, ((), told)) for _ in range(2)]
        lot.take(twins)
        first = file.bytes
        for _ in blocks:
            for waiting in twins:
                with lot.here(waiting):  # looked at, and left where it waits
                    pass
                with lot.here(waiting):
                    assert waiting.block is not None
                    waiting.resume(pausing.run(waiting.block, waiting.arguments))
        assert file.bytes <= 1.5 * first


@torch.no_grad()
def test_results_of_parts_wait_as_well(build_denoiser: Callable[..., nn.Module], file: File) -> None:
    denoiser = build_denoiser("sd3")
    blocks, told = prepared(denoiser, "sd3")
    lot = Lot(file)
    with pausing.gated(blocks):
        twins = [PausedPass(denoiser, ((), told)) for _ in range(2)]
        lot.take(twins)
        with lot.here(*twins):
            for number, waiting in enumerate(twins):
                waiting.results["attn"] = [(torch.full((3, 4), 7.0 + number), None)]
        kept = [waiting.results["attn"][0][0] for waiting in twins]
        assert [each.untyped_storage().nbytes() for each in kept] == [0, 0]
        with lot.here(*twins):
            assert [each.unique().tolist() for each in kept] == [[7.0], [8.0]]
            assert twins[0].block is not None
            twins[0].resume(pausing.run(twins[0].block, twins[0].arguments))
            assert not twins[0].results


@pytest.mark.parametrize("make", [lambda _: None, lambda _: Host(), File], ids=["here", "host", "file"])
def test_a_tree_comes_back(make: Callable[[Path], Store | None], tmp_path: Path) -> None:
    tree = {
        "halves": torch.arange(6).bfloat16().reshape(2, 3).T,
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "view": torch.arange(100)[10:13],
        "empty": torch.empty(0, 4),
        "others": [None, "text", (torch.tensor([True, False]), 2)],
    }
    store = make(tmp_path)
    kept = Lot(store).keep(tree)
    for _ in range(2):
        found = kept.tree()
        assert found["others"][:2] == [None, "text"]
        assert found["others"][2][0].tolist() == [True, False]
        for name in ("halves", "scalar", "view", "empty"):
            assert torch.equal(found[name], tree[name])  # type: ignore[arg-type]
            assert found[name].dtype == tree[name].dtype  # type: ignore[attr-defined]
    kept.drop()
    if store is not None:
        store.close()


@pytest.mark.parametrize("make", [lambda _: Host(), File], ids=["host", "file"])
def test_room_that_is_free_is_taken_again(make: Callable[[Path], Store], tmp_path: Path) -> None:
    store = make(tmp_path)
    one, two = (torch.full((100,), value, dtype=torch.uint8) for value in (1, 2))
    first, second = store.put(one), store.put(one)
    store.free(first, 100)
    assert store.put(two) == first
    assert store.put(torch.zeros(60, dtype=torch.uint8)) not in (first, second)
    for place, value in ((first, 2), (second, 1)):
        found = torch.empty(100, dtype=torch.uint8)
        store.get(place, found)
        assert found.unique().tolist() == [value]
    store.close()


def test_a_full_disk_says_what_to_lower(file: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def seek(self, place: int) -> None:
            pass

        def write(self, data: memoryview) -> int:
            if len(data) <= 50:
                raise OSError(errno.ENOSPC, "No space left on device")
            return 50

        def close(self) -> None:
            pass

    file.close()
    monkeypatch.setattr(file, "_file", Full())
    with pytest.raises(ResourceError, match=r"No space left on device for 100 B of .*; free some, or lower --draws"):
        file.put(torch.zeros(100, dtype=torch.uint8))


def test_a_file_that_is_cut_off_is_noticed(file: File) -> None:
    place = file.put(torch.arange(100, dtype=torch.uint8))
    file._file.truncate(60)
    with pytest.raises(ResourceError, match="was cut off"):
        file.get(place, torch.empty(100, dtype=torch.uint8))


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("gpu", "offloaded", "free", "memory", "disk", "where"),
    [
        (None, False, 0, 100, 100, File),
        (None, False, 0, 100, 1, None),
        (GPU, False, 100, 100, 100, None),
        (GPU, True, 100, 100, 100, Host),
        (GPU, False, 1, 100, 100, Host),
        (GPU, False, 1, 1, 100, File),
    ],
    ids=["cpu", "cpu, small disk", "gpu", "offloaded", "small gpu", "small gpu and host"],
)
def test_where_it_lies(
    gpu: torch.device | None,
    offloaded: bool,
    free: int,
    memory: int,
    disk: int,
    where: type[Store] | None,
    tmp_path: Path,
    room: Callable[[int, int, int], None],
) -> None:
    room(free, memory, disk)
    found = parking.store(10 * GB, gpu, tmp_path, offloaded=offloaded)
    assert (None if found is None else type(found)) is where
    if found is not None:
        found.close()
    room(1, 1, 1)
    with pytest.raises(ResourceError, match=r"about 10.0 GB of hidden states fit neither in memory nor on the disk of"):
        parking.store(10 * GB, gpu, tmp_path, offloaded=offloaded)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int, int], None]:
    """room(GPU, memory, disk): what is free, in GB."""

    def free(gpu: int, memory: int, disk: int) -> None:
        class Memory:
            available = memory * GB

        monkeypatch.setattr(parking, "_free_on", lambda _: gpu * GB)
        monkeypatch.setattr(parking.psutil, "virtual_memory", Memory)
        monkeypatch.setattr(parking, "free_bytes", lambda _: disk * GB)

    return free


@pytest.mark.parametrize(("kind", "sparsity"), [("sd3", "2:4"), ("sd15", "2:4"), ("sd3", "0.5"), ("flux", "2:4")])
def test_where_it_lies_changes_no_bit(
    kind: str,
    sparsity: str,
    build_pipeline: Callable[[str], DiffusionPipeline],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[Store] = []

    def made(store: Store | None) -> Callable[..., Store | None]:
        used.extend([store] if store is not None else [])
        return lambda *_, **__: store

    found = []
    for store in (None, Host(), File(tmp_path)):
        monkeypatch.setattr(parking, "store", made(store))
        loaded = given(build_pipeline(kind))
        settings = Settings(
            sparsity=sparsity,
            steps=3,
            height=32,
            width=32,
            batch_size=1,
            draws=1,
            max_sequence_length=None if kind == "sd15" else 4,
        )
        recipe = resolve(settings, model="m", family=loaded.family, defaults=loaded.defaults, prompts=PROMPTS)
        found.append(pruning.prune(loaded.pipeline, loaded.family, recipe).denoiser.state_dict())
    assert isinstance(used[1], File)
    assert used[1].bytes
    for other in found[1:]:
        assert all(torch.equal(other[name], weight) for name, weight in found[0].items())


def test_nothing_is_left_in_the_folder(build_pipeline: Callable[[str], DiffusionPipeline], tmp_path: Path) -> None:
    loaded = given(build_pipeline("sd3"))
    settings = Settings(sparsity="2:4", steps=2, height=32, width=32, draws=1, max_sequence_length=4)
    recipe = resolve(settings, model="m", family=loaded.family, defaults=loaded.defaults, prompts=PROMPTS)
    seen: list[list[Path]] = []
    pruning.prune(
        loaded.pipeline, loaded.family, recipe, scratch=tmp_path, progress=lambda *_: seen.append([*tmp_path.iterdir()])
    )
    assert seen
    assert not any(seen)
    assert not [*tmp_path.iterdir()]
