import pytest
import torch
from torch import Tensor

from obsdiff.core import admm
from obsdiff.core.linalg import Factor, factorise
from obsdiff.core.refit import refit_support, row_losses
from obsdiff.core.solver import FAST, FULL, LEAN, Effort, solve
from obsdiff.core.support import smallest, sweep
from obsdiff.sparsity import NM, Pattern, Unstructured
from obsdiff_runtime.errors import CalibrationError, ConfigError

PATTERNS = [NM(2, 4), NM(4, 8), NM(1, 4), Unstructured(0.5), Unstructured(0.7)]


def correlated(width: int, tokens: int = 600, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    mix = torch.randn(width, width, dtype=torch.float64) * torch.linspace(1, 0.05, width, dtype=torch.float64)
    x = torch.randn(tokens, width, dtype=torch.float64) @ mix.T
    return x.T @ x / tokens


def layer(rows: int = 48, width: int = 64, seed: int = 0, tokens: int = 600) -> tuple[Tensor, Factor]:
    factor = factorise(correlated(width, tokens, seed))
    return torch.randn(rows, width, dtype=torch.float64), factor


def loss(weight: Tensor, target: Tensor, factor: Factor) -> float:
    return float(row_losses(weight, target, factor.gram).sum())


def holds(keep: Tensor, pattern: Pattern) -> bool:
    if isinstance(pattern, NM):
        return bool((keep.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.m - pattern.n).all())
    return int((~keep).sum()) == int(keep.numel() * pattern.ratio + 1e-6)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_support_is_as_good_as_the_sweeps_after_the_same_refit(pattern: Pattern) -> None:
    """On correlated inputs it is far better; 0.95 leaves room for other seeds (measured: 0.80 to 0.91)."""
    for seed in range(3):
        weight, factor = layer(seed=seed)
        swept, keep = sweep(weight, factor.upper, pattern)
        refitted = refit_support(weight @ factor.gram, factor.gram, keep, swept, iterations=100)
        found = solve(weight, factor, pattern)
        assert holds(found.keep, pattern)
        assert bool((found.weight[~found.keep] == 0).all())
        assert found.objective == pytest.approx(loss(found.weight, weight, factor), rel=1e-9)
        assert found.objective <= 0.95 * loss(refitted, weight, factor)
        assert solve(weight, factor, pattern, effort=FAST).objective < loss(swept, weight, factor)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_the_result_is_never_worse_than_the_sweep(pattern: Pattern) -> None:
    """With ADMM crippled the sweep's support wins: N:M row by row, unstructured as a whole."""
    weight, factor = layer()
    blind = Effort(penalties=(1e6,), iterations=1, refits=0, sweep=True)
    swept, _ = sweep(weight.float(), factor.upper, pattern)
    found = solve(weight, factor, pattern, effort=blind)
    assert found.objective <= loss(swept, weight, factor)
    assert holds(found.keep, pattern)
    if isinstance(pattern, NM):
        assert bool((found.losses <= row_losses(swept, weight, factor.gram) * (1 + 1e-6)).all())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_independent_channels_lose_their_smallest_weights(pattern: Pattern) -> None:
    """With a diagonal gram the loss is a sum over weights: the best support is plain magnitude on w^2 h_jj."""
    energy = torch.linspace(0.2, 3, 32, dtype=torch.float64)
    factor = factorise(torch.diag(energy), 1e-9)
    weight = torch.randn(8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = solve(weight, factor, pattern)
    assert torch.equal(found.keep, admm.project(weight.square() * energy, pattern))
    torch.testing.assert_close(found.weight, weight.masked_fill(~found.keep, 0), rtol=1e-5, atol=1e-6)


def test_a_case_solved_by_hand() -> None:
    """Channels 0 and 1 are one and the same, so one of them takes over both weights; 2 is weaker than 3."""
    gram = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 4]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 2, 0.5, 0.5]], dtype=torch.float64)
    found = solve(weight, factorise(gram, 1e-6), NM(2, 4))
    assert found.keep[0, 2:].tolist() == [False, True]
    assert int(found.keep[0, :2].sum()) == 1
    assert float(found.weight[0, :2].sum()) == pytest.approx(3, abs=1e-3)
    assert float(found.weight[0, 3]) == pytest.approx(0.5, abs=1e-4)
    assert found.objective == pytest.approx(0.25, abs=1e-3)


