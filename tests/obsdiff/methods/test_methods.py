"""Every method on small layers; the oracle for the loss is the layer's output on stored activations."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from obsdiff.core.gram import GramAccumulator
from obsdiff.core.solver import FULL
from obsdiff.core.timesteps import SCHEDULES
from obsdiff.core.units import Removal
from obsdiff.methods import Layer, Options, Pruned
from obsdiff.methods.table import METHODS
from obsdiff.sparsity import NM, Pattern, Unstructured
from obsdiff_runtime.errors import CalibrationError, ConfigError

OPTIONS = Options()
PATTERNS: Sequence[Pattern] = (NM(2, 4), NM(4, 8), Unstructured(0.5))
CALIBRATING = [name for name, method in METHODS.items() if method.calibrates]
REMOVING_UNITS = [name for name, method in METHODS.items() if method.removes_units]
COMPENSATING = ["obsdiff", "sparsegpt"]


def units(width: int, remove: int, columns: int, streams: int = 1) -> list[Removal]:
    """All columns of so many streams are units of this width."""
    return [Removal(units=columns // width, width=width, number=remove, starts=(0,) * streams)]


def activations(width: int, seed: int = 0, tokens: int = 2000) -> Tensor:
    """Correlated inputs with a power-law spectrum, as a network's are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.arange(1, width + 1) ** -0.7
    return torch.randn(tokens, width, generator=generator) @ mix.T


def layer_of(x: Tensor | None, width: int, rows: int = 48, dtype: torch.dtype = torch.float32, seed: int = 1) -> Layer:
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if x is None:
        return Layer(name="block.0.to_q", weight=weight, gram=None)
    accumulator = GramAccumulator(width)
    accumulator.add(x)
    gram = accumulator.gram()
    return Layer(name="block.0.to_q", weight=weight, gram=gram.matrix, mean=gram.mean)


