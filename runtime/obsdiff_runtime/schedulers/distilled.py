"""Samplers of models that were distilled to few steps; diffusers' LCMScheduler and TCDScheduler."""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.noise import Noise
from obsdiff_runtime.schedulers.schedule import Floats, alphas_cumprod, choose, noised, options, parted, refuse

DEFAULTS: Final[dict[str, Any]] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "original_inference_steps": 50,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "timestep_scaling": 10.0,
    "rescale_betas_zero_snr": False,
}
SIGMA_DATA: Final = 0.5


class _Distilled:
    """Steps evenly among those that the denoiser was distilled from."""

    order = 1
    initial_sigma = 1.0

    def __init__(self, config: Mapping[str, Any], steps: int, strength: float) -> None:
        refuse(config, "thresholding")
        self._given = given = options(config, DEFAULTS)
        choose(config, "prediction_type", given["prediction_type"], "epsilon", "v_prediction", "sample")
        original = int(given["original_inference_steps"])
        most = int(original * strength)
        if steps > most:
            left = "" if strength == 1 else f" that strength {strength:g} leaves of the {original}"
            raise ConfigError(f"{steps} steps are more than the {most}{left} that the denoiser was distilled from")
        self._all_alphas = alphas = alphas_cumprod(given, rescale=given["rescale_betas_zero_snr"])
        timesteps = np.arange(most, 0, -1) * (int(given["num_train_timesteps"]) // original) - 1
        self.timesteps: NDArray[np.int64] = timesteps[np.linspace(0, most, steps, endpoint=False).astype(np.int64)]
        self._alphas = np.append(alphas[self.timesteps], alphas[0])  # (calls + 1,)

    def scale(self, sample: Floats, index: int) -> Floats:
        return sample

    def noised(self, clean: Floats, noise: Floats, index: int) -> Floats:
        return noised(clean, noise, float(self._alphas[index]))

    def _parted(self, output: Floats, sample: Floats, index: int) -> tuple[Floats, Floats]:
        return parted(output, sample, float(self._alphas[index]), self._given["prediction_type"])


class Lcm(_Distilled):
    """Luo et al. 2023 (arXiv 2310.04378): at each step a clean sample, to which less noise is added again.

    Args:
        strength: the share of the noise levels, from the least noise on, that the steps are spaced over.
    """

    def __init__(
        self, config: Mapping[str, Any], steps: int, image_tokens: int, noise: Noise, *, strength: float = 1.0
    ) -> None:
        super().__init__(config, steps, strength)
        self._noise = noise
        self._clip = float(self._given["clip_sample_range"]) if self._given["clip_sample"] else None

    def step(self, output: Floats, index: int, sample: Floats) -> Floats:
        clean, _ = self._parted(output, sample, index)
        if self._clip is not None:
            clean = np.clip(clean, -self._clip, self._clip)
        scaled = float(self.timesteps[index]) * float(self._given["timestep_scaling"])
        length = scaled**2 + SIGMA_DATA**2
        consistent = scaled / math.sqrt(length) * clean + SIGMA_DATA**2 / length * sample  # at timestep 0 the sample
        if index + 1 == len(self.timesteps):
            return consistent
        return self.noised(consistent, self._noise(sample.shape), index + 1)


class Tcd(_Distilled):
    """Zheng et al. 2024 (arXiv 2402.19159): each step goes further than to the next, from where noise leads back.

    Args:
        eta: how much further, of the way to no noise at all: the paper's gamma. With 0 no noise is added.
    """

    def __init__(
        self, config: Mapping[str, Any], steps: int, image_tokens: int, noise: Noise, *, eta: float = 0.0
    ) -> None:
        super().__init__(config, steps, 1.0)
        self._noise = noise if eta else None
        self._further = self._all_alphas[np.floor((1 - eta) * np.append(self.timesteps[1:], 0)).astype(np.int64)]

    def step(self, output: Floats, index: int, sample: Floats) -> Floats:
        further = float(self._further[index])
        reached = noised(*self._parted(output, sample, index), further)
        if self._noise is None or index + 1 == len(self.timesteps):
            return reached
        return noised(reached, self._noise(sample.shape), float(self._alphas[index + 1]) / further)