def test_small_layers_come_close_to_the_best_of_all_supports() -> None:
    """Brute force over all 6^2 supports of two groups of four; ADMM is a heuristic, so a bound on the mean."""
    pairs = [torch.tensor(p) for p in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))]
    ratios = []
    for seed in range(8):
        weight, factor = layer(rows=1, width=8, seed=seed)
        best = float("inf")
        for first in pairs:
            for second in pairs:
                kept = torch.cat([first, second + 4])
                inner = factor.gram[kept][:, kept]
                solved = torch.linalg.solve(inner, (weight @ factor.gram)[0, kept])
                full = torch.zeros_like(weight)
                full[0, kept] = solved
                best = min(best, loss(full, weight, factor))
        ratios.append(solve(weight, factor, NM(2, 4)).objective / best)
    assert min(ratios) >= 1 - 1e-6
    assert sum(ratios) / len(ratios) < 1.5


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_stacked_layers_are_solved_as_if_alone(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for when they stop, which they do together."""
    monkeypatch.setattr(admm, "SETTLED", -1)
    weight, factor = layer(rows=48)
    stacked = solve(weight, factor, pattern, rows=[32, 16], effort=FAST)
    alone = [solve(part, factor, pattern, effort=FAST) for part in weight.split([32, 16])]
    assert torch.equal(stacked.keep, torch.cat([part.keep for part in alone]))
    torch.testing.assert_close(stacked.weight, torch.cat([part.weight for part in alone]), rtol=1e-4, atol=1e-5)


def test_the_same_input_gives_the_same_bytes() -> None:
    weight, factor = layer()
    for effort in (FULL, FAST):
        first, second = (solve(weight, factor, NM(2, 4), effort=effort) for _ in range(2))
        assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("effort", [FULL, FAST], ids=["full", "fast"])
def test_equal_weights_get_an_exact_pattern(pattern: Pattern, effort: Effort) -> None:
    _, factor = layer()
    found = solve(torch.ones(16, 64), factor, pattern, effort=effort)
    assert found.weight.isfinite().all()
    if isinstance(pattern, NM) or not effort.sweep:
        assert holds(found.keep, pattern)


@pytest.mark.parametrize("effort", [FULL, FAST], ids=["full", "fast"])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_zero_and_constant_rows_stay_finite(pattern: Pattern, effort: Effort) -> None:
    weight, factor = layer()
    weight[3] = 0
    weight[5] = -2.5
    found = solve(weight, factor, pattern, effort=effort)
    assert bool((found.weight[3] == 0).all())
    assert bool(found.weight.isfinite().all())
    assert found.objective <= loss(torch.zeros_like(weight), weight, factor)


@pytest.mark.parametrize("effort", [FULL, FAST], ids=["full", "fast"])
def test_fewer_tokens_than_channels_are_solved_on_the_damped_gram(effort: Effort) -> None:
    weight, factor = layer(tokens=10)
    found = solve(weight, factor, NM(2, 4), effort=effort)
    assert holds(found.keep, NM(2, 4))
    assert found.objective < loss(sweep(weight, factor.upper, NM(2, 4))[0], weight, factor)


def test_a_dead_channel_loses_its_weights_and_disturbs_no_other() -> None:
    gram = correlated(64)
    gram[7] = gram[:, 7] = 0
    factor = factorise(gram)
    weight = torch.randn(16, 64, dtype=torch.float64)
    found = solve(weight, factor, NM(2, 4))
    assert bool((found.weight[:, 7] == 0).all())
    assert not bool(found.keep[:, 7].any())


@pytest.mark.parametrize(("value", "says"), [(float("nan"), "not finite"), (1e300, "too large")])
def test_weights_without_meaning_are_an_error_not_a_support(value: float, says: str) -> None:
    weight, factor = layer()
    weight[2, 3] = value
    with pytest.raises(CalibrationError, match=says):
        solve(weight, factor, NM(2, 4))


def test_columns_that_do_not_divide_are_a_configuration_error() -> None:
    weight, factor = layer(width=66)
    with pytest.raises(ConfigError, match="no multiple of 4"):
        solve(weight, factor, NM(2, 4))


def test_an_undamped_singular_gram_is_an_error() -> None:
    gram = torch.ones(8, 8, dtype=torch.float64) - 3 * torch.eye(8).double().flip(0)
    with pytest.raises(CalibrationError, match="not positive definite"):
        admm.support(torch.ones(2, 8).double(), gram.abs() - 5 * (1 - torch.eye(8)).double(), NM(2, 4))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_projection_keeps_the_largest_and_ties_go_by_index(pattern: Pattern) -> None:
    torch.manual_seed(0)
    for weight in (torch.randn(6, 16), torch.randint(-2, 3, (6, 16)).float(), torch.zeros(6, 16)):
        score = weight.abs()
        if isinstance(pattern, NM):
            expected = ~smallest(score.unflatten(1, (-1, pattern.m)), pattern.n).flatten(1)
        else:
            expected = ~smallest(score.flatten(), int(96 * pattern.ratio + 1e-6)).view(6, 16)
        assert torch.equal(admm.project(weight, pattern), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("effort", [FULL, LEAN, FAST], ids=["full", "lean", "fast"])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6)], ids=str)
def test_a_gpu_finds_what_the_cpu_finds(pattern: Pattern, effort: Effort) -> None:
    """Sums in another order decide near-ties otherwise: at most 1 % of the support, 0.5 % of the loss."""
    weight, _ = layer(rows=256, width=256, tokens=2000)
    gram = correlated(256, 2000)
    here = solve(weight, factorise(gram), pattern, effort=effort)
    there = solve(weight.cuda(), factorise(gram.cuda()), pattern, effort=effort)
    assert there.weight.is_cuda
    assert there.objective == pytest.approx(here.objective, rel=5e-3)
    assert float((there.keep.cpu() ^ here.keep).float().mean()) < 0.01
    assert holds(there.keep, pattern) or effort.sweep
