"""How much each sampler step counts in the gram.

The paper lets alpha_t fall from a_max at the first, noisiest step to a_min at the last, as the logarithm of the steps
that remain (arXiv 2510.06751, section 3):

    alpha_t = a_min + (a_max - a_min) / ln T * ln(T - t + 1),    t = 1 .. T
"""

from typing import Final

import torch
from torch import Tensor

from obsdiff_runtime.errors import ConfigError

SCHEDULES: Final = ("log-decrease", "uniform", "linear-increase", "linear-decrease", "log-increase")


def weights(schedule: str, steps: int, *, a_min: float = 0.8, a_max: float = 1.2) -> Tensor:
    """The weight of each sampler step.

    Args:
        schedule: one of SCHEDULES. "log-decrease" is the paper's.
        steps: T, at least 1; a single step weighs 1.
        a_min: the smallest weight.
        a_max: the largest weight.

    Returns:
        (steps,), float64; the first is that of the noisiest step.

    Raises:
        ConfigError: no such schedule, or no step.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"time weights: '{schedule}' is no schedule; choose one of {', '.join(SCHEDULES)}")
    if steps < 1:
        raise ConfigError(f"time weights: {steps} steps; calibration needs at least 1")
    if steps == 1 or schedule == "uniform":
        return torch.ones(steps, dtype=torch.float64)

    shape, _, direction = schedule.partition("-")
    remaining = torch.arange(steps, 0, -1, dtype=torch.float64)  # T - t + 1
    share = remaining.log() / remaining[0].log() if shape == "log" else (remaining - 1) / (steps - 1)
    falling = a_min + (a_max - a_min) * share
    return falling if direction == "decrease" else falling.flip(0)
