"""Scales against every one of the candidates, in float64."""

import numpy as np
import torch

from obsdiff.core import scales


def to_steps(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values / scale).round().clamp(-128, 127) * scale


def exact(values: np.ndarray, scale: float) -> np.ndarray:
    return np.clip(np.rint(values / scale), -128, 127) * scale


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_candidates_are_shares_of_the_largest_magnitude_as_stored():
    found = scales.candidates(torch.tensor([1.27, 0.0]), 127, lambda scale: scale.half().float())
    assert found.shape == (len(scales.SHARES), 2)
    assert torch.equal(found[:, 0], torch.tensor([0.01 * share for share in scales.SHARES]).half().float())


def test_each_output_takes_the_scale_of_least_error():
    weight, importance = seeded(12, 40) ** 3, seeded(40, seed=1).square()
    tried = scales.candidates(weight.abs().amax(1), 127, lambda scale: scale)
    chosen, error = scales.weight_scales(weight, importance, tried, to_steps)
    w, h = weight.double().numpy(), importance.double().numpy()
    costs = np.array(
        [[(h * (w[row] - exact(w[row], float(scale[row]))) ** 2).sum() for row in range(12)] for scale in tried]
    )
    assert np.allclose(chosen.numpy(), tried.numpy()[costs.argmin(0), range(12)])
    assert np.isclose(error, costs.min(0).sum() / (h * w**2).sum(), rtol=1e-4)


def test_one_scale_for_all_takes_the_least_error_over_all():
    weight, importance = seeded(6, 20), torch.ones(20)
    tried = scales.candidates(weight.abs().amax(), 127, lambda scale: scale)
    chosen, _ = scales.weight_scales(weight, importance, tried, to_steps)
    costs = [((weight.double().numpy() - exact(weight.double().numpy(), float(scale))) ** 2).sum() for scale in tried]
    assert chosen.shape == ()
    assert float(chosen) == float(tried[int(np.argmin(costs))])


def test_a_row_of_zeros_costs_nothing_and_disturbs_no_other():
    weight = seeded(3, 8)
    weight[1] = 0
    tried = scales.candidates(weight.abs().amax(1), 127, lambda scale: torch.where(scale > 0, scale, 1.0))
    chosen, error = scales.weight_scales(weight, torch.ones(8), tried, to_steps)
    assert chosen[1] == 1
    assert 0 < error < 1e-3
    nothing, none = scales.weight_scales(weight[1:2], torch.ones(8), tried[:, 1:2], to_steps)
    assert (float(nothing), none) == (1.0, 0.0)


def test_channels_that_nobody_reads_may_be_clipped():
    values = torch.cat([seeded(500, 3), 50 * seeded(500, 1, seed=2)], 1)  # (tokens, k)
    tried = torch.tensor([values.abs().max() / 127, values[:, :3].abs().max() / 127])
    counted = scales.errors(values, torch.ones(4), tried, to_steps)
    ignored = scales.errors(values, torch.tensor([1.0, 1.0, 1.0, 0.0]), tried, to_steps)
    assert int(counted.argmin()) == 0
    assert int(ignored.argmin()) == 1
    wanted = [((values[:, :3].double() - to_steps(values[:, :3].double(), scale)) ** 2).sum() for scale in tried]
    assert torch.allclose(ignored, torch.stack(wanted), rtol=1e-3)
