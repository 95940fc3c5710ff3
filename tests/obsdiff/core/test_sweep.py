import pytest
import torch
from torch import Tensor

from obsdiff.core.linalg import factorise
from obsdiff.core.refit import refit
from obsdiff.core.support import count, smallest, sweep
from obsdiff.sparsity import NM, Pattern, Unstructured
from obsdiff_runtime.errors import ConfigError


def correlated(width: int, tokens: int = 400, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    mix = torch.randn(width, width, dtype=torch.float64) * torch.linspace(1, 0.1, width, dtype=torch.float64)
    x = torch.randn(tokens, width, dtype=torch.float64) @ mix.T
    return x.T @ x / tokens


def plain_sparsegpt(weight: Tensor, gram: Tensor, pattern: Pattern, damp: float, block: int) -> tuple[Tensor, Tensor]:
    """SparseGPT written down naively: H^-1 of the columns still to come, recomputed for every column."""
    weight = weight.clone()
    rows, columns = weight.shape
    damped = gram + damp * gram.diagonal().mean() * torch.eye(columns, dtype=gram.dtype)
    inverses = [torch.linalg.inv(damped[j:, j:]) for j in range(columns)]
    energy = torch.tensor([1.0 / float(inverse[0, 0]) for inverse in inverses], dtype=weight.dtype)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for j in range(columns):
        if isinstance(pattern, NM) and j % pattern.m == 0:
            scores = weight[:, j : j + pattern.m] ** 2 * energy[j : j + pattern.m]
            mask[:, j : j + pattern.m].scatter_(1, scores.argsort(1)[:, : pattern.n], True)
        elif isinstance(pattern, Unstructured) and j % block == 0:
            scores = (weight[:, j : j + block] ** 2 * energy[j : j + block]).flatten()
            chosen = torch.zeros_like(scores, dtype=torch.bool)
            chosen[scores.argsort()[: int(len(scores) * pattern.ratio)]] = True
            mask[:, j : j + block] = chosen.view(rows, -1)
        gone = torch.where(mask[:, j], weight[:, j], 0.0)
        weight[:, j:] -= torch.outer(gone / inverses[j][0, 0], inverses[j][0])
        weight[mask[:, j], j] = 0
    return weight, ~mask


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(1, 4), Unstructured(0.5), Unstructured(0.7)], ids=str)
@pytest.mark.parametrize("block", [8, 16, 128])
def test_lazy_updates_compute_plain_sparsegpt(pattern: Pattern, block: int) -> None:
    gram, weight = correlated(40), torch.randn(12, 40, dtype=torch.float64)
    expected, support = plain_sparsegpt(weight, gram, pattern, 0.01, block)
    found, keep = sweep(weight, factorise(gram, 0.01).upper, pattern, block=block)
    assert torch.equal(keep, support)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_a_case_solved_by_hand() -> None:
    """Channels 0 and 1 are one and the same, so what channel 0 loses channel 1 takes over; 2 and 3 stand alone."""
    gram = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 4]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 2, 0.5, 0.5]], dtype=torch.float64)
    found, keep = sweep(weight, factorise(gram, 1e-9).upper, NM(2, 4))
    assert keep.tolist() == [[False, True, False, True]]
    torch.testing.assert_close(found, torch.tensor([[0.0, 3, 0, 0.5]], dtype=torch.float64), rtol=1e-7, atol=1e-7)


def test_with_a_diagonal_gram_nothing_is_compensated_and_the_scaled_smallest_go() -> None:
    torch.manual_seed(0)
    diagonal = torch.rand(16, dtype=torch.float64) + 0.1
    weight = torch.randn(6, 16, dtype=torch.float64)
    found, keep = sweep(weight, factorise(torch.diag(diagonal), 0.0).upper, NM(2, 4))
    scaled = (weight.abs() * diagonal.sqrt()).view(6, 4, 4)
    largest = torch.zeros(6, 4, 4, dtype=torch.bool).scatter_(2, scaled.topk(2).indices, True).view(6, 16)
    assert torch.equal(keep, largest)
    assert torch.equal(found, weight * largest)


def test_an_unstructured_block_loses_exactly_its_share_and_the_last_block_is_ragged() -> None:
    gram, weight = correlated(37), torch.randn(9, 37, dtype=torch.float64)
    _, keep = sweep(weight, factorise(gram).upper, Unstructured(0.3), block=16)
    lost = [int((~part).sum()) for part in keep.split(16, dim=1)]
    assert lost == [int(9 * 16 * 0.3), int(9 * 16 * 0.3), int(9 * 5 * 0.3)]


def test_every_group_of_every_row_holds_the_pattern_also_where_weights_are_equal() -> None:
    weight = torch.ones(8, 48, dtype=torch.float64)
    for n, m in ((1, 2), (2, 4), (3, 4), (5, 8), (2, 6)):
        found, keep = sweep(weight, factorise(correlated(48)).upper, NM(n, m), block=10)
        assert bool(((~keep).view(8, -1, m).sum(-1) == n).all())
        assert bool((found[~keep] == 0).all())


def test_a_width_that_m_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"10 input columns are no multiple of 4.*dense"):
        sweep(torch.ones(2, 10), torch.eye(10), NM(2, 4))


def test_the_sweep_is_no_better_than_least_squares_on_its_own_support() -> None:
    gram, weight = correlated(24), torch.randn(3, 24, dtype=torch.float64)
    factor = factorise(gram)
    found, keep = sweep(weight, factor.upper, NM(2, 4))
    for row in range(3):
        kept = keep[row].nonzero().flatten()
        best = torch.zeros(24, dtype=torch.float64)
        best[kept] = refit(weight[row : row + 1], factor.gram, kept)[0]

        def loss(candidate: Tensor, row: int = row) -> float:
            change = candidate - weight[row]
            return float(change @ factor.gram @ change)

        assert loss(best) <= loss(found[row]) < loss(weight[row] * keep[row])


def test_smallest_takes_the_first_of_equals() -> None:
    assert smallest(torch.tensor([[1.0, 0, 1, 0], [2, 2, 2, 2]]), 3).tolist() == [
        [True, True, False, True],
        [True, True, True, False],
    ]
    assert not bool(smallest(torch.ones(5), 0).any())


def test_a_share_is_counted_as_typed() -> None:
    assert [count(100, ratio) for ratio in (0.29, 0.57, 0.999, 0.0)] == [29, 57, 99, 0]
