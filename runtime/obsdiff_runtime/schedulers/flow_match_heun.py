"""Heun's method along a flow-matching velocity; diffusers' FlowMatchHeunDiscreteScheduler."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from obsdiff_runtime.noise import Noise
from obsdiff_runtime.schedulers.flow_match_euler import DEFAULTS as EULER
from obsdiff_runtime.schedulers.flow_match_euler import flow_noised, flow_sigmas
from obsdiff_runtime.schedulers.heun import HeunPair, doubled, heun_width
from obsdiff_runtime.schedulers.schedule import Floats, options

DEFAULTS: Final[dict[str, Any]] = {"num_train_timesteps": 1000, "shift": 1.0}


class FlowMatchHeun:
    """As FlowMatchEuler, with two calls a step."""

    order = 2
    initial_sigma = 1.0

    def __init__(self, config: Mapping[str, Any], steps: int, image_tokens: int, noise: Noise) -> None:
        given = EULER | options(config, DEFAULTS)
        sigmas = doubled(flow_sigmas(given, steps, image_tokens))
        self._pair = HeunPair()
        self.timesteps: Floats = sigmas * np.float32(given["num_train_timesteps"])
        self._sigmas: list[float] = [*sigmas.tolist(), 0.0]

    def scale(self, sample: Floats, index: int) -> Floats:
        return sample

    def noised(self, clean: Floats, noise: Floats, index: int) -> Floats:
        return flow_noised(clean, noise, self._sigmas[index])

    def step(self, output: Floats, index: int, sample: Floats) -> Floats:
        return self._pair.move(sample, output, heun_width(self._sigmas, index))
