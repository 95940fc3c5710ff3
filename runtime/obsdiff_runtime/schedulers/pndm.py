"""Pseudo linear multistep (SD 1.5's default), with or without Runge-Kutta start; diffusers' PNDMScheduler."""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.noise import Noise
from obsdiff_runtime.schedulers.schedule import Floats, alphas_cumprod, choose, noised, options, spaced_timesteps

DEFAULTS: Final[dict[str, Any]] = {
    "num_train_timesteps": 1000,
    "skip_prk_steps": False,
    "set_alpha_to_one": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}
STAGES: Final = 4


class Pndm:
    """Liu et al. 2022 (arXiv 2202.09778), eqs. 9, 12 and 13, algorithm 2; keeps the outputs of the last steps."""

    order = 1
    initial_sigma = 1.0

    def __init__(self, config: Mapping[str, Any], steps: int, image_tokens: int, noise: Noise) -> None:
        given = options(config, DEFAULTS)
        choose(config, "prediction_type", given["prediction_type"], "epsilon", "v_prediction")
        self._prediction_type = given["prediction_type"]
        self._alphas = alphas_cumprod(config)
        self._last_alpha = 1.0 if given["set_alpha_to_one"] else float(self._alphas[0])
        self._stride = given["num_train_timesteps"] // steps
        spaced = np.round(spaced_timesteps(config, steps, given["timestep_spacing"])).astype(np.int64)
        if given["skip_prk_steps"]:
            self._warm_up = 0
            # the second timestep comes twice: a first guess, then its correction
            self.timesteps: NDArray[np.int64] = np.concatenate([spaced[:2], spaced[1:]])
        else:
            if steps < STAGES:
                raise ConfigError(f"PNDMScheduler with Runge-Kutta steps needs at least {STAGES} steps, not {steps}")
            start = _runge_kutta_timesteps(spaced, self._stride // 2)
            self._warm_up = len(start)
            self.timesteps = np.concatenate([start, spaced[STAGES - 1 :]])
        self._calls = 0
        self._outputs: list[Floats] = []
        self._sum: Floats = np.zeros((), np.float32)
        self._held: Floats = np.zeros((), np.float32)

    def scale(self, sample: Floats, index: int) -> Floats:
        return sample

    def noised(self, clean: Floats, noise: Floats, index: int) -> Floats:
        return noised(clean, noise, float(self._alphas[self.timesteps[index]]))

    def step(self, output: Floats, index: int, sample: Floats) -> Floats:
        call, self._calls = self._calls, self._calls + 1
        if self._warm_up and call != index:
            raise ConfigError("PNDMScheduler with Runge-Kutta steps cannot begin in the middle; set skip_prk_steps")
        if call < self._warm_up:
            return self._runge_kutta(output, index, sample)
        return self._multistep(output, index, sample, call)

    def _runge_kutta(self, output: Floats, index: int, sample: Floats) -> Floats:
        half = 0 if index % 2 else self._stride // 2
        before = int(self.timesteps[index]) - half
        timestep = int(self.timesteps[index - index % 4])
        stage = index % 4
        if stage == 0:
            self._outputs.append(output)
            self._held = sample
            self._sum = output / 6
        elif stage < 3:
            self._sum = self._sum + output / 3
        else:
            output = self._sum + output / 6
        return self._move(self._held, timestep, before, output)

    def _multistep(self, output: Floats, index: int, sample: Floats, call: int) -> Floats:
        timestep = int(self.timesteps[index])
        before = timestep - self._stride
        correcting = call == 1
        if correcting:
            timestep, before = timestep + self._stride, timestep
        else:
            self._outputs = [*self._outputs[-3:], output]
        if call == 0:
            self._held = sample
        past = self._outputs
        if correcting:
            output, sample = (output + past[-1]) / 2, self._held
        elif len(past) == 2:
            output = (3 * past[-1] - past[-2]) / 2
        elif len(past) == 3:
            output = (23 * past[-1] - 16 * past[-2] + 5 * past[-3]) / 12
        elif len(past) == 4:
            output = (55 * past[-1] - 59 * past[-2] + 37 * past[-3] - 9 * past[-4]) / 24
        return self._move(sample, timestep, before, output)

    def _move(self, sample: Floats, timestep: int, before: int, output: Floats) -> Floats:
        """Eq. 9: from `timestep` to the earlier `before`."""
        alpha = float(self._alphas[timestep])
        alpha_after = float(self._alphas[before]) if before >= 0 else self._last_alpha
        if self._prediction_type == "v_prediction":
            output = math.sqrt(alpha) * output + math.sqrt(1 - alpha) * sample
        scale = math.sqrt(alpha_after / alpha)
        divisor = alpha * math.sqrt(1 - alpha_after) + math.sqrt(alpha * (1 - alpha) * alpha_after)
        return scale * sample - (alpha_after - alpha) * output / divisor


def _runge_kutta_timesteps(spaced: NDArray[np.int64], half: int) -> NDArray[np.int64]:
    """(12,), for the first three steps: t, two halfway, the next t."""
    doubled = spaced[:STAGES][::-1].repeat(2) + np.tile(np.array([0, half]), STAGES)
    return np.asarray(doubled[:-1].repeat(2)[1:-1][::-1])
