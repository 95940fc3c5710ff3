"""Euler steps of the probability-flow ODE in sigma (SDXL); diffusers' EulerDiscreteScheduler."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from obsdiff_runtime.noise import Noise
from obsdiff_runtime.schedulers.schedule import Floats, choose, options, respaced, spaced_timesteps
from obsdiff_runtime.schedulers.sigma_space import (
    SigmaSpace,
    final_sigma,
    sigmas_at,
    timesteps_at,
    train_sigmas,
)

DEFAULTS: Final[dict[str, Any]] = {
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "timestep_spacing": "linspace",
    "timestep_type": "discrete",
    "rescale_betas_zero_snr": False,
    "final_sigmas_type": "zero",
}


class Euler(SigmaSpace):
    """Karras et al. 2022 (arXiv 2206.00364), algorithm 1 without its noise."""

    def __init__(self, config: Mapping[str, Any], steps: int, image_tokens: int, noise: Noise) -> None:
        given = options(config, DEFAULTS)
        choose(config, "prediction_type", given["prediction_type"], "epsilon", "v_prediction", "sample")
        choose(config, "interpolation_type", given["interpolation_type"], "linear", "log_linear")
        trained = train_sigmas(config, rescale=given["rescale_betas_zero_snr"])
        timesteps = np.asarray(spaced_timesteps(config, steps, given["timestep_spacing"]), dtype=np.float32)
        if given["interpolation_type"] == "linear":
            sigmas = sigmas_at(timesteps, trained)
        else:
            sigmas = np.exp(np.linspace(np.log(trained[-1]), np.log(trained[0]), steps + 1, dtype=np.float32))
        spaced = respaced(config, sigmas, steps)
        if spaced is not None:
            sigmas, timesteps = spaced, timesteps_at(spaced, trained)
        last = final_sigma(config, given["final_sigmas_type"], float(trained[0]))
        super().__init__(np.append(sigmas, last), given["prediction_type"], given["timestep_spacing"])
        self.timesteps: Floats = timesteps.astype(np.float32)
        if given["timestep_type"] == "continuous" and given["prediction_type"] == "v_prediction":
            self.timesteps = np.float32(0.25) * np.log(sigmas.astype(np.float32))

    def step(self, output: Floats, index: int, sample: Floats) -> Floats:
        sigma, after = self._sigmas[index], self._sigmas[index + 1]
        return sample + (sample - self._clean(output, sample, index)) * ((after - sigma) / sigma)
