import math

import pytest
import torch

from obsdiff.core.timesteps import SCHEDULES, weights
from obsdiff_runtime.errors import ConfigError


def test_25_steps_weigh_what_the_paper_prints() -> None:
    found = weights("log-decrease", 25)
    printed = {1: 1.200, 2: 1.195, 3: 1.190, 11: 1.137, 18: 1.058, 21: 1.000, 22: 0.972, 23: 0.937, 24: 0.886, 25: 0.8}
    for step, value in printed.items():
        assert float(found[step - 1]) == pytest.approx(value, abs=5e-4)
    assert float(found.mean()) == pytest.approx(1.088, abs=5e-4)


def test_log_decrease_is_the_formula() -> None:
    steps, low, high = 7, 0.3, 2.0
    formula = [low + (high - low) / math.log(steps) * math.log(steps - t + 1) for t in range(1, steps + 1)]
    assert weights("log-decrease", steps, a_min=low, a_max=high).tolist() == pytest.approx(formula)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_run_between_their_bounds_in_float64(schedule: str) -> None:
    found = weights(schedule, 10)
    assert found.shape == (10,)
    assert found.dtype == torch.float64
    if schedule == "uniform":
        assert found.tolist() == [1.0] * 10
        return
    assert float(found.min()) == pytest.approx(0.8)
    assert float(found.max()) == pytest.approx(1.2)
    steps = found.diff()
    assert bool((steps < 0).all()) if schedule.endswith("decrease") else bool((steps > 0).all())


def test_increasing_schedules_mirror_the_decreasing() -> None:
    for shape in ("log", "linear"):
        assert torch.equal(weights(f"{shape}-increase", 9), weights(f"{shape}-decrease", 9).flip(0))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_single_step_weighs_one(schedule: str) -> None:
    assert weights(schedule, 1).tolist() == [1.0]


@pytest.mark.parametrize(("schedule", "steps"), [("cosine", 5), ("uniform", 0)])
def test_no_schedule_or_no_step_is_a_configuration_error(schedule: str, steps: int) -> None:
    with pytest.raises(ConfigError):
        weights(schedule, steps)
