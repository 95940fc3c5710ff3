"""Euler steps that go below and come back with new noise; diffusers' EulerAncestralDiscreteScheduler."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from obsdiff_runtime.noise import Noise
from obsdiff_runtime.schedulers.schedule import Floats, choose, options, spaced_timesteps
from obsdiff_runtime.schedulers.sigma_space import SigmaSpace, sigmas_at, train_sigmas

DEFAULTS: Final[dict[str, Any]] = {
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "rescale_betas_zero_snr": False,
}


class EulerAncestral(SigmaSpace):
    """Ancestral sampling of Song et al. 2021 (arXiv 2011.13456), appendix F, with an Euler step for its mean."""

    def __init__(self, config: Mapping[str, Any], steps: int, image_tokens: int, noise: Noise) -> None:
        given = options(config, DEFAULTS)
        choose(config, "prediction_type", given["prediction_type"], "epsilon", "v_prediction")
        self._noise = noise
        trained = train_sigmas(config, rescale=given["rescale_betas_zero_snr"])
        self.timesteps: Floats = spaced_timesteps(config, steps, given["timestep_spacing"]).astype(np.float32)
        sigmas = np.append(sigmas_at(self.timesteps, trained), 0)
        super().__init__(sigmas, given["prediction_type"], given["timestep_spacing"])

    def step(self, output: Floats, index: int, sample: Floats) -> Floats:
        up, down = _up_and_down(self._sigmas[index], self._sigmas[index + 1])
        sigma = self._sigmas[index]
        moved = sample + (sample - self._clean(output, sample, index)) * ((down - sigma) / sigma)
        return moved + up * self._noise(sample.shape)


def _up_and_down(sigma: float, after: float) -> tuple[float, float]:
    """Deviation of the new noise, and sigma without it: in float32, whose rounding decides what diffusers has left."""
    high, low = np.float32(sigma) ** 2, np.float32(after) ** 2
    up = np.sqrt(low * (high - low) / high)
    return float(up), float(np.sqrt(low - up**2))
