"""Heun's method in sigma, two calls a step; diffusers' HeunDiscreteScheduler."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from obsdiff_runtime.noise import Noise
from obsdiff_runtime.schedulers.schedule import Floats, choose, options, respaced, spaced_timesteps
from obsdiff_runtime.schedulers.sigma_space import SigmaSpace, sigmas_at, timesteps_at, train_sigmas

DEFAULTS: Final[dict[str, Any]] = {
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "clip_sample": False,
    "clip_sample_range": 1.0,
}
BETAS: Final[dict[str, Any]] = {"beta_start": 0.00085, "beta_end": 0.012}


class HeunPair:
    """One step in two calls: along the first slope, then again from the start along the mean of both."""

    def __init__(self) -> None:
        self._first: tuple[Floats, Floats] | None = None

    def move(self, sample: Floats, slope: Floats, width: float) -> Floats:
        if self._first is None:
            self._first = sample, slope
            return sample + width * slope
        start, first_slope = self._first
        self._first = None
        return start + (width / 2) * (first_slope + slope)


class Heun(SigmaSpace):
    """Karras et al. 2022 (arXiv 2206.00364), algorithm 1; the last step, to sigma 0, is Euler's."""

    order = 2

    def __init__(self, config: Mapping[str, Any], steps: int, image_tokens: int, noise: Noise) -> None:
        given = options(config, DEFAULTS)
        choose(config, "prediction_type", given["prediction_type"], "epsilon", "v_prediction", "sample")
        self._clip = float(given["clip_sample_range"]) if given["clip_sample"] else None
        self._pair = HeunPair()
        trained = train_sigmas(BETAS | dict(config))
        timesteps = spaced_timesteps(config, steps, given["timestep_spacing"]).astype(np.float32)
        sigmas = sigmas_at(timesteps, trained)
        spaced = respaced(config, sigmas, steps)
        if spaced is not None:
            sigmas, timesteps = spaced, timesteps_at(spaced, trained)
        super().__init__(np.append(doubled(sigmas), 0), given["prediction_type"], given["timestep_spacing"])
        self.timesteps: Floats = doubled(timesteps).astype(np.float32)

    def step(self, output: Floats, index: int, sample: Floats) -> Floats:
        clean = self._clean(output, sample, index)
        if self._clip is not None:
            clean = np.clip(clean, -self._clip, self._clip)
        return self._pair.move(sample, (sample - clean) / self._sigmas[index], heun_width(self._sigmas, index))


def doubled(values: Floats) -> Floats:
    """a b b c c ...: every value but the first belongs to the end of one step and the start of the next."""
    return np.concatenate([values[:1], np.repeat(values[1:], 2)])


def heun_width(sigmas: list[float], index: int) -> float:
    """Of the step that call `index` belongs to."""
    start = index - index % 2
    return sigmas[start + 1] - sigmas[start]
