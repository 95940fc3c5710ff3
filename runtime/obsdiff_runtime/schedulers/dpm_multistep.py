"""DPM-Solver++ and its stochastic variant, of order 1 to 3; diffusers' DPMSolverMultistepScheduler."""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.noise import Noise
from obsdiff_runtime.schedulers.flow_match_euler import DEFAULTS as FLOW
from obsdiff_runtime.schedulers.flow_match_euler import dynamic_shift, shifted
from obsdiff_runtime.schedulers.multistep import Multistep, multistep_timesteps
from obsdiff_runtime.schedulers.schedule import Floats, choose, options, refuse, respaced
from obsdiff_runtime.schedulers.sigma_space import final_sigma, sigmas_at, timesteps_at, train_sigmas

DEFAULTS: Final[dict[str, Any]] = {
    "num_train_timesteps": 1000,
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "use_karras_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
    "timestep_spacing": "linspace",
    "rescale_betas_zero_snr": False,
    "use_dynamic_shifting": False,
    "beta_schedule": "linear",
}
FEW: Final = 15  # steps, below which the last ones are taken at lower order


class DpmMultistep(Multistep):
    """Lu et al. 2022 (arXiv 2211.01095), the multistep solver and its SDE."""

    def __init__(self, config: Mapping[str, Any], steps: int, image_tokens: int, noise: Noise) -> None:
        refuse(config, "thresholding", "variance_type")
        given = options(config, DEFAULTS)
        choose(config, "solver_order", given["solver_order"], 1, 2, 3)
        choose(config, "algorithm_type", given["algorithm_type"], "dpmsolver++", "sde-dpmsolver++")
        choose(config, "solver_type", given["solver_type"], "midpoint", "heun")
        trained = train_sigmas(config, rescale=given["rescale_betas_zero_snr"])
        schedule = _flow if given["use_flow_sigmas"] else _diffusion
        timesteps, sigmas = schedule(config, given, trained, steps, image_tokens)
        last = final_sigma(config, given["final_sigmas_type"], float(trained[0]))
        super().__init__(config, timesteps, sigmas, last)
        self._noise = noise if given["algorithm_type"] == "sde-dpmsolver++" else None
        self._solver_order, self._heun = given["solver_order"], given["solver_type"] == "heun"
        few = given["lower_order_final"] and len(timesteps) < FEW
        self._last_two_lower = few
        self._last_is_first_order = few or given["euler_at_final"] or last == 0
        self._cleans: list[Floats] = []

    def step(self, output: Floats, index: int, sample: Floats) -> Floats:
        self._cleans = [self._clean(output, sample, index), *self._cleans[:2]]
        width = self._ratios[index + 1] - self._ratios[index]
        if width == 0:
            return sample
        signal, noise = self._signals[index + 1], self._noises[index + 1]
        # the SDE decays twice as fast: the formulas are those of the ODE over twice the width
        decay = width if self._noise is None else 2 * width
        moved = noise / self._noises[index] * (math.exp(-width) if self._noise else 1) * sample
        moved = moved + signal * self._weighted(index, width, decay)
        if self._noise is None:
            return moved
        return moved + noise * math.sqrt(-math.expm1(-decay)) * self._noise(sample.shape)

    def _weighted(self, index: int, width: float, decay: float) -> Floats:
        """The clean samples' part of a step: value, slope and curvature at its start, each with its weight."""
        share = -math.expm1(-decay)
        order = self._order(index)
        value = self._cleans[0]
        if order == 1:
            return share * value
        before = (self._ratios[index] - self._ratios[index - 1]) / width
        slope = (value - self._cleans[1]) / before
        if order == 2:
            return share * value + (1 - share / decay if self._heun else share / 2) * slope
        earlier = (self._ratios[index - 1] - self._ratios[index - 2]) / width
        curvature = (slope - (self._cleans[1] - self._cleans[2]) / earlier) / (before + earlier)
        slope = slope + before * curvature
        # diffusers' SDE subtracts the half, although the weight then does not vanish with the width
        half = 0.5 if self._noise is None else -0.5
        return share * value + (1 - share / decay) * slope + ((share - decay) / decay**2 + half) * curvature

    def _order(self, index: int) -> int:
        left = len(self.timesteps) - index
        if left == 1 and self._last_is_first_order:
            return 1
        most = 2 if left == 2 and self._last_two_lower else 3
        return int(min(self._solver_order, len(self._cleans), most))


def _flow(
    config: Mapping[str, Any], given: Mapping[str, Any], trained: Floats, steps: int, image_tokens: int
) -> tuple[Floats, Floats]:
    """Timesteps and sigmas, (steps,) each, of a rectified flow."""
    refuse(config, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
    train, shift = given["num_train_timesteps"], given["flow_shift"]
    if given["use_dynamic_shifting"]:
        choose(config, "time_shift_type", config.get("time_shift_type", "exponential"), "exponential")
        shift = dynamic_shift(options(config, FLOW), image_tokens)
    sigmas = shifted(1 - np.linspace(1, 1 / train, steps + 1), shift)[:0:-1]
    return sigmas * train, sigmas


def _diffusion(
    config: Mapping[str, Any], given: Mapping[str, Any], trained: Floats, steps: int, image_tokens: int
) -> tuple[NDArray[Any], Floats]:
    """Timesteps and sigmas, (steps,) each, of betas."""
    clipped = int(np.searchsorted(-np.log(trained[::-1]), given["lambda_min_clipped"]))
    timesteps = multistep_timesteps(config, steps, given["timestep_spacing"], len(trained) - clipped)
    spaced = respaced(config, trained[::-1], steps)
    rounded = given["use_karras_sigmas"] or given["use_lu_lambdas"]
    if given["use_lu_lambdas"] and not given["use_karras_sigmas"]:
        ends = np.log(trained[[-1, 0]])
        spaced = np.exp(np.linspace(float(ends[0]), float(ends[1]), steps))
    if spaced is None:
        return timesteps, sigmas_at(timesteps, trained)
    told = timesteps_at(spaced, trained)
    return (told.round() if rounded and given["beta_schedule"] != "squaredcos_cap_v2" else told), spaced
