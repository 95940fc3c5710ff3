"""Euler steps along a flow-matching velocity (SD3, Flux); diffusers' FlowMatchEulerDiscreteScheduler."""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from obsdiff_runtime.errors import CompatibilityError
from obsdiff_runtime.schedulers.schedule import Floats, choose, exponential, karras, options, refuse

DEFAULTS: Final[dict[str, Any]] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "time_shift_type": "exponential",
}


class FlowMatchEuler:
    """x <- x + (sigma_next - sigma) v. The model is told sigma times the number of training timesteps."""

    initial_sigma = 1.0

    def __init__(self, config: Mapping[str, Any], steps: int, image_tokens: int) -> None:
        refuse(config, "stochastic_sampling", "use_beta_sigmas")
        given = options(config, DEFAULTS)
        choose(config, "time_shift_type", given["time_shift_type"], "exponential", "linear")
        sigmas = _sigmas(given, steps, image_tokens).astype(np.float32)
        if given["invert_sigmas"]:
            sigmas = np.float32(1) - sigmas
        self.timesteps: Floats = sigmas * np.float32(given["num_train_timesteps"])
        self._sigmas: Floats = np.append(sigmas, np.float32(1 if given["invert_sigmas"] else 0))

    def scale(self, sample: Floats, index: int) -> Floats:
        return sample

    def step(self, output: Floats, index: int, sample: Floats) -> Floats:
        return sample + float(self._sigmas[index + 1] - self._sigmas[index]) * output


def _sigmas(given: dict[str, Any], steps: int, image_tokens: int) -> Floats:
    train, shift = given["num_train_timesteps"], given["shift"]
    ends = np.array([1, 1 / train])
    if not given["use_dynamic_shifting"]:
        ends = _shifted(ends, shift).astype(np.float32)  # diffusers shifts the ends, then everything again
    sigmas = np.linspace(float(ends[0]) * train, float(ends[1]) * train, steps) / train
    if given["use_dynamic_shifting"]:
        mu = _mu(given, image_tokens)
        exponent = math.exp(mu) if given["time_shift_type"] == "exponential" else mu
        sigmas = exponent / (exponent + (1 / sigmas - 1))
    else:
        sigmas = _shifted(sigmas, shift)
    if given["shift_terminal"]:
        rest = 1 - sigmas
        if rest[-1] == 0:
            raise CompatibilityError("FlowMatchEulerDiscreteScheduler: shift_terminal needs more than one step")
        sigmas = 1 - rest / (rest[-1] / (1 - given["shift_terminal"]))
    if given["use_karras_sigmas"]:
        return karras(sigmas, steps)
    if given["use_exponential_sigmas"]:
        return exponential(sigmas, steps)
    return np.asarray(sigmas)


def _shifted(sigmas: Floats, shift: float) -> Floats:
    """Esser et al. 2024 (arXiv 2403.03206), eq. 23."""
    return np.asarray(shift * sigmas / (1 + (shift - 1) * sigmas))


def _mu(given: dict[str, Any], image_tokens: int) -> float:
    """The shift grows linearly with the image's tokens."""
    slope = (given["max_shift"] - given["base_shift"]) / (given["max_image_seq_len"] - given["base_image_seq_len"])
    return float(image_tokens * slope + given["base_shift"] - slope * given["base_image_seq_len"])