def output_loss(layer: Layer, pruned: Pruned, x: Tensor) -> float:
    before = x.double() @ layer.weight.double().T
    after = x.double() @ pruned.weight.double().T
    return float((after - before).square().sum() / before.square().sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_pattern_holds_exactly_on_the_weights_as_stored(method: str, dtype: torch.dtype, pattern: Pattern) -> None:
    layer = layer_of(activations(64), 64, dtype=dtype)
    (pruned,) = METHODS[method].prune_weights([layer], pattern, OPTIONS)
    assert pruned.weight.dtype == dtype
    assert bool((pruned.weight[~pruned.keep] == 0).all())
    assert not bool(torch.signbit(pruned.weight[~pruned.keep]).any())
    if isinstance(pattern, NM):
        assert bool(((~pruned.keep).view(48, -1, pattern.m).sum(-1) == pattern.n).all())
    assert int((~pruned.keep).sum()) == 48 * 64 // 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_logged_loss_is_that_of_the_output_on_stored_activations(method: str, dtype: torch.dtype) -> None:
    """float32 sums of 2000 tokens in the gram are good to about 1e-6."""
    x = activations(64)
    layer = layer_of(x, 64, dtype=dtype)
    results = [METHODS[method].prune_weights([layer], pattern, OPTIONS)[0] for pattern in PATTERNS]
    if METHODS[method].removes_units:
        results += METHODS[method].prune_units([layer], units(8, 3, 64), OPTIONS)[1]
    for pruned in results:
        assert pruned.loss == pytest.approx(output_loss(layer, pruned, x), rel=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_compensation_beats_scores_and_scores_beat_magnitude(pattern: Pattern) -> None:
    x = activations(128)
    layer = layer_of(x, 128)
    loss = {name: METHODS[name].prune_weights([layer], pattern, OPTIONS)[0].loss for name in METHODS}
    assert loss["obsdiff"] < 0.6 * loss["wanda"]
    assert loss["wanda"] < loss["magnitude"]


@pytest.mark.parametrize(("width", "remove"), [(1, 32), (16, 2)])
def test_units_are_chosen_better_with_compensation(width: int, remove: int) -> None:
    """Channels differ in scale, as they do in networks; without that, Wanda has nothing over magnitude."""
    x = activations(128) * torch.logspace(-1, 1, 128)[torch.randperm(128, generator=torch.Generator().manual_seed(3))]
    layer = layer_of(x, 128)
    loss = {
        name: METHODS[name].prune_units([layer], units(width, remove, 128), OPTIONS)[1][0].loss
        for name in REMOVING_UNITS
    }
    assert loss["obsdiff"] < 0.6 * loss["wanda"]
    assert loss["wanda"] < loss["magnitude"]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_asked_changes_no_bit(method: str) -> None:
    layer = layer_of(activations(32), 32)
    before = layer.weight.clone()
    pruned = METHODS[method].prune_weights([layer, layer], Unstructured(0.0), OPTIONS)
    whole: list[Pruned] = []
    if METHODS[method].removes_units:
        (kept,), whole = METHODS[method].prune_units([layer], units(8, 0, 32), OPTIONS)
        assert kept.tolist() == [0, 1, 2, 3]
    for result in (*pruned, *whole):
        assert torch.equal(result.weight, before)
        assert bool(result.keep.all())
        assert result.loss == 0


@pytest.mark.parametrize("method", METHODS)
def test_the_weight_given_is_left_alone_and_the_same_comes_out_twice(method: str) -> None:
    layer = layer_of(activations(64), 64)
    before = layer.weight.clone()
    first = METHODS[method].prune_weights([layer], NM(2, 4), OPTIONS)[0]
    again = METHODS[method].prune_weights([layer], NM(2, 4), OPTIONS)[0]
    assert torch.equal(layer.weight, before)
    assert torch.equal(first.weight, again.weight)


@pytest.mark.parametrize("method", REMOVING_UNITS)
def test_removed_units_are_zero_and_kept_ones_counted(method: str) -> None:
    layers = [layer_of(activations(48), 48), layer_of(activations(48, seed=5), 48, rows=20, seed=2)]
    (kept,), pruned = METHODS[method].prune_units(layers, units(8, 2, 48, streams=2), OPTIONS)
    assert kept.dtype == torch.int64
    assert len(kept) == 4
    for result in pruned:
        columns = result.keep.view(len(result.keep), 6, 8)
        assert torch.equal(columns[0, :, 0].nonzero().flatten(), kept)
        assert bool((columns == columns[:1, :, :1]).all())
        assert bool((result.weight[~result.keep] == 0).all())


@pytest.mark.parametrize("method", REMOVING_UNITS)
def test_heads_and_neurons_side_by_side_go_from_their_own_columns(method: str) -> None:
    """Four columns that are no unit, three heads of 8, 20 neurons: what Flux's last projection reads, and more."""
    layer = layer_of(activations(48), 48)
    removals = [
        Removal(units=3, width=8, number=1, starts=(4,)),
        Removal(units=20, width=1, number=7, starts=(28,)),
    ]
    (heads, neurons), (pruned,) = METHODS[method].prune_units([layer], removals, OPTIONS)
    assert (len(heads), len(neurons)) == (2, 13)
    expected = torch.zeros(48, dtype=torch.bool)
    expected[:4] = True
    expected[(4 + heads[:, None] * 8 + torch.arange(8)).flatten()] = True
    expected[28 + neurons] = True
    assert torch.equal(pruned.keep, expected.expand_as(pruned.keep))
    assert bool((pruned.weight[~pruned.keep] == 0).all())


@pytest.mark.parametrize("method", METHODS)
def test_linears_that_share_a_gram_are_pruned_as_if_alone(method: str) -> None:
    x = activations(64)
    layers = [layer_of(x, 64, seed=seed) for seed in range(3)]
    for pattern in PATTERNS:
        together = METHODS[method].prune_weights(layers, pattern, OPTIONS)
        for layer, result in zip(layers, together, strict=True):
            alone = METHODS[method].prune_weights([layer], pattern, OPTIONS)[0]
            assert torch.equal(result.weight, alone.weight)


@pytest.mark.parametrize("method", COMPENSATING)
@pytest.mark.parametrize(("width", "remove"), [(1, 20), (8, 3)])
def test_what_stays_of_a_row_that_lost_columns_is_the_masked_least_squares_solution(
    method: str, width: int, remove: int
) -> None:
    """QR in float64 on the activations; the damping is more rows of them."""
    x = activations(48).double()
    layer = layer_of(x, 48, dtype=torch.float64)
    (kept,), (pruned,) = METHODS[method].prune_units([layer], units(width, remove, 48), OPTIONS)
    columns = (kept[:, None] * width + torch.arange(width)).flatten()
    damping = OPTIONS.damp * x.square().mean()
    rows = torch.cat([x / len(x) ** 0.5, damping.sqrt() * torch.eye(48, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows[:, columns], rows @ layer.weight.T).solution.T
    torch.testing.assert_close(pruned.weight[:, columns], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8)], ids=str)
def test_where_channels_are_alike_and_unrelated_n_of_m_is_magnitude(method: str, pattern: NM) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    layer = Layer(name="a", weight=weight, gram=3 * torch.eye(64, dtype=torch.float64), mean=torch.zeros(64).double())
    (pruned,) = METHODS[method].prune_weights([layer], pattern, replace(OPTIONS, effort=FULL))
    lowest = weight.abs().view(24, -1, pattern.m).argsort(dim=2)[..., : pattern.n]
    keep = torch.ones(24, 64 // pattern.m, pattern.m, dtype=torch.bool).scatter_(2, lowest, False).view(24, 64)
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight, weight * keep, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", COMPENSATING)
def test_four_rows_of_four_solved_by_hand(method: str) -> None:
    """Channels 0 and 1 are one and the same: what 0 loses 1 takes over for nothing; 2 and 3 stand alone.

    So the scores of a row are about 0, w1^2, w2^2 and 4 w3^2, where w1 is still without what it takes over.
    """
    gram = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 4]], dtype=torch.float64)
    weight = torch.tensor([[1, 2, 0.5, 0.5], [1, -1, 2, 1], [3, 1, -1, 0], [0, 2, 1, 1]], dtype=torch.float64)
    by_hand = torch.tensor([[0, 3, 0, 0.5], [0, 0, 2, 1], [0, 4, -1, 0], [0, 2, 0, 1]], dtype=torch.float64)
    layer = Layer(name="a", weight=weight, gram=gram)
    (pruned,) = METHODS[method].prune_weights([layer], NM(2, 4), Options(damp=1e-9))
    torch.testing.assert_close(pruned.weight, by_hand, rtol=1e-7, atol=1e-7)
    lost, energy = 0.25 + 0 + 0 + 1, 10.25 + 8 + 17 + 9
    assert pruned.loss == pytest.approx(lost / energy, rel=1e-6)


