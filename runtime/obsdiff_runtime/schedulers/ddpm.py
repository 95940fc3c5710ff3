"""Ancestral sampling; diffusers' DDPMScheduler."""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.noise import Noise
from obsdiff_runtime.schedulers.schedule import (
    Floats,
    alphas_cumprod,
    choose,
    noised,
    options,
    parted,
    refuse,
    spaced_timesteps,
)

DEFAULTS: Final[dict[str, Any]] = {
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
}
LEAST_VARIANCE: Final = 1e-20


class Ddpm:
    """Ho et al. 2020 (arXiv 2006.11239), algorithm 2 with eq. 7, over a share of the timesteps."""

    order = 1
    initial_sigma = 1.0

    def __init__(self, config: Mapping[str, Any], steps: int, image_tokens: int, noise: Noise) -> None:
        refuse(config, "thresholding")
        given = options(config, DEFAULTS)
        choose(config, "prediction_type", given["prediction_type"], "epsilon", "v_prediction", "sample")
        # a learned variance would be read off channels that the denoiser as exported does not give
        choose(config, "variance_type", given["variance_type"], "fixed_small", "fixed_small_log", "fixed_large")
        self._prediction_type = given["prediction_type"]
        self._large = given["variance_type"] == "fixed_large"
        self._clip = float(given["clip_sample_range"]) if given["clip_sample"] else None
        self._noise = noise
        alphas = alphas_cumprod(config, rescale=given["rescale_betas_zero_snr"])
        self.timesteps: NDArray[np.int64] = np.round(spaced_timesteps(config, steps, given["timestep_spacing"])).astype(
            np.int64
        )
        self._alphas = np.append(alphas[self.timesteps], np.float32(1))  # (calls + 1,), 1 behind the last

    def scale(self, sample: Floats, index: int) -> Floats:
        return sample

    def noised(self, clean: Floats, noise: Floats, index: int) -> Floats:
        return noised(clean, noise, float(self._alphas[index]))

    def step(self, output: Floats, index: int, sample: Floats) -> Floats:
        one = np.float32(1)  # float32 as diffusers: at the last steps, its rounding decides what is left of 1 - alpha
        alpha, alpha_after = self._alphas[index], self._alphas[index + 1]
        beta = one - alpha / alpha_after
        clean = parted(output, sample, float(alpha), self._prediction_type)[0]
        if self._clip is not None:
            clean = np.clip(clean, -self._clip, self._clip)
        share = float(np.sqrt(alpha_after) * beta / (one - alpha))
        rest = float(np.sqrt(alpha / alpha_after) * (one - alpha_after) / (one - alpha))
        mean: Floats = share * clean + rest * sample
        if self.timesteps[index] == 0:
            return mean
        small = max(float((one - alpha_after) / (one - alpha) * beta), LEAST_VARIANCE)
        return mean + math.sqrt(float(beta) if self._large else small) * self._noise(sample.shape)
