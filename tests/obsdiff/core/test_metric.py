"""What errors of an output cost: the estimate against the exact second moments, and what is solved for with it."""

import pytest
import torch
from torch import Tensor

from obsdiff.core import admm, linalg, metric
from obsdiff.core.metric import GradientMoments, Metric, Stack
from obsdiff.core.solver import FAST, FULL, LEAN, SWEPT, Effort, solve
from obsdiff.sparsity import NM, Pattern, Unstructured
from obsdiff_runtime.errors import CalibrationError


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(tokens: int, out: int, falling: float = 1.0) -> Tensor:
    """Tokens whose directions matter less and less, in a basis of their own, and rows of unlike size."""
    basis = torch.linalg.qr(seeded(out, out, seed=1))[0]
    sizes = torch.arange(1, out + 1).float().pow(-falling)
    return (seeded(tokens, out) * sizes) @ basis.mT * torch.linspace(0.5, 2, out)


def matrix(found: Metric) -> Tensor:
    """S, (out, out), up to its constant."""
    root = found.root(torch.eye(len(found.scale), dtype=torch.float64))
    return root.mT @ root


def of(values: Tensor) -> Metric:
    sums = GradientMoments(values.shape[1])
    sums.add(values)
    found = sums.metric()
    assert found is not None
    return found


def correlation(values: Tensor) -> Tensor:
    second = values.double().mT @ values.double()
    scale = second.diagonal().sqrt()
    return second / scale[:, None] / scale


def test_strong_directions_are_exact_and_weak_ones_are_their_mean() -> None:
    values = gradients(4000, 16)
    found, exact = of(values), correlation(values)
    strengths, vectors = torch.linalg.eigh(exact)
    count = 8  # half of all
    expected = strengths.clone()
    expected[:-count] = strengths[:-count].mean()
    expected = (1 - metric.RIDGE) * expected + metric.RIDGE  # 4000 tokens of 16 channels are enough
    inner = (vectors * expected) @ vectors.mT
    assert torch.allclose(matrix(found) / found.scale[:, None] / found.scale, inner, atol=1e-5)
    assert torch.allclose(
        found.scale, values.double().square().sum(0).sqrt() / values.double().square().sum(0).sqrt().max()
    )


def test_calls_add_up_and_weigh() -> None:
    values = gradients(300, 12)
    sums, whole = GradientMoments(12), GradientMoments(12)
    sums.add(values[:100], 2.0)
    sums.add(values[100:], 0.5)
    whole.add(torch.cat([values[:100] * 2**0.5, values[100:] * 0.5**0.5]))
    for one, other in zip(sums.sums(), whole.sums(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5)


def test_of_a_wide_output_the_strongest_directions_are_found_without_its_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = gradients(2000, 96, falling=1.5)
    exact = correlation(values)
    strengths, vectors = torch.linalg.eigh(exact)
    monkeypatch.setattr(metric, "RANK", 12)
    sums = GradientMoments(96)
    sums.add(values)
    assert sums.sums()[0].shape == (96, 24)
    found = sums.metric()
    assert found is not None
    assert found.basis.shape == (96, 12)
    seen = (vectors[:, -4:].mT @ found.basis.double()).square().sum(dim=1)
    assert float(seen.min()) > 0.98  # the four strongest lie in what was found
    assert found.strengths[:4].double() == pytest.approx((1 - metric.RIDGE) * strengths.flip(0)[:4], rel=0.1)


def test_fewer_tokens_than_columns_are_enough() -> None:
    values = gradients(40, 600)
    found = of(values)
    assert all(bool(tensor.isfinite().all()) for tensor in found.tensors().values())
    change = seeded(600, 3, seed=4).double()
    exact = (values.double() @ change).square().sum()
    assert float(found.root(change).square().sum()) * float(values.square().sum(0).max()) > 0.5 * float(exact)


def test_an_estimate_from_few_tokens_is_drawn_to_the_identity() -> None:
    few, many = of(gradients(16, 16)), of(gradients(1600, 16))
    assert few.rest >= 0.5
    assert many.rest < 0.3


def test_root_and_unroot_undo_one_another() -> None:
    found, rows = of(gradients(500, 20)), seeded(20, 7, seed=3).double()
    assert torch.allclose(found.unroot(found.root(rows)), rows, atol=1e-6)
    again = Metric.of_tensors(found.tensors())
    assert torch.equal(again.root(rows), found.root(rows))


def test_what_does_not_reach_the_output_has_no_metric() -> None:
    sums = GradientMoments(8)
    sums.add(torch.zeros(5, 8))
    assert sums.metric() is None


def test_a_gradient_that_is_not_finite_is_refused_and_not_counted() -> None:
    sums = GradientMoments(4)
    with pytest.raises(CalibrationError, match="not finite"):
        sums.add(torch.tensor([[1.0, float("inf"), 0.0, 0.0]]))
    assert float(sums.sums()[1].sum()) == 0


def test_rows_that_never_matter_are_still_solved_for() -> None:
    values = gradients(500, 12)
    values[:, 3] = 0
    found = of(values)
    assert float(found.scale[3]) == pytest.approx(metric.FAINT)
    assert bool(matrix(found).isfinite().all())


def test_a_stack_is_its_layers_one_below_another() -> None:
    found, rows = of(gradients(500, 10)), seeded(16, 5, seed=5).double()
    stack = Stack([found, None], [10, 6], rows)
    inner = matrix(found) / found.scale[:, None] / found.scale
    assert torch.allclose(stack.apply(rows), torch.cat([inner @ rows[:10], rows[10:]]), atol=1e-6)
    assert torch.allclose(stack.apply(stack.eased(rows)), torch.cat([found.rest * rows[:10], rows[10:]]), atol=1e-5)


def problem(out: int = 24, width: int = 32) -> tuple[Tensor, linalg.Factor, Metric]:
    x = seeded(600, width, seed=7) @ seeded(width, width, seed=8)
    gram = (x.mT @ x / 600).double()
    return seeded(out, width, seed=9), linalg.factorise(gram), of(gradients(1000, out, falling=1.5))


def test_a_step_of_admm_minimises_what_it_says() -> None:
    """The second step, for the first one stays where it is: in float64, all weights in one system of equations."""
    weight, factor, costs = problem(10, 12)
    gram, scale = linalg.unit_diagonal(factor.gram, torch.float64)
    stack, rho = Stack([costs], [10], gram), 0.3
    target = weight.double() / scale * stack.scale
    inner = matrix(costs) / costs.scale[:, None] / costs.scale
    first = target.masked_fill(~admm.project(target, NM(2, 4)), 0)
    drawn = 2 * first - target  # D - V, where V = W* - D
    least = costs.rest * torch.eye(10, dtype=torch.float64)
    both = torch.kron(inner, gram + rho * torch.eye(12, dtype=torch.float64))
    right = inner @ target @ gram + rho * (least @ drawn + (inner - least) @ target)
    free = torch.linalg.solve(both, right.flatten()).view(10, 12)
    keep, start = admm.support(target, gram, NM(2, 4), stack=stack, penalties=[rho], iterations=2)
    wanted = free + target - first  # W + V
    assert torch.equal(keep, admm.project(wanted, NM(2, 4)))
    assert torch.allclose(start, wanted.masked_fill(~keep, 0), atol=1e-6)


def cost(found: Tensor, target: Tensor, factor: linalg.Factor, costs: Metric) -> float:
    change = found - target.double()
    return float((matrix(costs) @ change @ factor.gram * change).sum())


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6)], ids=str)
@pytest.mark.parametrize("effort", [LEAN, FAST, SWEPT, FULL], ids=["lean", "fast", "swept", "full"])
def test_what_is_solved_for_with_a_metric_costs_less(pattern: Pattern, effort: Effort) -> None:
    weight, factor, costs = problem()
    plain = solve(weight, factor, pattern, effort=effort)
    found = solve(weight, factor, pattern, metrics=[costs], effort=effort)
    kept = int(found.keep.sum())
    assert kept == int(plain.keep.sum()) == weight.numel() - int(weight.numel() * pattern.ratio + 1e-6)
    assert not bool(found.weight[~found.keep].any())
    assert cost(found.weight, weight, factor, costs) < 0.9 * cost(plain.weight, weight, factor, costs)
    assert found.objective == pytest.approx(cost(found.weight, weight, factor, costs), rel=1e-5)


