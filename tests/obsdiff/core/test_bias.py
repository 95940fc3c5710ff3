import torch
from torch import Tensor

from obsdiff.core import bias
from obsdiff.core.linalg import factorise
from obsdiff.core.refit import refit_support
from obsdiff.core.solver import solve
from obsdiff.sparsity import NM


def tokens(width: int = 32, number: int = 500) -> Tensor:
    torch.manual_seed(0)
    mix = torch.randn(width, width, dtype=torch.float64)
    return torch.randn(number, width, dtype=torch.float64) @ mix + 5 * torch.randn(width, dtype=torch.float64)


def error(x: Tensor, y: Tensor, weight: Tensor, offset: Tensor) -> float:
    return float((x @ weight.T + offset - y).square().mean())


def test_the_bias_is_the_intercept_of_least_squares() -> None:
    x, keep = tokens(), torch.rand(6, 32) < 0.5
    y = torch.randn(500, 6, dtype=torch.float64) + x[:, :6]
    mean, target = x.mean(0), y.mean(0)
    gram = bias.centred(x.T @ x / len(x), mean)
    right = bias.centred_cross(y.T @ x / len(x), target, mean)
    found = refit_support(right, gram, keep, torch.zeros_like(right), iterations=500, tolerance=0, dtype=torch.float64)
    offset = bias.best(found, target, mean)
    for row, columns in enumerate(keep):
        with_one = torch.cat([x[:, columns], torch.ones(500, 1, dtype=torch.float64)], dim=1)
        expected = torch.linalg.lstsq(with_one, y[:, row, None]).solution[:, 0]
        torch.testing.assert_close(found[row, columns], expected[:-1], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(offset[row], expected[-1], rtol=1e-6, atol=1e-8)


def test_on_the_calibration_tokens_the_bias_never_hurts() -> None:
    x = tokens()
    weight, before = torch.randn(12, 32, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    y, mean, gram = x @ weight.T + before, x.mean(0), x.T @ x / len(x)
    plain = factorise(gram, 1e-6)
    uncentred = solve(weight, plain, NM(2, 4))
    centred_gram = factorise(bias.centred(gram, mean), 1e-6).gram
    found = refit_support(weight @ centred_gram, centred_gram, uncentred.keep, uncentred.weight, iterations=200)
    offset = bias.best(found, bias.output_mean(weight, before, mean), mean)
    torch.testing.assert_close(offset, before + (weight - found) @ mean)
    assert error(x, y, found, offset) <= error(x, y, uncentred.weight, before)
    assert error(x, y, uncentred.weight, bias.best(uncentred.weight, y.mean(0), mean)) <= error(
        x, y, uncentred.weight, before
    )


def test_the_bias_takes_over_a_constant_channel() -> None:
    """Its variance is rounding; zeroing its weights then costs nothing at all."""
    x = tokens()
    x[:, 3] = 1000.0
    weight, before = torch.randn(12, 32, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
    mean = x.mean(0)
    gram = bias.centred((x.float().T @ x.float()).double() / len(x), mean)
    assert bool((gram[3] == 0).all())
    assert bool((gram[:, 3] == 0).all())
    factor = factorise(gram)
    assert factor.dead.nonzero().flatten().tolist() == [3]
    pruned = weight.masked_fill(factor.dead, 0)
    offset = bias.best(pruned, bias.output_mean(weight, before, mean), mean)
    torch.testing.assert_close(x @ pruned.T + offset, x @ weight.T, rtol=1e-9, atol=1e-9)


def test_a_mean_of_zero_changes_nothing() -> None:
    x = tokens()
    gram, none = x.T @ x / len(x), torch.zeros(32, dtype=torch.float64)
    assert torch.equal(bias.centred(gram, none), gram)
    weight = torch.randn(4, 32)
    assert torch.equal(bias.best(weight, torch.arange(4).double(), none), torch.arange(4).double())