@pytest.mark.parametrize("method", CALIBRATING)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_gram_is_an_error_that_names_the_layer(method: str, value: float) -> None:
    gram = torch.eye(16)
    gram[3, 3] = value
    layer = Layer(name="blocks.7.ff", weight=torch.ones(4, 16), gram=gram)
    with pytest.raises(CalibrationError, match=r"blocks\.7\.ff.*not finite"):
        METHODS[method].prune_weights([layer], NM(2, 4), OPTIONS)
    if METHODS[method].removes_units:
        with pytest.raises(CalibrationError, match=r"blocks\.7\.ff.*not finite"):
            METHODS[method].prune_units([layer], units(1, 2, 16), OPTIONS)


@pytest.mark.parametrize("method", COMPENSATING)
def test_an_indefinite_gram_is_an_error_not_another_algorithm(method: str) -> None:
    gram = torch.eye(8) + 100 * (1 - torch.eye(8))
    layers = [Layer(name=f"blocks.7.to_{letter}", weight=torch.ones(4, 8), gram=gram) for letter in "qkv"]
    with pytest.raises(CalibrationError, match=r"blocks.7.to_q \(and 2 that share its gram\): .*not positive definite"):
        METHODS[method].prune_weights(layers, NM(2, 4), OPTIONS)


@pytest.mark.parametrize("method", CALIBRATING)
def test_a_missing_gram_is_an_error(method: str) -> None:
    with pytest.raises(CalibrationError, match="needs a gram"):
        METHODS[method].prune_weights([layer_of(None, 16)], NM(2, 4), OPTIONS)


@pytest.mark.parametrize("method", METHODS)
def test_a_width_that_m_does_not_divide_is_refused_by_name(method: str) -> None:
    with pytest.raises(ConfigError, match=r"block\.0\.to_q.*18 input columns are no multiple of 4"):
        METHODS[method].prune_weights([layer_of(activations(18), 18)], NM(2, 4), OPTIONS)


def test_weights_that_leave_float16_are_an_error() -> None:
    """Channel 0 is a hundredth of channel 1, so making up for weight 1 takes a hundred times it."""
    x = torch.randn(100, 1) @ torch.tensor([[1.0, 1.001]])
    layer = Layer(name="big", weight=torch.tensor([[6e4, 6e4]]).half(), gram=(x.T @ x) / 100)
    with pytest.raises(CalibrationError, match=r"big: .*not finite in float16"):
        METHODS["obsdiff"].prune_weights([layer], NM(1, 2), Options(damp=1e-6))


def test_magnitude_needs_no_gram_and_knows_no_loss() -> None:
    weight = torch.tensor([[0.1, -3, 2, 0.2], [5, 0.3, -0.4, 6]])
    (pruned,) = METHODS["magnitude"].prune_weights([Layer(name="a", weight=weight, gram=None)], NM(2, 4), OPTIONS)
    assert pruned.weight.tolist() == torch.tensor([[0.0, -3, 2, 0], [5, 0, 0, 6]]).tolist()
    assert math.isnan(pruned.loss)
    (half,) = METHODS["magnitude"].prune_weights(
        [Layer(name="a", weight=weight, gram=None)], Unstructured(0.625), OPTIONS
    )
    assert half.keep.sum(1).tolist() == [1, 2]


def test_wanda_compares_within_a_row() -> None:
    weight = torch.tensor([[1.0, 2, 3, 4], [40, 30, 20, 10]])
    layer = Layer(name="a", weight=weight, gram=torch.diag(torch.tensor([100.0, 1, 1, 1])))
    (pruned,) = METHODS["wanda"].prune_weights([layer], Unstructured(0.5), OPTIONS)
    assert pruned.keep.tolist() == [[True, False, False, True], [True, True, False, False]]


def test_each_method_says_what_it_is_called_whether_it_calibrates_and_how_it_weighs_steps() -> None:
    assert {name: method.name for name, method in METHODS.items()} == {name: name for name in METHODS}
    assert {method.time_weights for method in METHODS.values()} <= set(SCHEDULES)
    assert [name for name, method in METHODS.items() if not method.removes_units] == ["dsnot"]
    assert [name for name, method in METHODS.items() if not method.calibrates] == ["magnitude"]
