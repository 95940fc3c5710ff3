"""Euler steps along a flow-matching velocity (SD3, Flux); diffusers' FlowMatchEulerDiscreteScheduler."""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.noise import Noise
from obsdiff_runtime.schedulers.schedule import Floats, choose, options, respaced

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
    "use_beta_sigmas": False,
    "time_shift_type": "exponential",
    "stochastic_sampling": False,
}


_CHANGING: Final = (
    "shift",
    "use_dynamic_shifting",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)


class FlowMatchEuler:
    """x <- x + (sigma_next - sigma) v. The model is told sigma times the number of training timesteps.

    With stochastic_sampling the clean sample x - sigma v gets new noise at each step. With even_sigmas the levels that
    are shifted are given, even steps from 1 to 1 / steps, as Flux's pipeline does; else they are even timesteps. With
    mu the pipeline says how far a dynamic shift goes. With levels it gives all of them, as those of LTX-Video 0.9.5 and
    later do, and diffusers' options that would change them, but not what the model is told, are refused.
    """

    order = 1
    initial_sigma = 1.0

    def __init__(
        self,
        config: Mapping[str, Any],
        steps: int,
        image_tokens: int,
        noise: Noise,
        *,
        even_sigmas: bool = False,
        levels: Floats | None = None,
        mu: float | None = None,
    ) -> None:
        given = options(config, DEFAULTS)
        choose(config, "time_shift_type", given["time_shift_type"], "exponential", "linear")
        if levels is None:
            even = np.linspace(1, 1 / steps, steps).astype(np.float32) if even_sigmas else None
            sigmas = flow_sigmas(given, steps, image_tokens, even, mu)
        else:
            for name in _CHANGING:
                choose(config, name, given[name], DEFAULTS[name])
            sigmas = levels.astype(np.float32)
        if given["invert_sigmas"]:
            sigmas = np.float32(1) - sigmas
        self._noise = noise if given["stochastic_sampling"] else None
        self.timesteps: Floats = sigmas * np.float32(given["num_train_timesteps"])
        self._sigmas: list[float] = [*sigmas.tolist(), 1.0 if given["invert_sigmas"] else 0.0]

    def scale(self, sample: Floats, index: int) -> Floats:
        return sample

    def noised(self, clean: Floats, noise: Floats, index: int) -> Floats:
        return flow_noised(clean, noise, self._sigmas[index])

    def step(self, output: Floats, index: int, sample: Floats) -> Floats:
        sigma, after = self._sigmas[index], self._sigmas[index + 1]
        if self._noise is None:
            return sample + (after - sigma) * output
        return flow_noised(sample - sigma * output, self._noise(sample.shape), after)


def flow_noised(clean: Floats, noise: Floats, sigma: float) -> Floats:
    """The straight line between both of Liu et al. 2022 (arXiv 2209.03003)."""
    return (1 - sigma) * clean + sigma * noise


def flow_sigmas(
    given: Mapping[str, Any], steps: int, image_tokens: int, levels: Floats | None = None, mu: float | None = None
) -> NDArray[np.float32]:
    """(steps,), from high to low; `given` has every option of DEFAULTS, `levels` (steps,) are not shifted yet."""
    sigmas = shifted(
        _levels(given, steps) if levels is None else levels,
        dynamic_shift(given, image_tokens, mu) if given["use_dynamic_shifting"] else given["shift"],
    )
    if given["shift_terminal"]:
        sigmas = stretched(sigmas, given["shift_terminal"])
    spaced = respaced(given, sigmas, steps)
    return (sigmas if spaced is None else spaced).astype(np.float32)


def _levels(given: Mapping[str, Any], steps: int) -> Floats:
    """(steps,), even steps over the timesteps of the training."""
    train = given["num_train_timesteps"]
    ends = np.array([1, 1 / train])
    if not given["use_dynamic_shifting"]:
        ends = shifted(ends, given["shift"]).astype(np.float32)  # diffusers shifts the ends, then everything again
    return np.asarray(np.linspace(float(ends[0]) * train, float(ends[1]) * train, steps) / train)


def shifted(sigmas: Floats, shift: float) -> Floats:
    """Esser et al. 2024 (arXiv 2403.03206), eq. 23."""
    return np.asarray(shift * sigmas / (1 + (shift - 1) * sigmas))


def dynamic_shift(given: Mapping[str, Any], image_tokens: int, mu: float | None = None) -> float:
    """Grows with the image's tokens: e^mu, mu linear in them unless it is given; or mu itself."""
    if mu is None:
        slope = (given["max_shift"] - given["base_shift"]) / (given["max_image_seq_len"] - given["base_image_seq_len"])
        mu = image_tokens * slope + given["base_shift"] - slope * given["base_image_seq_len"]
    return math.exp(mu) if given["time_shift_type"] == "exponential" else float(mu)


def stretched(sigmas: Floats, last: float) -> Floats:
    """So that they end at `last`; the clean share of each grows in proportion."""
    rest = 1 - sigmas
    if rest[-1] == 0:
        raise ConfigError("num_inference_steps 1: this model's schedule (shift_terminal) needs 2 or more")
    return np.asarray(1 - rest / (rest[-1] / (1 - last)))
