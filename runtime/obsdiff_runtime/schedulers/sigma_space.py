"""What samplers in sigma share, where sample = clean + sigma noise (Karras et al. 2022, arXiv 2206.00364)."""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.schedulers.schedule import Floats, alphas_cumprod, choose

LEAST_ALPHA: Final = 2.0**-24


class SigmaSpace:
    """A ladder of sigmas under a denoiser that predicts epsilon, v or the clean sample.

    Attributes:
        initial_sigma: of the noise to start from.
    """

    order = 1

    def __init__(self, sigmas: Floats, prediction_type: str, spacing: str) -> None:
        """Takes the schedule.

        Args:
            sigmas: (calls + 1,), from high to low; call i is made at the i-th.
            prediction_type: "epsilon", "v_prediction" or "sample".
            spacing: of the timesteps; "leading" ones start below the noisiest, where the clean sample counts too.
        """
        self._sigmas: list[float] = sigmas.astype(np.float32).tolist()
        self._prediction_type = prediction_type
        highest = max(self._sigmas)
        self.initial_sigma = math.hypot(highest, 1) if spacing == "leading" else highest

    def scale(self, sample: Floats, index: int) -> Floats:
        return sample / math.hypot(self._sigmas[index], 1)

    def noised(self, clean: Floats, noise: Floats, index: int) -> Floats:
        return clean + self._sigmas[index] * noise

    def _clean(self, output: Floats, sample: Floats, index: int) -> Floats:
        sigma = self._sigmas[index]
        if self._prediction_type == "epsilon":
            return sample - sigma * output
        if self._prediction_type == "v_prediction":
            return output * (-sigma / math.hypot(sigma, 1)) + sample / (sigma**2 + 1)
        return output


def train_sigmas(config: Mapping[str, Any], *, rescale: bool = False) -> Floats:
    """(train timesteps,), noise over signal at each timestep."""
    alphas = alphas_cumprod(config, rescale=rescale)
    if rescale:
        alphas[-1] = LEAST_ALPHA  # so that the last sigma is finite
    return np.sqrt((1 - alphas) / alphas)


def sigmas_at(timesteps: NDArray[Any], trained: Floats) -> Floats:
    return np.asarray(np.interp(timesteps, np.arange(len(trained)), trained))


def timesteps_at(sigmas: Floats, trained: Floats) -> Floats:
    """Between the trained ones, straight in the logarithm of sigma.

    In diffusers' own order of operations, since some schedulers cut 998.9999 down to 998 and leave 999 alone.
    """
    logs, told = np.log(trained), np.log(sigmas)
    below = np.clip(np.searchsorted(logs, told, side="right") - 1, 0, len(logs) - 2)
    share = np.clip((logs[below] - told) / (logs[below] - logs[below + 1]), 0, 1)
    return np.asarray((1 - share) * below + share * (below + 1))


def final_sigma(config: Mapping[str, Any], kind: str, lowest: float) -> float:
    """What the last step ends at."""
    choose(config, "final_sigmas_type", kind, "zero", "sigma_min")
    return lowest if kind == "sigma_min" else 0.0
