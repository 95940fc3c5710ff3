"""Few-step sampling of consistency models; diffusers' SCMScheduler.

Latents are of unit variance here. In diffusers all of them, the noise and what is predicted are times sigma_data, by
which its pipeline multiplies before the first step and divides behind the last.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.noise import Noise
from obsdiff_runtime.schedulers.schedule import Floats, choose

LARGEST: Final = 1.57080  # where noise begins: what diffusers' pipelines tell the scheduler by default
BETWEEN: Final = 1.3  # likewise, behind the first of two steps


class Scm:
    """Lu & Song 2024 (arXiv 2410.11081): at each step a clean sample, to which less noise is added again.

    A sample at an angle t is cos(t) of the clean one and sin(t) of noise, and the denoiser gives its velocity over t
    (TrigFlow).
    """

    order = 1
    initial_sigma = 1.0

    def __init__(self, config: Mapping[str, Any], steps: int, image_tokens: int, noise: Noise) -> None:
        choose(config, "prediction_type", config.get("prediction_type", "trigflow"), "trigflow")
        most = int(config.get("num_train_timesteps", 1000))
        if steps > most:
            raise ConfigError(f"{steps} steps are more than the {most} that the scheduler was trained with")
        even = np.linspace(LARGEST, 0, steps + 1)
        self._angles = (np.array([LARGEST, BETWEEN, 0]) if steps == 2 else even).astype(np.float32)
        self.timesteps = self._angles[:-1]
        self._noise = noise

    def scale(self, sample: Floats, index: int) -> Floats:
        return sample

    def noised(self, clean: Floats, noise: Floats, index: int) -> Floats:
        return _at(float(self._angles[index]), clean, noise)

    def step(self, output: Floats, index: int, sample: Floats) -> Floats:
        angle, after = float(self._angles[index]), float(self._angles[index + 1])
        clean = math.cos(angle) * sample - math.sin(angle) * output
        return clean if after == 0 else _at(after, clean, self._noise(sample.shape))


def _at(angle: float, clean: Floats, noise: Floats) -> Floats:
    return math.cos(angle) * clean + math.sin(angle) * noise
