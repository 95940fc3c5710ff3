"""Several processes give what one gives, and none of them waits for one that failed."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from obsdiff import gradients, launch, pruning, ranks, streaming, trajectories
from obsdiff.families.table import family_of
from obsdiff.job import computable, given
from obsdiff.launch import Place
from obsdiff.loading import load_pipeline
from obsdiff.resolving import resolve
from obsdiff.results import PackageResult
from obsdiff.settings import Settings
from obsdiff.solving import _parts
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.progress import silent

WHOLE = {"protect_first": 0, "protect_last": 0, "align": 1}
COMMON = {"steps": 2, "height": 32, "width": 32, "batch_size": 2, "max_sequence_length": 2, "draws": 1}
PLAIN = {"method_options": {"metric": 0}}
"""With a metric, what is solved from as few tokens as here is ill-conditioned: rounding then decides more."""

RUNS: dict[str, dict[str, Any]] = {
    "streamed 2:4": {"sparsity": "2:4", **PLAIN},
    "streamed 0.5": {"sparsity": "0.5", "allocation": "uniform", **PLAIN},
    "streamed units": {"sparsity": "structured:0.25", **WHOLE, **PLAIN},
    "streamed spared": {"sparsity": "2:4", "dense_share": 0.3, **PLAIN},
    "packages 2:4": {"sparsity": "2:4", "method": "obsdiff", "packages": 2},
    "packages units": {"sparsity": "structured:0.3+2:4", "method": "obsdiff", "packages": 2, **WHOLE},
}
WITH_METRIC = {"sparsity": "2:4"}
PROMPTS = ["a red circle", "a blue square", "a dog", "a cat", "a house"]
"""In batches of two: the ranks' shares differ, and the last batch is smaller."""

TORCHRUN = ("--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")

WORKER = """
import json, sys
import torch
from safetensors.torch import save_file
from obsdiff import cli, gradients, pruning, ranks
from obsdiff.job import computable
from obsdiff.loading import load_pipeline
from obsdiff.resolving import resolve
from obsdiff.settings import Settings

torch.set_num_threads(1)
measured, measure = {}, gradients.measure


def keep(*args, **options):
    measured.update(measure(*args, **options))
    return dict(measured)


gradients.measure = keep
runs, prompts, command = json.loads(sys.argv[1])
for name, settings in runs.items():
    loaded = load_pipeline("sd3", revision=None, variant=None, device="cpu")
    asked = Settings(**settings)
    recipe = resolve(asked, model="tiny", family=loaded.family, defaults=loaded.defaults, prompts=prompts)
    with ranks.joined(loaded.pipeline.device) as place:
        pruned = pruning.prune(loaded.pipeline, loaded.family, recipe, stored=computable(loaded))
    save_file(pruned.denoiser.state_dict(), f"{name} of {place.rank}.safetensors")
    eye = lambda each: torch.eye(len(each.scale), dtype=torch.float64)
    roots = {name: each.root(eye(each)).contiguous() for name, each in measured.items()}
    save_file(roots, f"metrics of {place.rank}.safetensors")
sys.argv = command
cli.main()  # joins once more
"""

FAILING = """
import torch
from obsdiff import ranks
from obsdiff_runtime.errors import CalibrationError

with ranks.joined(torch.device("cpu")) as place:
    ranks.add_up([torch.ones(1)])
    if place.rank == 1:
        raise CalibrationError("blocks.0: the activation is not finite")
    ranks.add_up([torch.ones(1)])
"""


@pytest.fixture(scope="module")
def together(sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What two ranks wrote: their weights of every run, and "pruned" by the command; and what they said."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "sd3").symlink_to(sd3_folder)
    (folder / "worker.py").write_text(WORKER)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    command = ["obsdiff", "prune", "sd3", "-o", "pruned", "--prompts-file", "prompts.txt", "--sparsity", "2:4"]
    command += [f"--set={key}={value}" for key, value in COMMON.items()] + ["--set=method_options.metric=0"]
    runs = {name: COMMON | settings for name, settings in {**RUNS, "with its metric": WITH_METRIC}.items()}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *TORCHRUN, "worker.py", json.dumps([runs, PROMPTS, command])],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_give_what_one_gives(name: str, together: tuple[Path, str], sd3_folder: Path) -> None:
    loaded = load_pipeline(str(sd3_folder), revision=None, variant=None, device="cpu")
    asked = Settings(**COMMON | RUNS[name])
    recipe = resolve(asked, model="tiny", family=loaded.family, defaults=loaded.defaults, prompts=PROMPTS)
    pruned = pruning.prune(loaded.pipeline, loaded.family, recipe, stored=computable(loaded))
    alone = pruned.denoiser.state_dict()
    first, second = (load_file(together[0] / f"{name} of {rank}.safetensors") for rank in range(2))
    assert {key: value.shape for key, value in first.items()} == {key: value.shape for key, value in alone.items()}
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), key
        assert _distance(first[key], value) < 1e-6, key


