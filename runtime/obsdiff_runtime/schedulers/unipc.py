"""UniPC, a predictor and a corrector of order 1 to 3; diffusers' UniPCMultistepScheduler."""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.errors import CompatibilityError
from obsdiff_runtime.noise import Noise
from obsdiff_runtime.schedulers.flow_match_euler import DEFAULTS as FLOW
from obsdiff_runtime.schedulers.flow_match_euler import dynamic_shift, shifted, stretched
from obsdiff_runtime.schedulers.multistep import Multistep, multistep_timesteps
from obsdiff_runtime.schedulers.schedule import Floats, choose, options, refuse, respaced
from obsdiff_runtime.schedulers.sigma_space import final_sigma, sigmas_at, timesteps_at, train_sigmas

DEFAULTS: Final[dict[str, Any]] = {
    "num_train_timesteps": 1000,
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "lower_order_final": True,
    "disable_corrector": (),
    "use_karras_sigmas": False,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "timestep_spacing": "linspace",
    "final_sigmas_type": "zero",
    "rescale_betas_zero_snr": False,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
}
NEARLY_ONE: Final = 1e-6  # how far below 1 the first sigma of a flow is, so that there is a signal


class UniPc(Multistep):
    """Zhao et al. 2023 (arXiv 2302.04867), the multistep version.

    The predictor goes from the last output to the next level; once that level's output is there, the corrector goes the
    same way again with it. One call of the denoiser serves both.
    """

    def __init__(self, config: Mapping[str, Any], steps: int, image_tokens: int, noise: Noise) -> None:
        refuse(config, "thresholding", "solver_p")
        given = options(config, DEFAULTS)
        choose(config, "solver_type", given["solver_type"], "bh1", "bh2")
        choose(config, "solver_order", given["solver_order"], 1, 2, 3)
        schedule = _flow if given["use_flow_sigmas"] else _diffusion
        timesteps, sigmas, lowest = schedule(config, given, steps, image_tokens)
        last = final_sigma(config, given["final_sigmas_type"], lowest)
        super().__init__(config, timesteps, sigmas, last)
        self._of_clean, self._first_kind = bool(given["predict_x0"]), given["solver_type"] == "bh1"
        self._solver_order, self._lower_order_final = given["solver_order"], bool(given["lower_order_final"])
        self._uncorrected = frozenset(given["disable_corrector"])
        self._outputs: list[Floats] = []
        self._held: tuple[Floats, int] | None = None  # sample and order of the last step
        self._check(config, last)

    def _check(self, config: Mapping[str, Any], last: float) -> None:
        name = config.get("_class_name")
        if self._prediction_type == "flow_prediction" and not self._of_clean:
            raise CompatibilityError(f"{name}: flow_prediction needs predict_x0")
        if last == 0 and not (self._of_clean and (self._lower_order_final or self._solver_order == 1)):
            raise CompatibilityError(
                f"{name}: only predict_x0 with lower_order_final can end without noise; set final_sigmas_type=sigma_min"
            )

    def step(self, output: Floats, index: int, sample: Floats) -> Floats:
        told = (self._clean if self._of_clean else self._epsilon)(output, sample, index)
        if self._held is not None and index - 1 not in self._uncorrected:
            start, order = self._held
            sample = self._move(start, index - 1, order, told)
        self._outputs = [told, *self._outputs[: self._solver_order - 1]]
        left = len(self.timesteps) - index
        order = min(self._solver_order, len(self._outputs), left if self._lower_order_final else self._solver_order)
        self._held = sample, order
        return self._move(sample, index, order, None)

    def _move(self, sample: Floats, index: int, order: int, ahead: Floats | None) -> Floats:
        """From level `index` to the next one.

        Args:
            sample: at `index`.
            index: of the level that the newest of the outputs belongs to.
            order: how many outputs are used, `ahead` not counted.
            ahead: the output at the next level, for the corrector.
        """
        after = index + 1
        width = self._ratios[after] - self._ratios[index]
        if width == 0:
            return sample
        value = self._outputs[0]
        nodes = [(self._ratios[index - back] - self._ratios[index]) / width for back in range(1, order)]
        slopes = [(self._outputs[back] - value) / node for back, node in enumerate(nodes, start=1)]
        if ahead is not None:
            nodes, slopes = [*nodes, 1.0], [*slopes, ahead - value]
        if self._of_clean:
            gain, decay, kept = self._signals[after], -width, self._noises[after] / self._noises[index]
        else:
            gain, decay, kept = self._noises[after], width, self._signals[after] / self._signals[index]
        moved = kept * sample - gain * math.expm1(decay) * value
        scale = gain * (decay if self._first_kind else math.expm1(decay))
        for weight, slope in zip(self._weights(nodes, decay), slopes, strict=True):
            moved = moved - (scale * weight) * slope
        return moved

    def _weights(self, nodes: list[float], decay: float) -> list[float]:
        """Theorem 3.1: R a = phi / B at these nodes; with one node any weight is of its order, and 1/2 is taken."""
        if len(nodes) < 2:
            return [0.5] * len(nodes)
        phi, factorial = math.expm1(decay) / decay - 1, 1
        wanted = []
        for power in range(len(nodes)):
            wanted.append(phi * factorial)
            factorial *= power + 2
            phi = phi / decay - 1 / factorial
        b = decay if self._first_kind else math.expm1(decay)
        weights: list[float] = np.linalg.solve(np.vander(nodes, increasing=True).T, np.array(wanted) / b).tolist()
        return weights


def _flow(
    config: Mapping[str, Any], given: Mapping[str, Any], steps: int, image_tokens: int
) -> tuple[Floats, Floats, float]:
    """Timesteps and sigmas, (steps,) each, of a rectified flow, and the lowest sigma."""
    refuse(config, "use_exponential_sigmas", "use_beta_sigmas")
    train = given["num_train_timesteps"]
    spaced = None
    if given["use_karras_sigmas"]:
        spaced = respaced(config, train_sigmas(config, rescale=given["rescale_betas_zero_snr"])[::-1], steps)
    if spaced is not None:
        sigmas: Floats = spaced / (spaced + 1)
    else:
        dynamic = given["use_dynamic_shifting"]
        shift = dynamic_shift(options(config, FLOW), image_tokens) if dynamic else given["flow_shift"]
        sigmas = shifted(np.linspace(1, 1 / train, steps + 1)[:-1], shift)
        if given["shift_terminal"]:
            sigmas = stretched(sigmas, given["shift_terminal"])
        sigmas[0] = min(sigmas[0], 1 - NEARLY_ONE)
    return sigmas * train, sigmas, float(sigmas[-1])


def _diffusion(
    config: Mapping[str, Any], given: Mapping[str, Any], steps: int, image_tokens: int
) -> tuple[NDArray[Any], Floats, float]:
    """Timesteps and sigmas, (steps,) each, of betas, and the lowest sigma."""
    trained = train_sigmas(config, rescale=given["rescale_betas_zero_snr"])
    timesteps = multistep_timesteps(config, steps, given["timestep_spacing"], len(trained))
    spaced = respaced(config, trained[::-1], steps)
    if spaced is None:
        return timesteps, sigmas_at(timesteps, trained), float(trained[0])
    told = timesteps_at(spaced, trained)
    return (told.round() if given["use_karras_sigmas"] else told), spaced, float(spaced[-1])
