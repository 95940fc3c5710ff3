"""What DPM-Solver and UniPC share: sample = signal clean + noise epsilon, walked in log(signal / noise)."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.errors import CompatibilityError, ConfigError
from obsdiff_runtime.schedulers.schedule import Floats, choose

PREDICTIONS: Final = ("epsilon", "v_prediction", "sample", "flow_prediction")


class Multistep:
    """A ladder of noise levels under a denoiser whose past outputs are of use: calls come in order, from any one on."""

    order = 1
    initial_sigma = 1.0

    def __init__(self, config: Mapping[str, Any], timesteps: NDArray[Any], sigmas: Floats, last: float) -> None:
        """Takes the schedule.

        Args:
            config: of the scheduler, for prediction_type and use_flow_sigmas.
            timesteps: (calls,).
            sigmas: (calls,); of a flow if use_flow_sigmas, noise over signal otherwise.
            last: what the last step ends at.

        Raises:
            CompatibilityError: an option, or a pair of them, that is not supported.
            ConfigError: two steps at one level of noise.
        """
        flow = bool(config.get("use_flow_sigmas"))
        self._prediction_type = str(config.get("prediction_type", "epsilon"))
        choose(config, "prediction_type", self._prediction_type, *PREDICTIONS)
        if self._prediction_type == "flow_prediction" and not flow:
            raise CompatibilityError(f"{config.get('_class_name')}: flow_prediction needs use_flow_sigmas")
        self.timesteps: NDArray[np.int64] = timesteps.astype(np.int64)
        if len(sigmas) > 1 and np.diff(sigmas).max() >= 0:
            raise ConfigError(f"{len(sigmas)} steps put two of them at the same level of noise; take fewer")
        ladder = np.append(sigmas, last).astype(np.float32).astype(np.float64)
        signals = 1 - ladder if flow else 1 / np.sqrt(ladder**2 + 1)
        noises = ladder if flow else ladder * signals
        with np.errstate(divide="ignore"):  # without noise the ratio is infinite, and the formulas hold
            self._ratios: list[float] = (np.log(signals) - np.log(noises)).tolist()
        self._signals: list[float] = signals.tolist()
        self._noises: list[float] = noises.tolist()

    def scale(self, sample: Floats, index: int) -> Floats:
        return sample

    def noised(self, clean: Floats, noise: Floats, index: int) -> Floats:
        return self._signals[index] * clean + self._noises[index] * noise

    def _clean(self, output: Floats, sample: Floats, index: int) -> Floats:
        signal, noise = self._signals[index], self._noises[index]
        if self._prediction_type == "epsilon":
            return (sample - noise * output) / signal
        if self._prediction_type == "v_prediction":
            return signal * sample - noise * output
        if self._prediction_type == "flow_prediction":
            return sample - noise * output
        return output

    def _epsilon(self, output: Floats, sample: Floats, index: int) -> Floats:
        signal, noise = self._signals[index], self._noises[index]
        if self._prediction_type == "epsilon":
            return output
        if self._prediction_type == "v_prediction":
            return signal * output + noise * sample
        return (sample - signal * output) / noise


def multistep_timesteps(config: Mapping[str, Any], steps: int, spacing: str, count: int) -> NDArray[np.int64]:
    """(steps,), descending from count - 1; as spaced_timesteps, but the last step down to 0 is one of the intervals."""
    choose(config, "timestep_spacing", spacing, "linspace", "leading", "trailing")
    train = int(config.get("num_train_timesteps", 1000))
    if steps > train:
        raise ConfigError(f"{steps} steps are more than the {train} that the scheduler was trained with")
    if spacing == "linspace":
        spaced: Floats = np.linspace(0, count - 1, steps + 1).round()[:0:-1]
    elif spacing == "leading":
        spaced = np.arange(steps, 0.0, -1) * (count // (steps + 1)) + int(config.get("steps_offset", 0))
    else:
        spaced = np.arange(count, 0, -train / steps).round() - 1
    return spaced.astype(np.int64)
