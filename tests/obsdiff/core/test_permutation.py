import itertools

import pytest
import torch
from torch import Tensor

from obsdiff.core.permutation import permute, retained
from obsdiff.sparsity import NM
from obsdiff_runtime.errors import ConfigError


def random_scores(rows: int = 12, channels: int = 64, seed: int = 0) -> Tensor:
    """Channels of very different energy, the loud ones side by side, as massive activations are."""
    generator = torch.Generator().manual_seed(seed)
    energy = torch.linspace(3, -3, channels, dtype=torch.float64).exp()
    return torch.randn(rows, channels, generator=generator, dtype=torch.float64).square() * energy


def naive_retained(score: Tensor, pattern: NM) -> float:
    total = 0.0
    for row in score.tolist():
        for start in range(0, len(row), pattern.m):
            total += sum(sorted(row[start : start + pattern.m])[pattern.n :])
    return total


def best_of_all(score: Tensor, pattern: NM) -> float:
    return max(
        naive_retained(score[:, list(order)], pattern) for order in itertools.permutations(range(score.shape[1]))
    )


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(1, 2)], ids=str)
def test_retained_is_the_sum_of_the_largest_of_each_group(pattern: NM) -> None:
    score = random_scores()
    assert retained(score, pattern) == pytest.approx(naive_retained(score, pattern))


@pytest.mark.parametrize("seed", range(6))
def test_two_groups_find_the_best_of_all_orders_or_a_near_one(seed: int) -> None:
    """Exchanges of one channel for another stop where no single one helps: exact in most cases, close in the rest."""
    score = random_scores(rows=3, channels=6, seed=seed)
    pattern = NM(1, 3)
    found = retained(score[:, permute([score], pattern)], pattern)
    best = best_of_all(score, pattern)
    assert found <= best * (1 + 1e-9)
    assert found >= 0.995 * best


def test_two_groups_of_two_are_solved_exactly() -> None:
    for seed in range(10):
        score = random_scores(rows=4, channels=4, seed=seed)
        found = retained(score[:, permute([score], NM(1, 2))], NM(1, 2))
        assert found == pytest.approx(best_of_all(score, NM(1, 2)), rel=1e-6)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 4), NM(4, 8)], ids=str)
@pytest.mark.parametrize("width", [None, 16, 8])
def test_more_is_retained_in_every_segment_and_channels_stay_in_theirs(pattern: NM, width: int | None) -> None:
    score = random_scores()
    order = permute([score], pattern, width=width)
    assert torch.equal(order.sort().values, torch.arange(64))
    segment = width or 64
    assert torch.equal(order // segment, torch.arange(64) // segment)
    for start in range(0, 64, segment):
        part = slice(start, start + segment)
        before, after = retained(score[:, part], pattern), retained(score[:, order[part]], pattern)
        assert after >= before
    assert retained(score[:, order], pattern) > 1.003 * retained(score, pattern) or segment == 8


@pytest.mark.parametrize("seed", range(5))
def test_more_rounds_never_retain_less(seed: int) -> None:
    score = random_scores(seed=seed)
    found = [
        retained(score[:, permute([score], NM(2, 4), rounds=n, tolerance=-1, seed=seed)], NM(2, 4))
        for n in (0, 1, 5, 50)
    ]
    assert found == sorted(found)
    assert found[-1] > found[0]


def test_two_streams_share_one_order_and_gain_together() -> None:
    first, second = random_scores(seed=1), random_scores(rows=20, seed=2)
    order = permute([first, second], NM(2, 4), width=16)
    assert torch.equal(order, permute([torch.cat([first, second])], NM(2, 4), width=16))
    both = torch.cat([first, second])
    assert retained(both[:, order], NM(2, 4)) > retained(both, NM(2, 4))


@pytest.mark.parametrize("score", [torch.ones(5, 16), torch.zeros(5, 16), torch.eye(4).repeat(1, 4)], ids=str)
def test_the_order_stays_where_nothing_helps(score: Tensor) -> None:
    """Equal scores; no score; groups that already retain every score they have."""
    assert torch.equal(permute([score], NM(2, 4)), torch.arange(16))


def test_a_single_group_has_nobody_to_exchange_with() -> None:
    assert torch.equal(permute([random_scores(channels=16)], NM(2, 4), width=4), torch.arange(16))


def test_the_seed_decides_and_chunks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    score = random_scores()
    order = permute([score], NM(2, 4), seed=3)
    assert torch.equal(order, permute([score], NM(2, 4), seed=3))
    monkeypatch.setattr("obsdiff.core.permutation.CHUNK", 1)
    assert torch.equal(order, permute([score], NM(2, 4), seed=3))


@pytest.mark.parametrize(("channels", "width"), [(18, None), (24, 6), (24, 16)])
def test_segments_that_do_not_divide_are_a_configuration_error(channels: int, width: int | None) -> None:
    with pytest.raises(ConfigError):
        permute([torch.ones(2, channels)], NM(2, 4), width=width)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_retains_what_the_cpu_retains() -> None:
    """The same groups meet; sums in another order may decide a near-tie otherwise."""
    score = random_scores(rows=64, channels=256)
    here, there = permute([score], NM(2, 4)), permute([score.cuda()], NM(2, 4)).cpu()
    assert retained(score[:, there], NM(2, 4)) == pytest.approx(retained(score[:, here], NM(2, 4)), rel=1e-3)
