"""Parts of a block that are not run again: nothing that is seen or given may change by that."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinds import EVERY, latents_of
from obsdiff import glances, pausing
from obsdiff.families.table import family_of
from obsdiff.groups import LinearSpec
from obsdiff.pausing import PausedPass
from obsdiff.replays import Replay, Results, parts
from obsdiff.residuals import block_modules

WIDTH = 8


class Doubled(nn.Module):
    """A linear that runs `times`; counts how often it is called."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.linear, self.times, self.calls = nn.Linear(WIDTH, WIDTH), times, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for _ in range(self.times):
            x = self.linear(x)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = Doubled(), Doubled(times=2), Doubled()

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(self.twice(self.first(x)))
        return x + self.last(y)

    def calls(self) -> list[int]:
        return [part.calls for part in (self.first, self.twice, self.last)]


def spec(name: str, tier: int) -> LinearSpec:
    return LinearSpec(name=name, block=0, tier=tier, reads=name, in_features=WIDTH, out_features=WIDTH, tokens="image")


LINEARS = [spec("b.first.linear", 0), spec("b.twice.linear", 1), spec("b.last.linear", 2)]


@torch.no_grad()
def test_a_part_runs_once_and_gives_the_same_again_call_by_call() -> None:
    block, x, results = Block(), torch.ones(1, 2, WIDTH), Results()
    every, expected = parts(block, "b", LINEARS), block(x)
    before = block.calls()
    for _ in range(2):
        with Replay(every, results, [block.last.linear]).on():
            assert torch.equal(block(x), expected)
    assert [after - first for after, first in zip(block.calls(), before, strict=True)] == [1, 2, 2]
    assert {name: len(given) for name, given in results.items()} == {"first": 1, "twice": 2}


@torch.no_grad()
def test_what_ran_behind_a_part_that_changes_is_not_kept() -> None:
    block, results = Block(), Results()
    with Replay(parts(block, "b", LINEARS), results, [block.twice.linear]).on():
        block(torch.ones(1, 2, WIDTH))
    assert list(results) == ["first"]


@torch.no_grad()
def test_a_part_inside_which_something_is_watched_runs_again() -> None:
    block, x = Block(), torch.ones(1, 2, WIDTH)
    expected, every = block(x), parts(block, "b", LINEARS)

    def run(*watched: nn.Module) -> Tensor:
        with Replay(every, Results(first=[torch.zeros(1, 2, WIDTH)])).on(watched):
            given: Tensor = block(x)
        return given

    assert not torch.equal(run(), expected)
    assert torch.equal(run(block.first.linear), expected)
    assert "forward" not in vars(block.first)


@torch.no_grad()
def test_a_glance_runs_a_part_that_will_be_kept_to_its_end_and_no_further() -> None:
    block, results = Block(), Results()
    replay = Replay(parts(block, "b", LINEARS), results, [block.twice.linear, block.last.linear])
    look, _ = glances.glance(
        block, "b", LINEARS[:1], ((torch.ones(1, 2, WIDTH),), {}), want="outputs", streams=False, replay=replay
    )
    assert torch.equal(results["first"][0], look.outputs["b.first.linear"])
    assert block.calls() == [1, 0, 0]


@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_blocks_of_every_family_see_what_whole_runs_see(kind: str, build_denoiser: Callable[..., nn.Module]) -> None:
    """Weights change tier by tier, as they do when a block is pruned; the oracle runs everything every time."""
    denoiser: Any = build_denoiser(kind)
    family = family_of(denoiser)
    size = (4, 8) if kind == "wan" else latents_of(kind)
    inputs = family.example(denoiser, batch=2, size=size, text_tokens=7, pixels=(24, 32))
    linears, replayed = family.linears(denoiser), 0
    names = block_modules(linears)
    with pausing.gated([denoiser.get_submodule(name) for name in names]):
        waiting = PausedPass(denoiser, ((), {**family.arguments(inputs), "return_dict": False}))
        for index, name in enumerate(names):
            block, mine = denoiser.get_submodule(name), [each for each in linears if each.block == index]
            every, results = parts(block, name, mine), Results()
            for tier in sorted({each.tier for each in mine}):
                looked = [each for each in mine if each.tier == tier]
                changing = [denoiser.get_submodule(each.name) for each in mine if each.tier >= tier]
                idle = [each for each in mine if each.tier > tier]
                runs: list[tuple[nn.Module, dict[str, Any]]] = [
                    (block, {"idle": idle, "replay": Replay(every, results, changing)}),
                    (copy.deepcopy(block), {}),
                ]
                found, expected = (
                    glances.glance(each, name, looked, waiting.arguments, want="inputs", streams=True, **how)[0]
                    for each, how in runs
                )
                _equal(found, expected)
                for each in looked:
                    denoiser.get_parameter(f"{each.name}.weight").mul_(0.9)
            replayed += len(results)
            expected = pausing.run(block, waiting.arguments)
            with Replay(every, results).on():
                output = pausing.run(block, waiting.arguments)
            torch.testing.assert_close(output, expected, rtol=0, atol=0)
            waiting.resume(output)
    assert replayed


def _equal(found: glances.Glance, expected: glances.Glance) -> None:
    for name, value in expected.inputs.items():
        assert torch.equal(found.inputs[name], value)
    assert found.bases.keys() == expected.bases.keys()
    for name, value in expected.bases.items():
        assert torch.equal(found.bases[name], value)
