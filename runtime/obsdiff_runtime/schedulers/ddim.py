"""DDIM, also with noise at each step; diffusers' DDIMScheduler."""

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
    "num_train_timesteps": 1000,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
}


class Ddim:
    """Song et al. 2021 (arXiv 2010.02502), eq. 12.

    Args:
        eta: of eq. 16: with 0 no noise is added, with 1 as much as by DDPM.
    """

    order = 1
    initial_sigma = 1.0

    def __init__(
        self, config: Mapping[str, Any], steps: int, image_tokens: int, noise: Noise, *, eta: float = 0.0
    ) -> None:
        self._noise, self._eta = noise, eta
        refuse(config, "thresholding")
        given = options(config, DEFAULTS)
        choose(config, "prediction_type", given["prediction_type"], "epsilon", "v_prediction", "sample")
        self._prediction_type = given["prediction_type"]
        self._clip = float(given["clip_sample_range"]) if given["clip_sample"] else None
        self._alphas = alphas_cumprod(config, rescale=given["rescale_betas_zero_snr"])
        self._last_alpha = 1.0 if given["set_alpha_to_one"] else float(self._alphas[0])
        self._stride = given["num_train_timesteps"] // steps
        self.timesteps: NDArray[np.int64] = np.round(spaced_timesteps(config, steps, given["timestep_spacing"])).astype(
            np.int64
        )

    def scale(self, sample: Floats, index: int) -> Floats:
        return sample

    def noised(self, clean: Floats, noise: Floats, index: int) -> Floats:
        return noised(clean, noise, float(self._alphas[self.timesteps[index]]))

    def step(self, output: Floats, index: int, sample: Floats) -> Floats:
        timestep = int(self.timesteps[index])
        before = timestep - self._stride
        alpha = float(self._alphas[timestep])
        alpha_after = float(self._alphas[before]) if before >= 0 else self._last_alpha
        clean, noise = parted(output, sample, alpha, self._prediction_type)
        if self._clip is not None:
            clean = np.clip(clean, -self._clip, self._clip)
        if not self._eta:
            return noised(clean, noise, alpha_after)
        variance = self._eta**2 * (1 - alpha_after) / (1 - alpha) * (1 - alpha / alpha_after)
        towards: Floats = math.sqrt(alpha_after) * clean + math.sqrt(1 - alpha_after - variance) * noise
        return towards + math.sqrt(variance) * self._noise(sample.shape)
