import pytest
import torch
from torch import Tensor

from obsdiff.core.linalg import factorise, unit_diagonal
from obsdiff.core.refit import refit, refit_support, row_losses
from obsdiff_runtime.errors import CalibrationError


def problem(width: int = 48, rows: int = 20, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated inputs, (tokens, width), two of them far louder than the others, and a weight."""
    torch.manual_seed(seed)
    mix = torch.randn(width, width, dtype=torch.float64) * torch.linspace(1, 0.1, width, dtype=torch.float64)
    x = torch.randn(tokens, width, dtype=torch.float64) @ mix.T
    x[:, :2] *= 30
    return x, torch.randn(rows, width, dtype=torch.float64)


def random_support(rows: int, width: int, seed: int = 1) -> Tensor:
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) < 0.5


def lstsq_on_support(right: Tensor, gram: Tensor, keep: Tensor) -> Tensor:
    """Row by row, on the square root of the gram, in float64."""
    lower = torch.linalg.cholesky(gram)
    found = torch.zeros_like(right)
    for row, columns in enumerate(keep):
        wanted = torch.linalg.solve_triangular(lower, right[row, :, None], upper=False)
        found[row, columns] = torch.linalg.lstsq(lower.T[:, columns], wanted).solution[:, 0]
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-3)])
def test_every_row_is_least_squares_on_its_own_support(dtype: torch.dtype, tolerance: float) -> None:
    """Float32 stops at its own rounding, amplified by the condition of H; in the loss that is 1e-6."""
    x, weight = problem()
    gram = factorise(x.T @ x / len(x)).gram
    keep, right = random_support(*weight.shape), weight @ gram
    found = refit_support(right, gram, keep, weight, iterations=200, tolerance=1e-12, dtype=dtype)
    expected = lstsq_on_support(right, gram, keep)
    assert bool((found[~keep] == 0).all())
    assert float((found - expected).norm() / expected.norm()) < tolerance
    best = row_losses(expected, weight, gram)
    assert float(((row_losses(found, weight, gram) - best) / best).max()) < tolerance**1.5


def test_one_support_for_all_rows_is_the_structured_refit() -> None:
    x, weight = problem()
    gram, columns = factorise(x.T @ x / len(x)).gram, torch.arange(0, 48, 3)
    keep = torch.zeros(weight.shape, dtype=torch.bool)
    keep[:, columns] = True
    found = refit_support(weight @ gram, gram, keep, weight, iterations=200, tolerance=1e-12, dtype=torch.float64)
    torch.testing.assert_close(found[:, columns], refit(weight, gram, columns), rtol=1e-7, atol=1e-9)


def test_an_asymmetric_target_is_fitted_from_other_inputs() -> None:
    """The target is what other inputs gave: R = target^T x; the oracle is lstsq on the tokens themselves."""
    x, weight = problem()
    noisy = x + 0.3 * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    gram, right = noisy.T @ noisy / len(x), (x @ weight.T).T @ noisy / len(x)
    keep = random_support(*weight.shape)
    found = refit_support(right, gram, keep, weight, iterations=400, tolerance=1e-12, dtype=torch.float64)
    for row, columns in enumerate(keep):
        expected = torch.linalg.lstsq(noisy[:, columns], x @ weight[row, :, None]).solution[:, 0]
        torch.testing.assert_close(found[row, columns], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("iterations", [0, 1, 3, 100])
def test_no_row_gets_worse_than_its_start(iterations: int) -> None:
    x, weight = problem()
    gram = factorise(x.T @ x / len(x)).gram
    keep, right = random_support(*weight.shape), weight @ gram
    start = lstsq_on_support(right, gram, keep)
    start[::2] += 0.1 * keep[::2]
    found = refit_support(right, gram, keep, start, iterations=iterations)
    assert bool((row_losses(found, weight, gram) <= row_losses(start, weight, gram)).all())
    if iterations == 100:
        assert bool((row_losses(found, weight, gram)[::2] < row_losses(start, weight, gram)[::2]).all())


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = problem()
    gram = factorise(x.T @ x / len(x)).gram
    keep, right = random_support(*weight.shape), weight @ gram
    whole = refit_support(right, gram, keep, weight, dtype=torch.float64)
    monkeypatch.setattr("obsdiff.core.refit.CHUNK", 3 * 48)
    torch.testing.assert_close(refit_support(right, gram, keep, weight, dtype=torch.float64), whole, rtol=1e-9, atol=0)


def test_a_target_of_zero_gives_zero() -> None:
    x, weight = problem()
    gram = factorise(x.T @ x / len(x)).gram
    nothing = torch.zeros_like(weight)
    found = refit_support(nothing, gram, random_support(*weight.shape), weight, iterations=100)
    assert bool((row_losses(found, nothing, gram) < 1e-9 * row_losses(weight, nothing, gram)).all())
    still = refit_support(torch.zeros_like(weight), gram, random_support(*weight.shape), torch.zeros_like(weight))
    assert torch.equal(still, torch.zeros_like(weight))


def test_a_row_without_support_stays_empty() -> None:
    x, weight = problem()
    gram, keep = factorise(x.T @ x / len(x)).gram, random_support(*weight.shape)
    keep[3] = False
    found = refit_support(weight @ gram, gram, keep, weight)
    assert bool((found[3] == 0).all())
    assert bool(found.isfinite().all())


def test_fewer_tokens_than_channels_still_solve_on_the_damped_gram() -> None:
    x, weight = problem(tokens=10)
    gram, keep = factorise(x.T @ x / len(x)).gram, random_support(*weight.shape)
    right = weight @ gram
    found = refit_support(right, gram, keep, weight, iterations=100)
    best = row_losses(lstsq_on_support(right, gram, keep), weight, gram)
    assert bool((row_losses(found, weight, gram) <= best * 1.001).all())


def test_a_channel_without_energy_is_named_before_it_divides() -> None:
    gram = torch.eye(4, dtype=torch.float64)
    gram[2, 2] = 0
    with pytest.raises(CalibrationError, match="without energy"):
        unit_diagonal(gram)
