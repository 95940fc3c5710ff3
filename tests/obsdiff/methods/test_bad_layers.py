"""Layers that are hard or broken, for every method: a usable result or an error that names the layer, never silence."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from obsdiff.core.units import Removal
from obsdiff.methods import Layer, Options, Pruned
from obsdiff.methods.table import METHODS
from obsdiff.sparsity import NM, Pattern, Unstructured
from obsdiff_runtime.errors import CalibrationError

WIDTH, ROWS = 64, 24
PATTERNS: Sequence[Pattern] = (NM(2, 4), NM(4, 8), Unstructured(0.5), Unstructured(0.7))
CALIBRATING = [name for name, method in METHODS.items() if method.calibrates]
REMOVING_UNITS = [name for name, method in METHODS.items() if method.removes_units]


def layer_of(x: Tensor, weight: Tensor | None = None) -> Layer:
    if weight is None:
        weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    wide = x.double()
    return Layer(name="blocks.7.ff", weight=weight, gram=wide.T @ wide / len(x), mean=wide.mean(dim=0))


def tokens(number: int) -> Tensor:
    return torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(0)) + 0.3


def units(width: int, remove: int) -> list[Removal]:
    return [Removal(units=WIDTH // width, width=width, number=remove, starts=(0,))]


def prune(method: str, layer: Layer) -> list[tuple[Pruned, int]]:
    """The results of every pattern and, where there is one, of the structured form, and how many weights go."""
    wanted = [int(ROWS * WIDTH * pattern.ratio) for pattern in PATTERNS]
    found = [METHODS[method].prune_weights([layer], pattern, Options())[0] for pattern in PATTERNS]
    if METHODS[method].removes_units:
        for width, remove in ((1, 20), (8, 3)):
            _, (pruned,) = METHODS[method].prune_units([layer], units(width, remove), Options())
            found.append(pruned)
            wanted.append(ROWS * width * remove)
    return list(zip(found, wanted, strict=True))


def check(method: str, layer: Layer) -> None:
    """A share counted per row or block may fall short of the layer's by less than one weight of each row."""
    for pruned, wanted in prune(method, layer):
        assert bool(pruned.weight.isfinite().all())
        assert bool((pruned.weight[~pruned.keep] == 0).all())
        assert wanted - ROWS < int((~pruned.keep).sum()) <= wanted
        assert 0 <= pruned.loss <= 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", [1, 10, 63])
def test_fewer_tokens_than_channels_are_no_obstacle(method: str, number: int) -> None:
    check(method, layer_of(tokens(number)))


@pytest.mark.parametrize("method", METHODS)
def test_channels_that_all_say_the_same_are_no_obstacle(method: str) -> None:
    check(method, layer_of(tokens(500)[:, :1].expand(500, WIDTH)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.5, -3.0, 0.0])
def test_weights_that_are_all_equal_lose_as_many_as_others(method: str, value: float) -> None:
    check(method, layer_of(tokens(500), torch.full((ROWS, WIDTH), value)))


@pytest.mark.parametrize("method", CALIBRATING)
def test_a_dead_channel_is_the_first_to_go_and_takes_nothing_over(method: str) -> None:
    x = tokens(500)
    x[:, 5] = 0
    layer = layer_of(x)
    check(method, layer)
    for pruned, _ in prune(method, layer):
        assert bool((pruned.weight[:, 5] == 0).all())


@pytest.mark.parametrize("method", CALIBRATING)
def test_a_layer_that_only_ever_saw_zeros_is_an_error(method: str) -> None:
    layer = layer_of(torch.zeros(100, WIDTH))
    with pytest.raises(CalibrationError, match=r"blocks\.7\.ff: .*every activation of this layer was zero"):
        METHODS[method].prune_weights([layer], NM(2, 4), Options())
    if METHODS[method].removes_units:
        with pytest.raises(CalibrationError, match=r"blocks\.7\.ff: .*every activation of this layer was zero"):
            METHODS[method].prune_units([layer], units(8, 1), Options())
