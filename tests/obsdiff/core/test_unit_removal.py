from dataclasses import replace

import pytest
import torch
from torch import Tensor

from obsdiff.core.linalg import factorise
from obsdiff.core.refit import refit
from obsdiff.core.units import Removal, batches, columns_of, lowest, remove, turns


def every(width: int, number: int, columns: int, streams: int = 1) -> list[Removal]:
    """All columns of so many streams are units of this width."""
    return [Removal(units=columns // width, width=width, number=number, starts=(0,) * streams)]


def inputs(width: int, tokens: int = 300, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    mix = torch.randn(width, width, dtype=torch.float64) * torch.linspace(1, 0.05, width, dtype=torch.float64)
    return torch.randn(tokens, width, dtype=torch.float64) @ mix.T


def masked_lstsq(weight: Tensor, x: Tensor, keep: Tensor, damping: float) -> Tensor:
    """Least squares on the kept columns by QR in float64; damping is extra rows of data."""
    rows = torch.cat([x / len(x) ** 0.5, damping**0.5 * torch.eye(x.shape[1], dtype=x.dtype)])
    solution = torch.linalg.lstsq(rows[:, keep], rows @ weight.T).solution
    found = torch.zeros_like(weight)
    found[:, keep] = solution.T
    return found


def test_refit_is_masked_least_squares() -> None:
    x, weight = inputs(30), torch.randn(10, 30, dtype=torch.float64)
    gram = x.T @ x / len(x)
    keep = torch.tensor([0, 3, 4, 9, 17, 22, 29])
    found = refit(weight, factorise(gram, 1e-6).gram, keep)
    expected = masked_lstsq(weight, x, keep, 1e-6 * float(gram.diagonal().mean()))[:, keep]
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("width", "number"), [(1, 30), (1, 100), (8, 5), (16, 2)])
def test_what_stays_is_the_masked_least_squares_solution(width: int, number: int) -> None:
    x, weight = inputs(128), torch.randn(20, 128, dtype=torch.float64)
    gram = x.T @ x / len(x)
    (kept,), (found,) = remove([weight], [factorise(gram, 0.01)], every(width, number, 128))
    assert len(kept) == 128 // width - number
    assert torch.equal(kept, kept.sort().values)
    columns = columns_of(kept, width)
    expected = masked_lstsq(weight, x, columns, 0.01 * float(gram.diagonal().mean()))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    gone = torch.ones(128, dtype=torch.bool)
    gone[columns] = False
    assert bool((found[:, gone] == 0).all())


def brute_force_heads(weight: Tensor, gram: Tensor, width: int, number: int) -> list[int]:
    """The paper's loop as written: invert the live gram afresh for each head."""
    live, current = list(range(weight.shape[1] // width)), weight.clone()
    for _ in range(number):
        columns = columns_of(torch.tensor(live), width)
        inverse = torch.linalg.inv(gram[columns][:, columns])
        scores = []
        for place, head in enumerate(live):
            block = inverse[place * width : (place + 1) * width, place * width : (place + 1) * width]
            lower = torch.linalg.cholesky(block)
            energy = current[:, head * width : (head + 1) * width].square().sum(0)
            scores.append(float((energy / lower.diagonal().square()).sum()))
        gone = live.pop(scores.index(min(scores)))
        columns = columns_of(torch.tensor(live), width)
        current = torch.zeros_like(weight)
        current[:, columns] = refit(weight, gram, columns)
        assert not bool(current[:, gone * width : (gone + 1) * width].any())
    return live


def test_heads_go_in_the_order_of_the_paper() -> None:
    for seed in range(3):
        x, weight = inputs(48, seed=seed), torch.randn(10, 48, dtype=torch.float64)
        factor = factorise(x.T @ x / len(x))
        (kept,), _ = remove([weight], [factor], every(6, 5, 48))
        assert kept.tolist() == brute_force_heads(weight, factor.gram, 6, 5)


def test_a_duplicated_neuron_goes_first_and_costs_nothing() -> None:
    x = inputs(12)
    x[:, 7] = x[:, 3]
    weight = torch.randn(5, 12, dtype=torch.float64)
    gram = x.T @ x / len(x)
    (kept,), (found,) = remove([weight], [factorise(gram, 1e-9)], every(1, 1, 12))
    assert set(range(12)) - set(kept.tolist()) <= {3, 7}
    output = x @ weight.T
    assert float((x @ found.T - output).norm() / output.norm()) < 1e-6


def test_two_streams_lose_the_same_units_each_compensated_with_its_own_gram() -> None:
    xs = [inputs(32, seed=1), inputs(32, seed=2)]
    weights = [torch.randn(6, 32, dtype=torch.float64), torch.randn(9, 32, dtype=torch.float64)]
    grams = [x.T @ x / len(x) for x in xs]
    (kept,), found = remove(weights, [factorise(gram) for gram in grams], every(4, 3, 32, streams=2))
    columns = columns_of(kept, 4)
    for x, weight, gram, result in zip(xs, weights, grams, found, strict=True):
        expected = masked_lstsq(weight, x, columns, 0.01 * float(gram.diagonal().mean()))
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-8)


SIDE_BY_SIDE = (
    Removal(units=4, width=8, number=2, starts=(0,)),
    Removal(units=96, width=1, number=40, starts=(32,)),
)
"""Heads, and neurons behind them: what the last projection of a Flux single block reads."""


def test_heads_and_neurons_of_one_consumer_are_fitted_together() -> None:
    """The oracle knows nothing of two groups: masked least squares on the concatenated input."""
    x, weight = inputs(128), torch.randn(20, 128, dtype=torch.float64)
    gram = x.T @ x / len(x)
    (heads, neurons), (found,) = remove([weight], [factorise(gram)], SIDE_BY_SIDE)
    assert (len(heads), len(neurons)) == (2, 56)
    columns = torch.cat([columns_of(heads, 8), columns_of(neurons, 1, 32)])
    expected = masked_lstsq(weight, x, columns, 0.01 * float(gram.diagonal().mean()))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    apart = torch.zeros_like(weight)  # each group alone, on its own part of the gram
    for own, kept in ((slice(0, 32), columns_of(heads, 8)), (slice(32, 128), neurons)):
        part = masked_lstsq(weight[:, own], x[:, own], kept, 0.01 * float(gram.diagonal().mean()))
        apart[:, own] = part
    losses = [float(((each - weight) @ gram * (each - weight)).sum()) for each in (found, apart)]
    assert losses[0] < 0.9 * losses[1]


def test_a_group_alone_is_removed_as_if_the_other_were_none() -> None:
    x, weight = inputs(128), torch.randn(20, 128, dtype=torch.float64)
    factor = factorise(x.T @ x / len(x))
    alone = remove([weight], [factor], SIDE_BY_SIDE[1:])
    beside = remove([weight], [factor], [replace(SIDE_BY_SIDE[0], number=0), SIDE_BY_SIDE[1]])
    assert torch.equal(alone[0][0], beside[0][1])
    assert beside[0][0].tolist() == [0, 1, 2, 3]
    assert torch.equal(alone[1][0], beside[1][0])


def test_a_choice_knows_what_went_from_the_other_group() -> None:
    """Neuron 5 says what head 0 says, so each alone goes first and costs nothing; together one of them stays."""
    x, weight = inputs(128), torch.randn(20, 128, dtype=torch.float64)
    x[:, :8] *= 1e-3
    x[:, 0] = x[:, 32 + 5]
    factor = factorise(x.T @ x / len(x), 1e-9)
    heads, neurons = (replace(group, number=1) for group in SIDE_BY_SIDE)
    (left, _), _ = remove([weight], [factor], [heads, replace(neurons, number=0)])
    assert 0 not in left.tolist()
    (_, left), _ = remove([weight], [factor], [replace(heads, number=0), neurons])
    assert 5 not in left.tolist()
    (live, left), _ = remove([weight], [factor], [heads, neurons])
    assert (0 in live.tolist()) != (5 in left.tolist())


def test_streams_of_different_widths_lose_what_they_read() -> None:
    """The second stream reads the heads alone."""
    xs = [inputs(128, seed=1), inputs(32, seed=2)]
    weights = [torch.randn(6, 128, dtype=torch.float64), torch.randn(9, 32, dtype=torch.float64)]
    grams = [x.T @ x / len(x) for x in xs]
    removals = [replace(SIDE_BY_SIDE[0], starts=(0, 0)), replace(SIDE_BY_SIDE[1], starts=(32, None))]
    (heads, neurons), found = remove(weights, [factorise(gram) for gram in grams], removals)
    kept = [torch.cat([columns_of(heads, 8), columns_of(neurons, 1, 32)]), columns_of(heads, 8)]
    for x, weight, gram, result, columns in zip(xs, weights, grams, found, kept, strict=True):
        expected = masked_lstsq(weight, x, columns, 0.01 * float(gram.diagonal().mean()))
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-8)


def test_groups_take_turns_at_one_pace() -> None:
    order = turns([replace(SIDE_BY_SIDE[0], number=2), Removal(units=4000, width=1, number=3000, starts=(32,))])
    assert [size for index, size in order if index == 1] == list(batches(3000, 1))
    shares, gone = [], [0, 0]
    for index, size in order:
        gone[index] += size
        shares.append(abs(gone[0] / 2 - gone[1] / 3000))
    assert max(shares) <= 0.5


def test_ranks_are_fused_reciprocally() -> None:
    """Unit 2 is second in both streams: 2 / 62 beats neither 1 / 61 + 1 / 62 (unit 0) nor loses to 1 / 64 + 1 / 61."""
    image, text = torch.tensor([1.0, 9, 2, 3]), torch.tensor([5.0, 1, 4, 9])
    fused = {u: 1 / (60 + a) + 1 / (60 + b) for u, (a, b) in enumerate(zip((1, 4, 2, 3), (3, 1, 2, 4), strict=True))}
    order = sorted(fused, key=lambda unit: -fused[unit])
    for number in range(1, 5):
        assert lowest([image, text], number).tolist() == sorted(order[:number])


def test_one_stream_keeps_its_own_order_and_ties_go_to_the_first() -> None:
    assert lowest([torch.tensor([3.0, 1, 2, 1])], 1).tolist() == [1]
    assert lowest([torch.tensor([3.0, 1, 2, 1])], 2).tolist() == [1, 3]
    assert lowest([torch.tensor([1.0, 2]), torch.tensor([2.0, 1])], 1).tolist() == [0]


@pytest.mark.parametrize(
    ("number", "first", "steps"),
    [(1946, [717, 102, 64, 64], 20), (2918, [1024, 345, 64], 27), (1229, [358, 64], 15), (50, [50], 1)],
)
def test_neurons_go_in_the_batches_of_the_paper(number: int, first: list[int], steps: int) -> None:
    sizes = list(batches(number, 1))
    assert sizes[: len(first)] == first
    assert len(sizes) == steps
    assert sum(sizes) == number


def test_heads_go_one_at_a_time() -> None:
    assert list(batches(4, 64)) == [1, 1, 1, 1]
