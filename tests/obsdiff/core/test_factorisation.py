import logging

import pytest
import torch
from torch import Tensor

from obsdiff.core.linalg import factorise, relative_loss, solve
from obsdiff_runtime.errors import CalibrationError


def gram_of(tokens: int, width: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    x = torch.randn(tokens, width, dtype=torch.float64) @ torch.randn(width, width, dtype=torch.float64)
    return x.T @ x / tokens


def test_upper_factor_belongs_to_the_inverse_of_the_damped_gram() -> None:
    gram = gram_of(200, 24)
    factor = factorise(gram, 0.01)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(factor.gram, damped, rtol=1e-12, atol=1e-12)
    assert torch.equal(factor.upper, factor.upper.triu())
    assert bool((factor.upper.diagonal() > 0).all())
    inverse = torch.linalg.inv(damped)
    torch.testing.assert_close(factor.inverse(), inverse, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(factor.upper, torch.linalg.cholesky(inverse, upper=True), rtol=1e-8, atol=1e-10)


def test_scaling_keeps_the_error_small_where_channels_differ_by_a_million() -> None:
    scale = torch.logspace(-3, 3, 16, dtype=torch.float64)
    gram = gram_of(100, 16) * scale[:, None] * scale
    factor = factorise(gram, 1e-14)
    error = factor.inverse() @ factor.gram - torch.eye(16, dtype=torch.float64)
    assert float((error * scale[:, None] / scale).abs().max()) < 1e-6


def test_fewer_tokens_than_channels_is_no_obstacle_with_damping() -> None:
    factor = factorise(gram_of(5, 32).float(), 0.01)
    assert bool(factor.upper.isfinite().all())
    assert factor.damping == 0.01


def test_without_damping_a_singular_gram_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="not positive definite"):
        factorise(torch.ones(4, 4), 0.0)


def test_silent_channels_are_taken_out() -> None:
    gram = gram_of(50, 6)
    gram[2, :] = gram[:, 2] = 0
    factor = factorise(gram, 0.01)
    assert factor.dead.tolist() == [False, False, True, False, False, False]
    live = [0, 1, 3, 4, 5]
    alone = factorise(gram[live][:, live], 0.01)
    torch.testing.assert_close(factor.inverse()[live][:, live], alone.inverse(), rtol=1e-12, atol=0)
    assert factor.inverse()[2].tolist() == [0, 0, 1, 0, 0, 0]


def test_a_slightly_indefinite_gram_is_damped_more_and_that_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    gram = torch.eye(4, dtype=torch.float64)
    gram[0, 1] = gram[1, 0] = 1.05
    with caplog.at_level(logging.WARNING):
        factor = factorise(gram, 0.01)
    assert factor.damping == pytest.approx(0.1)
    assert "not positive definite at damping 0.01" in caplog.text


def test_an_indefinite_gram_is_an_error() -> None:
    gram = torch.eye(4)
    gram[0, 1] = gram[1, 0] = 100
    with pytest.raises(CalibrationError, match="not positive definite"):
        factorise(gram, 0.01)
    with pytest.raises(CalibrationError, match="indefinite"):
        factorise(-torch.eye(4), 0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_gram_is_told_apart_from_an_indefinite_one(value: float) -> None:
    gram = torch.eye(4)
    gram[1, 2] = value
    with pytest.raises(CalibrationError, match="not finite: 1 of 16"):
        factorise(gram, 0.01)


@pytest.mark.parametrize(("gram", "says"), [(torch.zeros(3, 3), "zero"), (torch.ones(2, 3), "square")])
def test_what_is_no_gram_is_an_error(gram: Tensor, says: str) -> None:
    with pytest.raises(CalibrationError, match=says):
        factorise(gram, 0.01)


def test_the_gram_given_is_left_alone() -> None:
    gram = gram_of(50, 6)
    before = gram.clone()
    factorise(gram, 0.01)
    assert torch.equal(gram, before)


def test_solve_solves() -> None:
    gram, right = gram_of(100, 8), torch.randn(8, 3, dtype=torch.float64)
    torch.testing.assert_close(gram @ solve(gram, right), right, rtol=1e-9, atol=1e-9)
    with pytest.raises(CalibrationError, match="kept columns"):
        solve(torch.ones(3, 3, dtype=torch.float64), right[:3])


def test_relative_loss_is_the_lost_share_of_the_output_energy() -> None:
    torch.manual_seed(1)
    x = torch.randn(40, 8, dtype=torch.float64)
    weight, pruned = torch.randn(5, 8), torch.randn(5, 8)
    change, output = (pruned.double() - weight.double()) @ x.T, weight.double() @ x.T
    expected = float(change.square().sum() / output.square().sum())
    assert relative_loss(weight, pruned, x.T @ x / 40) == pytest.approx(expected, rel=1e-9)
    assert relative_loss(weight, weight, x.T @ x) == 0
    assert relative_loss(torch.zeros(2, 8), torch.zeros(2, 8), x.T @ x) == 0
