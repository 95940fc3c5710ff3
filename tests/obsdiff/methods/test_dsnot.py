"""DSnoT against the same rule written down naively, and what its swaps must leave as it was."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from obsdiff.core.gram import GramAccumulator
from obsdiff.core.units import Removal
from obsdiff.methods import Layer, Options, Pruned, dsnot, wanda
from obsdiff.methods.dsnot import swap
from obsdiff.sparsity import NM, Pattern, Unstructured
from obsdiff_runtime.errors import CalibrationError, ConfigError

PATTERNS: Sequence[Pattern] = (NM(2, 4), NM(1, 4), NM(4, 8), Unstructured(0.5), Unstructured(0.7))


def layer_of(rows: int = 40, width: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32) -> Layer:
    """Inputs whose means are as large as what varies, as after a GELU; more rows than one part holds where asked."""
    generator = torch.Generator().manual_seed(seed)
    scale, mean = torch.rand(width, generator=generator) + 0.1, torch.randn(width, generator=generator)
    accumulator = GramAccumulator(width)
    accumulator.add(torch.randn(500, width, generator=generator) * scale + mean)
    gram = accumulator.gram()
    weight = torch.randn(rows, width, generator=generator).to(dtype)
    return Layer(name="blocks.7.ff", weight=weight, gram=gram.matrix, mean=gram.mean)


def prune(layer: Layer, pattern: Pattern) -> tuple[Pruned, Pruned]:
    """Wanda's result and DSnoT's."""
    (start,), (pruned,) = (method.prune_weights([layer], pattern, Options()) for method in (wanda, dsnot))
    return start, pruned


def expected_error(layer: Layer, keep: Tensor) -> Tensor:
    assert layer.mean is not None
    return ((layer.weight.double() * ~keep) @ layer.mean).abs()


def naive(layer: Layer, keep: Tensor, group: int) -> Tensor:
    """Row by row and weight by weight, from the rule in the module's docstring."""
    assert layer.gram is not None
    assert layer.mean is not None
    keep = keep.clone()
    energy, mean = layer.gram.diagonal().tolist(), layer.mean.tolist()
    for r, w in enumerate(layer.weight.double().tolist()):
        columns = range(len(w))
        lost = {j for j in columns if not keep[r, j]}
        kept = {j for j in columns if keep[r, j]}
        error = sum(w[j] * mean[j] for j in lost)
        for _ in range(50):
            sign = 1 if error > 0 else -1
            against = {j for j in kept if sign * w[j] * mean[j] < 0}
            wanted = {j for j in lost if sign * w[j] * mean[j] > 0 and any(k // group == j // group for k in against)}
            if not wanted:
                break
            grow = max(wanted, key=lambda j: sign * w[j] * mean[j] / (energy[j] - mean[j] ** 2))
            near = [j for j in against if j // group == grow // group]
            drop = min(near, key=lambda j: abs(w[j]) * energy[j] ** 0.5)
            after = error - w[grow] * mean[grow] + w[drop] * mean[drop]
            if abs(after) >= abs(error):
                break
            error = after
            keep[r, grow], keep[r, drop] = True, False
            lost.remove(grow)
            kept.remove(drop)
    return keep


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_swaps_are_those_of_the_rule_written_down_naively(pattern: Pattern) -> None:
    layer = layer_of()
    start, pruned = prune(layer, pattern)
    group = pattern.m if isinstance(pattern, NM) else 64
    assert torch.equal(pruned.keep, naive(layer, start.keep, group))
    assert not torch.equal(pruned.keep, start.keep)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_keep_their_count_groups_their_pattern_and_weights_their_bits(
    pattern: Pattern, dtype: torch.dtype
) -> None:
    layer = layer_of(rows=300, dtype=dtype)
    start, pruned = prune(layer, pattern)
    assert torch.equal(pruned.keep.sum(1), start.keep.sum(1))
    if isinstance(pattern, NM):
        assert bool(((~pruned.keep).view(300, -1, pattern.m).sum(-1) == pattern.n).all())
    assert torch.equal(pruned.weight, layer.weight.masked_fill(~pruned.keep, 0))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_no_row_s_expected_error_rises_and_most_fall_far(pattern: Pattern, seed: int) -> None:
    layer = layer_of(seed=seed)
    start, pruned = prune(layer, pattern)
    before, after = expected_error(layer, start.keep), expected_error(layer, pruned.keep)
    assert bool((after <= before + 1e-12).all())
    assert float(after.median()) < 0.5 * float(before.median())


def test_a_swap_solved_by_hand() -> None:
    """Wanda drops 2 and 1.5, so 3.5 is missing; 2 comes back and -2.5, which pulls the other way, goes: -1 is left."""
    weight = torch.tensor([[4, -2.5, 2, 1.5]])
    keep = torch.tensor([[True, True, False, False]])
    gram, mean = 2 * torch.eye(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    assert swap(weight, keep, gram, mean, group=4).tolist() == [[True, False, True, False]]


def test_of_weights_that_would_help_the_one_on_the_steadier_channel_grows() -> None:
    weight = torch.tensor([[4, -2.5, 2, 1.5]])
    keep = torch.tensor([[True, True, False, False]])
    gram, mean = torch.diag(torch.tensor([2, 2, 9, 1.5])).double(), torch.ones(4, dtype=torch.float64)
    assert swap(weight, keep, gram, mean, group=4).tolist() == [[True, False, False, True]]


def test_a_constant_and_a_silent_channel_divide_nothing_by_zero() -> None:
    layer = layer_of()
    assert layer.gram is not None
    assert layer.mean is not None
    gram, mean = layer.gram.clone(), layer.mean.clone()
    gram[5, :] = gram[:, 5] = mean[5] = 0
    gram[9, 9] = mean[9] ** 2 * (1 - 1e-9)  # rounding
    broken = Layer(name="a", weight=layer.weight, gram=gram, mean=mean)
    for pattern in PATTERNS:
        start, pruned = prune(broken, pattern)
        assert bool((expected_error(broken, pruned.keep) <= expected_error(broken, start.keep) + 1e-12).all())
        assert not bool((pruned.keep & ~start.keep)[:, 5].any())


def test_inputs_without_a_mean_leave_wanda_s_support() -> None:
    layer = layer_of()
    centred = Layer(name="a", weight=layer.weight, gram=layer.gram, mean=torch.zeros(64, dtype=torch.float64))
    for pattern in PATTERNS:
        start, pruned = prune(centred, pattern)
        assert torch.equal(start.keep, pruned.keep)


def test_a_mean_that_was_not_collected_or_is_broken_is_an_error_that_names_the_layer() -> None:
    layer = layer_of()
    for mean, says in ((None, "needs the mean"), (torch.full((64,), float("nan")), "not finite")):
        broken = Layer(name=layer.name, weight=layer.weight, gram=layer.gram, mean=mean)
        with pytest.raises(CalibrationError, match=rf"blocks\.7\.ff: .*{says}"):
            dsnot.prune_weights([broken], NM(2, 4), Options())


def test_units_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"blocks\.7\.ff: dsnot .* removes no heads or neurons"):
        dsnot.prune_units([layer_of()], [Removal(units=8, width=8, number=1, starts=(0,))], Options())
