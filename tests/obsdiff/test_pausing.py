"""Passes that wait at every block: what comes out is what the plain call gives, and the model is left as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from greenlet import getcurrent
from torch import Tensor, nn

from kinds import EVERY, latents_of
from obsdiff import pausing
from obsdiff.families.table import family_of
from obsdiff.pausing import PausedPass
from obsdiff.residuals import block_modules
from obsdiff.sampling import velocity_of
from obsdiff_runtime.errors import ModelError

KINDS = EVERY
Build = Callable[..., nn.Module]


def blocks_of(denoiser: nn.Module) -> list[str]:
    return [*block_modules(family_of(denoiser).linears(denoiser))]


def arguments_of(denoiser: Any, rows: int = 2) -> pausing.Arguments:
    """Seeded inputs, of 7 text tokens."""
    family = family_of(denoiser)
    inputs = family.example(denoiser, batch=rows, size=latents_of(family.name), text_tokens=7, pixels=(24, 32))
    return (), {**family.arguments(inputs), "return_dict": False}


def finish(waiting: PausedPass) -> Any:
    """Runs a pass to its end, each block by itself; what it returned."""
    while waiting.block is not None:
        waiting.resume(pausing.run(waiting.block, waiting.arguments))
    return waiting.output


def left_as_it_was(denoiser: nn.Module) -> bool:
    return all("forward" not in module.__dict__ for module in denoiser.modules())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_pass_resumed_with_what_the_blocks_give_ends_like_the_plain_call_bit_for_bit(
    kind: str, build_denoiser: Build
) -> None:
    denoiser = build_denoiser(kind)
    args, kwargs = arguments_of(denoiser)
    expected = velocity_of(denoiser, denoiser(*args, **kwargs), kwargs)
    with pausing.gated([denoiser.get_submodule(name) for name in blocks_of(denoiser)]):
        assert torch.equal(velocity_of(denoiser, finish(PausedPass(denoiser, (args, kwargs))), kwargs), expected)
    assert left_as_it_was(denoiser)
    assert torch.equal(velocity_of(denoiser, denoiser(*args, **kwargs), kwargs), expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_pass_waits_at_every_block_once_and_in_order(kind: str, build_denoiser: Build) -> None:
    denoiser = build_denoiser(kind)
    names = {module: name for name, module in denoiser.named_modules()}
    visited = []
    with pausing.gated([denoiser.get_submodule(name) for name in blocks_of(denoiser)]):
        waiting = PausedPass(denoiser, arguments_of(denoiser))
        while waiting.block is not None:
            assert waiting.output is None
            visited.append(names[waiting.block])
            waiting.resume(pausing.run(waiting.block, waiting.arguments))
    assert visited == blocks_of(denoiser)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_two_passes_in_step_do_not_disturb_one_another(kind: str, build_denoiser: Build) -> None:
    denoiser = build_denoiser(kind)
    calls = [arguments_of(denoiser, rows) for rows in (1, 3)]
    expected = [velocity_of(denoiser, denoiser(*args, **kwargs), kwargs) for args, kwargs in calls]
    blocks = [denoiser.get_submodule(name) for name in blocks_of(denoiser)]
    with pausing.gated(blocks):
        passes = [PausedPass(denoiser, call) for call in calls]
        for name, block in zip(blocks_of(denoiser), blocks, strict=True):
            pausing.check_at(passes, block, name)
            for waiting in passes:
                waiting.resume(pausing.run(block, waiting.arguments))
    for waiting, output in zip(passes, expected, strict=True):
        assert waiting.block is None
        assert torch.equal(velocity_of(denoiser, waiting.output, {}), output)


@torch.no_grad()
def test_what_a_block_is_resumed_with_is_what_later_blocks_get(build_denoiser: Build) -> None:
    denoiser = build_denoiser("sd3")
    blocks = [denoiser.get_submodule(name) for name in blocks_of(denoiser)]
    with pausing.gated(blocks):
        waiting = PausedPass(denoiser, arguments_of(denoiser))
        text, image = pausing.run(blocks[0], waiting.arguments)
        waiting.resume((text + 1, image - 1))
        assert torch.equal(waiting.arguments[1]["hidden_states"], image - 1)
        assert torch.equal(waiting.arguments[1]["encoder_hidden_states"], text + 1)


@torch.no_grad()
def test_an_exception_leaves_no_gate_behind(build_denoiser: Build) -> None:
    denoiser = build_denoiser("sd3")
    args, kwargs = arguments_of(denoiser)
    expected = denoiser(*args, **kwargs)[0]
    blocks = [denoiser.get_submodule(name) for name in blocks_of(denoiser)]

    def killed() -> None:
        with pausing.gated(blocks):
            waiting = PausedPass(denoiser, (args, kwargs))
            waiting.resume(pausing.run(blocks[0], waiting.arguments))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert left_as_it_was(denoiser)
    assert torch.equal(denoiser(*args, **kwargs)[0], expected)


@torch.no_grad()
def test_an_exception_inside_a_pass_reaches_the_caller(build_denoiser: Build) -> None:
    denoiser = build_denoiser("sd3")
    blocks = [denoiser.get_submodule(name) for name in blocks_of(denoiser)]
    with pausing.gated(blocks):
        waiting = PausedPass(denoiser, arguments_of(denoiser))
        with pytest.raises(TypeError):
            waiting.resume(None)  # the transformer unpacks what a block gives
    assert left_as_it_was(denoiser)


@torch.no_grad()
def test_a_block_that_fails_by_itself_keeps_its_gate() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    block = Fails()
    with pausing.gated([block]):
        waiting = PausedPass(nn.Sequential(block), ((torch.ones(1),), {}))
        with pytest.raises(RuntimeError, match="broken"):
            pausing.run(block, waiting.arguments)
        assert "forward" in block.__dict__
    assert "forward" not in block.__dict__


@torch.no_grad()
def test_a_gated_block_runs_where_no_pass_is_under_way() -> None:
    block = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    expected = block(x)
    with pausing.gated([block]):
        assert getcurrent().parent is None
        assert torch.equal(block(x), expected)


class Swapped(nn.Module):
    """Runs its second block before its first, or one of them twice."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self._order = order

    def forward(self, x: Tensor) -> Tensor:
        for index in self._order:
            x = self.blocks[index](x)
        return x


@pytest.mark.parametrize("order", [(1, 0), (0, 0, 1), (0,), (0, 1, 0)])
@torch.no_grad()
def test_blocks_in_another_order_are_refused_by_name(order: tuple[int, ...]) -> None:
    denoiser = Swapped(order)

    def stream() -> None:
        with pausing.gated(list(denoiser.blocks)):
            waiting = PausedPass(denoiser, ((torch.ones(1, 2),), {}))
            for index, block in enumerate(denoiser.blocks):
                pausing.check_at([waiting], block, f"blocks.{index}")
                waiting.resume(pausing.run(block, waiting.arguments))
            pausing.check_over([waiting], "blocks.1")

    with pytest.raises(ModelError, match=r"blocks\.\d: .* once each.*--method obsdiff"):
        stream()
