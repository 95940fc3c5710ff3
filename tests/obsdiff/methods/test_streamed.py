"""The default method on single layers: float64 oracles on stored tokens."""

import pytest
import torch
from torch import Tensor

from obsdiff.core.gram import GramAccumulator
from obsdiff.core.units import Removal
from obsdiff.methods import Layer, Options, Pruned, Target, obsdiff, streamed
from obsdiff.sparsity import NM, Pattern, Unstructured
from obsdiff_runtime.errors import CalibrationError

DENSE = Unstructured(0.0)
OPTIONS = Options()
IN, OUT, TOKENS = 32, 24, 600
PATTERNS = (NM(2, 4), NM(4, 8), Unstructured(0.5), Unstructured(0.7))


def units(width: int, remove: int, streams: int = 1) -> list[Removal]:
    """All columns of so many streams are units of this width."""
    return [Removal(units=IN // width, width=width, number=remove, starts=(0,) * streams)]


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int = 0) -> Tensor:
    """Correlated, with a power-law spectrum, not centred."""
    mix = noise(IN, IN, seed=seed) * torch.arange(1, IN + 1) ** -0.7
    return noise(TOKENS, IN, seed=seed + 1) @ mix.T + noise(IN, seed=seed + 2)


def outputs(x: Tensor, layer_weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a dense model computes of inputs that differ a little from x."""
    return (x + 0.2 * noise(*x.shape, seed=9)) @ layer_weight.T + (0 if bias is None else bias) + 0.3


def layer_of(x: Tensor, y: Tensor | None = None, *, biased: bool = True, seed: int = 5) -> Layer:
    accumulator = GramAccumulator(IN)
    accumulator.add(x.double())
    gram = accumulator.gram()
    target = None
    if y is not None:
        wide = y.double()
        target = Target(cross=wide.T @ x.double() / len(x), mean=wide.mean(0), energy=wide.square().mean(0))
    return Layer(
        name="block.0.to_q",
        weight=noise(OUT, IN, seed=seed),
        gram=gram.matrix,
        mean=gram.mean,
        bias=noise(OUT, seed=seed + 1) if biased else None,
        target=target,
    )


def made(biased: bool = True, seed: int = 5) -> tuple[Layer, Tensor, Tensor]:
    """A layer with a target, its inputs and what it should compute."""
    plain = layer_of(tokens(), biased=biased, seed=seed)
    x = tokens()
    y = outputs(x, plain.weight, plain.bias)
    return layer_of(x, y, biased=biased, seed=seed), x, y


def error(layer: Layer, pruned: Pruned, x: Tensor, y: Tensor) -> float:
    """|X W^T + b - Y|^2 / |Y - mean|^2, or / |Y|^2 without a bias."""
    bias = pruned.bias if pruned.bias is not None else layer.bias
    found = x.double() @ pruned.weight.double().T + (0 if bias is None else bias.double())
    wanted = y.double()
    energy = wanted - wanted.mean(0) if layer.bias is not None else wanted
    return float((found - wanted).square().sum() / energy.square().sum())


@pytest.mark.parametrize("biased", [True, False])
def test_without_a_target_and_without_sparsity_nothing_changes(biased: bool) -> None:
    layer = layer_of(tokens(), biased=biased)
    (pruned,) = streamed.prune_weights([layer], DENSE, OPTIONS)
    (kept,), (whole,) = streamed.prune_units([layer], units(4, 0), OPTIONS)
    assert kept.tolist() == list(range(IN // 4))
    for result in (pruned, whole):
        assert torch.equal(result.weight, layer.weight)
        assert bool(result.keep.all())
        assert result.loss == 0
        if biased:
            assert result.bias is not None
            torch.testing.assert_close(result.bias, layer.bias, rtol=0, atol=1e-6)
        else:
            assert result.bias is None


@pytest.mark.parametrize("biased", [True, False])
def test_with_a_target_and_no_sparsity_the_weight_is_the_ridge_solution(biased: bool) -> None:
    """lstsq in float64 on the stored tokens, drawn to the present weight by lambda = damp * mean diagonal."""
    layer, x, y = made(biased)
    (pruned,) = streamed.prune_weights([layer], DENSE, OPTIONS)
    x, y, weight = x.double(), y.double(), layer.weight.double()
    if biased:
        x, y = x - x.mean(0), y - y.mean(0)
    ridge = OPTIONS.damp * float(x.square().mean(0).mean())
    stacked = torch.cat([x / len(x) ** 0.5, ridge**0.5 * torch.eye(IN, dtype=torch.float64)])
    right = torch.cat([y / len(y) ** 0.5, ridge**0.5 * weight.T])
    expected = torch.linalg.lstsq(stacked, right).solution.T
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=1e-5, atol=1e-5)  # stored in float32
    if biased:
        assert pruned.bias is not None
        best = (made(biased)[2].double() - tokens().double() @ pruned.weight.double().T).mean(0)
        torch.testing.assert_close(pruned.bias.double(), best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("pattern", [*PATTERNS, DENSE], ids=str)
def test_the_recorded_loss_is_that_of_the_output_on_stored_tokens(pattern: Pattern, biased: bool) -> None:
    layer, x, y = made(biased)
    (pruned,) = streamed.prune_weights([layer], pattern, OPTIONS)
    assert pruned.loss == pytest.approx(error(layer, pruned, x, y), rel=1e-4)
    _, (cut,) = streamed.prune_units([layer], units(4, 3), OPTIONS)
    assert cut.loss == pytest.approx(error(layer, cut, x, y), rel=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_never_worse_than_the_paper_on_the_same_gram(pattern: Pattern, seed: int) -> None:
    """The same target without a bias: what the weight makes of its input. Rounding to float32 is all that differs."""
    layer = layer_of(tokens(seed), biased=False, seed=seed)
    (ours,) = streamed.prune_weights([layer], pattern, OPTIONS)
    (paper,) = obsdiff.prune_weights([layer], pattern, OPTIONS)
    assert ours.loss <= paper.loss * (1 + 1e-5)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_target_and_a_bias_leave_less_error_than_neither(pattern: Pattern) -> None:
    layer, x, y = made()
    (paper,) = obsdiff.prune_weights([layer], pattern, OPTIONS)
    (ours,) = streamed.prune_weights([layer], pattern, OPTIONS)
    assert error(layer, ours, x, y) < error(layer, paper, x, y)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_weights_on_the_support_are_the_least_squares_ones(pattern: Pattern, biased: bool) -> None:
    """Row by row against lstsq in float64 on the stored tokens; the solver stops 1e-3 from it, in the loss far less."""
    layer, x, y = made(biased)
    (pruned,) = streamed.prune_weights([layer], pattern, OPTIONS)
    x, y, weight = x.double(), y.double(), layer.weight.double()
    if biased:
        x, y = x - x.mean(0), y - y.mean(0)
    ridge = OPTIONS.damp * float(x.square().mean(0).mean())
    stacked = torch.cat([x / len(x) ** 0.5, ridge**0.5 * torch.eye(IN, dtype=torch.float64)])
    right = torch.cat([y / len(y) ** 0.5, ridge**0.5 * weight.T])

    def loss(row: int, candidate: Tensor) -> float:
        return float((stacked @ candidate - right[:, row]).square().sum())

    for row in range(OUT):
        keep = pruned.keep[row]
        best = torch.zeros(IN, dtype=torch.float64)
        best[keep] = torch.linalg.lstsq(stacked[:, keep], right[:, row : row + 1]).solution[:, 0]
        assert loss(row, pruned.weight[row].double()) <= loss(row, best) * (1 + 1e-3)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_layers_that_share_an_input_are_solved_as_each_alone(pattern: Pattern) -> None:
    """One with and one without a bias: they do not share the gram about the mean, and both are right."""
    (first, _, _), (second, _, _) = made(True), made(False, seed=50)
    together = streamed.prune_weights([first, second], pattern, OPTIONS)
    alone = [*streamed.prune_weights([first], pattern, OPTIONS), *streamed.prune_weights([second], pattern, OPTIONS)]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.weight, other.weight)
        assert torch.equal(one.keep, other.keep)


def test_the_order_of_layers_is_kept_whatever_their_biases() -> None:
    layers = [made(biased, seed=seed)[0] for biased, seed in ((True, 5), (False, 50), (True, 80))]
    pruned = streamed.prune_weights(layers, NM(2, 4), OPTIONS)
    assert [each.bias is None for each in pruned] == [False, True, False]
    for layer, each in zip(layers, pruned, strict=True):
        assert each.loss < 1
        torch.testing.assert_close(each.weight, streamed.prune_weights([layer], NM(2, 4), OPTIONS)[0].weight)


@pytest.mark.parametrize("biased", [True, False])
def test_shrunk_equals_masked(biased: bool) -> None:
    layer, x, _ = made(biased)
    (kept,), (pruned,) = streamed.prune_units([layer], units(4, 3), OPTIONS)
    columns = (kept[:, None] * 4 + torch.arange(4)).flatten()
    assert len(kept) == IN // 4 - 3
    assert bool((pruned.weight[:, pruned.keep.logical_not().any(0)] == 0).all())
    masked, shrunk = x @ pruned.weight.T, x[:, columns] @ pruned.weight[:, columns].T
    torch.testing.assert_close(shrunk, masked)


def test_two_streams_lose_the_same_units() -> None:
    (first, _, _), (second, _, _) = made(True), made(False, seed=50)
    (kept,), pruned = streamed.prune_units([first, second], units(8, 2, streams=2), OPTIONS)
    assert len(kept) == 2
    assert torch.equal(pruned[0].keep, pruned[1].keep)


@pytest.mark.parametrize("pattern", [NM(2, 4), DENSE], ids=str)
def test_a_constant_channel_is_carried_by_the_bias(pattern: Pattern) -> None:
    x = tokens()
    x[:, 3] = 2.0
    plain = layer_of(x)
    y = outputs(x, plain.weight, plain.bias)
    layer = layer_of(x, y)
    (pruned,) = streamed.prune_weights([layer], pattern, OPTIONS)
    found = x @ pruned.weight.T + pruned.bias
    torch.testing.assert_close(found.mean(0), y.mean(0), rtol=1e-4, atol=1e-4)


def test_a_layer_with_a_bias_and_no_mean_is_named() -> None:
    layer = layer_of(tokens())
    bare = Layer(name=layer.name, weight=layer.weight, gram=layer.gram, bias=layer.bias)
    with pytest.raises(CalibrationError, match=r"block\.0\.to_q: .*mean of the input"):
        streamed.prune_weights([bare], NM(2, 4), OPTIONS)