def test_the_refit_is_the_least_squares_solution_of_all_rows_together() -> None:
    weight, factor, costs = problem(out=8, width=12)
    found = solve(
        weight,
        factor,
        NM(2, 4),
        metrics=[costs],
        effort=Effort(penalties=(0.3,), iterations=5, refits=400, sweep=False),
    )
    keep = found.keep.flatten()
    both = torch.kron(matrix(costs), factor.gram)  # of the rows one behind another
    exact = torch.zeros(keep.numel(), dtype=torch.float64)
    exact[keep] = torch.linalg.solve(both[keep][:, keep], (both @ weight.double().flatten())[keep])
    assert cost(found.weight, weight, factor, costs) == pytest.approx(
        cost(exact.view(8, 12), weight, factor, costs), rel=1e-4
    )


def test_admm_with_a_metric_ends_nearer_to_the_best_support_than_without() -> None:
    """Both supports refitted in the metric: what differs is which weights stay."""
    weight, factor, costs = problem()
    gram, scale = linalg.unit_diagonal(factor.gram)
    stack = Stack([costs], [len(weight)], gram)
    wanted = (weight.double() / scale * stack.scale).float()
    alone, _ = admm.support((weight.double() / scale).float(), gram, NM(2, 4))
    together, _ = admm.support(wanted, gram, NM(2, 4), stack=stack)

    def least(keep: Tensor) -> float:
        both = torch.kron(matrix(costs), factor.gram)
        flat, exact = keep.flatten(), torch.zeros(keep.numel(), dtype=torch.float64)
        exact[flat] = torch.linalg.solve(both[flat][:, flat], (both @ weight.double().flatten())[flat])
        return cost(exact.view_as(weight), weight, factor, costs)

    assert least(together) < least(alone)


def test_layers_of_one_input_are_solved_alike_alone_and_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for when they stop, which they do together."""
    monkeypatch.setattr(admm, "SETTLED", -1)
    weight, factor, costs = problem()
    other = seeded(6, 32, seed=11)
    both = solve(torch.cat([weight, other]), factor, NM(2, 4), rows=[24, 6], metrics=[costs, None], effort=FAST)
    alone = solve(weight, factor, NM(2, 4), metrics=[costs], effort=FAST)
    assert torch.allclose(both.weight[:24], alone.weight, atol=1e-4)
    assert torch.allclose(both.weight[24:], solve(other, factor, NM(2, 4), effort=FAST).weight, atol=1e-4)