@pytest.mark.slow
def test_two_ranks_measure_what_one_does_and_prune_alike(together: tuple[Path, str], sd3_folder: Path) -> None:
    loaded = load_pipeline(str(sd3_folder), revision=None, variant=None, device="cpu")
    asked = Settings(**COMMON | WITH_METRIC)
    recipe = resolve(asked, model="tiny", family=loaded.family, defaults=loaded.defaults, prompts=PROMPTS)
    computable(loaded)
    calls = streaming.record(loaded.pipeline, loaded.family, recipe, silent)
    linears, weights = loaded.family.linears(loaded.denoiser), trajectories.weights(calls, recipe)
    alone = gradients.measure(loaded.denoiser, linears, calls, weights=weights)
    for rank in range(2):
        found = load_file(together[0] / f"metrics of {rank}.safetensors")
        assert found.keys() == alone.keys()
        for name, each in alone.items():
            exact = each.root(torch.eye(len(each.scale), dtype=torch.float64))
            assert _distance(found[name], exact) < 1e-4, name
    first, second = (load_file(together[0] / f"with its metric of {rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_the_first_rank_alone_writes_and_prints(together: tuple[Path, str]) -> None:
    folder, said = together
    written = load_file(folder / "pruned/transformer/diffusion_pytorch_model.safetensors")
    for key, value in load_file(folder / "streamed 2:4 of 0.safetensors").items():
        assert _distance(written[key], value) < 1e-6, key
    assert said.count("obsdiff export pruned") == 1
    assert not (folder / "pruned.journal").exists()


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING],
            cwd=tmp_path,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [1, 1]
    assert "RunError: another rank failed" in said[0]
    assert "CalibrationError: blocks.0: the activation is not finite" in said[1]


def test_every_item_is_the_share_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank in range(3):
        _as(monkeypatch, rank=rank, world=3)
        shares.append(list(ranks.share(range(7), "batches")))
    assert [item for share in shares for item in share] == list(range(7))
    assert {len(share) for share in shares} == {2, 3}


def test_more_ranks_than_batches_are_refused(
    build_pipeline: Callable[..., DiffusionPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = build_pipeline("sd3")
    loaded = given(pipeline)
    _as(monkeypatch, rank=0, world=4)
    for method in ("streamed", "obsdiff"):
        asked = Settings(**COMMON, sparsity="2:4", method=method)
        recipe = resolve(asked, model="tiny", family=loaded.family, defaults=loaded.defaults, prompts=PROMPTS)
        with pytest.raises(ConfigError, match="4 ranks, and 3 batches of prompts"):
            pruning.prune(pipeline, loaded.family, recipe)


def test_alone_nothing_is_exchanged() -> None:
    numbers = torch.arange(3.0)
    ranks.add_up([numbers])
    assert numbers.tolist() == [0, 1, 2]
    assert (ranks.rank(), ranks.world(), ranks.total(7), ranks.gather([1, 2])) == (0, 1, 7, [[1, 2]])
    results = ranks.solve([2.0, 3.0], lambda job: PackageResult(errors={"job": job}))
    assert [result.errors["job"] for result in results] == [2, 3]
    assert ranks.shared(None) is None


def test_a_place_needs_all_that_torchrun_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launch.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.place() == Place()
    for name, value in {"LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launch.place() == Place(rank=1, world=2, local=1)
    for wrong in ("2", "-1", "one", ""):
        monkeypatch.setenv("RANK", wrong)
        with pytest.raises(ConfigError, match=f"RANK={wrong}, WORLD_SIZE=2"):
            launch.place()


def test_every_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "place", lambda: Place(rank=3, world=4, local=1))
    assert ranks.device_of("cuda") == "cuda:1"
    assert ranks.device_of("cpu") == "cpu"
    with pytest.raises(ConfigError, match="each of 4 ranks needs a GPU of its own"):
        ranks.device_of("cuda:0")
    monkeypatch.setattr(ranks, "place", Place)
    assert ranks.device_of("cuda:0") == "cuda:0"


def test_what_shares_an_input_or_units_is_solved_on_one_rank(build_denoiser: Callable[..., nn.Module]) -> None:
    denoiser = build_denoiser("sd35")
    family = family_of(denoiser)
    linears = [linear for linear in family.linears(denoiser) if linear.block == 0]
    for tier in {linear.tier for linear in linears}:
        members = [linear for linear in linears if linear.tier == tier]
        parts = _parts(members, family.groups(denoiser))
        home = {linear.name: index for index, part in enumerate(parts) for linear in part}
        assert home.keys() == {linear.name for linear in members}
        for one in members:
            for other in members:
                if one.reads == other.reads:
                    assert home[one.name] == home[other.name]
        for group in family.groups(denoiser):
            assert len({home[name] for name in group.readers if name in home}) < 2


def _as(monkeypatch: pytest.MonkeyPatch, *, rank: int, world: int) -> None:
    here = Place(rank=rank, world=world, local=rank)
    monkeypatch.setattr(ranks, "_group", ranks._Group(place=here, device=torch.device("cpu")))


def _distance(found: Tensor, wanted: Tensor) -> float:
    """Relative to the norm of what is wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
