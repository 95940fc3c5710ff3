"""Euler steps of the probability-flow ODE in sigma (SDXL); diffusers' EulerDiscreteScheduler."""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from obsdiff_runtime.schedulers.schedule import (
    Floats,
    alphas_cumprod,
    choose,
    exponential,
    karras,
    options,
    refuse,
    spaced_timesteps,
)

DEFAULTS: Final[dict[str, Any]] = {
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "sigma_min": None,
    "sigma_max": None,
    "timestep_spacing": "linspace",
    "timestep_type": "discrete",
    "rescale_betas_zero_snr": False,
    "final_sigmas_type": "zero",
}
LEAST_ALPHA: Final = 2.0**-24


class Euler:
    """Karras et al. 2022 (arXiv 2206.00364), algorithm 1 without its noise."""

    def __init__(self, config: Mapping[str, Any], steps: int, image_tokens: int) -> None:
        refuse(config, "use_beta_sigmas")
        given = options(config, DEFAULTS)
        choose(config, "prediction_type", given["prediction_type"], "epsilon", "v_prediction", "sample")
        choose(config, "interpolation_type", given["interpolation_type"], "linear", "log_linear")
        choose(config, "final_sigmas_type", given["final_sigmas_type"], "zero", "sigma_min")
        self._prediction_type = given["prediction_type"]
        alphas = alphas_cumprod(config, rescale=given["rescale_betas_zero_snr"])
        if given["rescale_betas_zero_snr"]:
            alphas[-1] = LEAST_ALPHA  # so that the first sigma is finite
        train_sigmas = np.sqrt((1 - alphas) / alphas)
        timesteps = _timesteps(config, steps, given["timestep_spacing"])
        sigmas, timesteps = _spaced(given, train_sigmas, timesteps, steps)
        last = train_sigmas[0] if given["final_sigmas_type"] == "sigma_min" else 0
        self._sigmas: Floats = np.append(sigmas, last).astype(np.float32)
        if given["timestep_type"] == "continuous" and self._prediction_type == "v_prediction":
            self.timesteps: Floats = np.float32(0.25) * np.log(self._sigmas[:-1])
        else:
            self.timesteps = timesteps.astype(np.float32)
        highest = float(self._sigmas.max())
        self.initial_sigma = (highest**2 + 1) ** 0.5 if given["timestep_spacing"] == "leading" else highest

    def scale(self, sample: Floats, index: int) -> Floats:
        return sample / math.sqrt(float(self._sigmas[index]) ** 2 + 1)

    def step(self, output: Floats, index: int, sample: Floats) -> Floats:
        sigma, after = float(self._sigmas[index]), float(self._sigmas[index + 1])
        if self._prediction_type == "epsilon":
            clean = sample - sigma * output
        elif self._prediction_type == "v_prediction":
            clean = output * (-sigma / math.sqrt(sigma**2 + 1)) + sample / (sigma**2 + 1)
        else:
            clean = output
        return sample + (sample - clean) * ((after - sigma) / sigma)


def _timesteps(config: Mapping[str, Any], steps: int, spacing: str) -> Floats:
    return np.asarray(spaced_timesteps(config, steps, spacing), dtype=np.float32)


def _spaced(given: dict[str, Any], train_sigmas: Floats, timesteps: Floats, steps: int) -> tuple[Floats, Floats]:
    """Sigmas from high to low, and the timesteps that belong to them."""
    if given["interpolation_type"] == "linear":
        sigmas: Floats = np.interp(timesteps, np.arange(len(train_sigmas)), train_sigmas)
    else:
        ends = np.log(train_sigmas[-1]), np.log(train_sigmas[0])
        sigmas = np.exp(np.linspace(*ends, steps + 1, dtype=np.float32))
    if not (given["use_karras_sigmas"] or given["use_exponential_sigmas"]):
        return sigmas, timesteps
    space = karras if given["use_karras_sigmas"] else exponential
    sigmas = space(sigmas, steps, given["sigma_min"], given["sigma_max"])
    return sigmas, np.interp(np.log(sigmas), np.log(train_sigmas), np.arange(len(train_sigmas)))
