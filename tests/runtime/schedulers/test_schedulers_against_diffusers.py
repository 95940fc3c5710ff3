"""Every sampler against diffusers' own, one step after the other, over the options that change its arithmetic."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from obsdiff_runtime.errors import CompatibilityError, ConfigError
from obsdiff_runtime.schedulers import make_scheduler

# diffusers' Euler hands torch tensors to numpy functions
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

SD15: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = "FlowMatchEulerDiscreteScheduler"
EULER = "EulerDiscreteScheduler"

CASES: list[tuple[str, dict[str, Any]]] = [
    (FLOW, {}),
    (FLOW, {"shift": 3.0}),
    (FLOW, {"shift": 3.0, "num_train_timesteps": 500}),
    (FLOW, {"use_dynamic_shifting": True}),
    (FLOW, {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.6, "max_shift": 1.3}),
    (FLOW, {"shift": 2.0, "shift_terminal": 0.1}),
    (FLOW, {"shift": 3.0, "use_karras_sigmas": True}),
    (FLOW, {"shift": 3.0, "use_exponential_sigmas": True}),
    (FLOW, {"shift": 3.0, "invert_sigmas": True}),
    *[
        (EULER, SD15 | {"timestep_spacing": spacing, "prediction_type": prediction, "steps_offset": offset})
        for spacing in ("linspace", "leading", "trailing")
        for prediction in ("epsilon", "v_prediction", "sample")
        for offset in (0, 1)
    ],
    (EULER, SD15 | {"use_karras_sigmas": True}),
    (EULER, SD15 | {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0}),
    (EULER, SD15 | {"use_exponential_sigmas": True, "timestep_spacing": "leading"}),
    (EULER, SD15 | {"interpolation_type": "log_linear"}),
    (EULER, SD15 | {"final_sigmas_type": "sigma_min"}),
    (EULER, SD15 | {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    (EULER, SD15 | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    (EULER, {"beta_schedule": "squaredcos_cap_v2"}),
    (EULER, {"beta_schedule": "linear"}),
    (EULER, {"trained_betas": [0.001 + 0.00002 * step for step in range(1000)]}),
    *[
        ("DDIMScheduler", SD15 | {"timestep_spacing": spacing, "prediction_type": prediction, "set_alpha_to_one": one})
        for spacing in ("linspace", "leading", "trailing")
        for prediction in ("epsilon", "v_prediction", "sample")
        for one in (False, True)
    ],
    ("DDIMScheduler", SD15 | {"clip_sample": False, "steps_offset": 1}),
    ("DDIMScheduler", SD15 | {"clip_sample_range": 0.5}),
    (
        "DDIMScheduler",
        SD15 | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ),
    *[
        ("PNDMScheduler", SD15 | {"skip_prk_steps": skip, "prediction_type": prediction, "set_alpha_to_one": one})
        for skip in (True, False)
        for prediction in ("epsilon", "v_prediction")
        for one in (False, True)
    ],
    *[
        ("PNDMScheduler", SD15 | {"skip_prk_steps": True, "timestep_spacing": spacing, "steps_offset": 1})
        for spacing in ("linspace", "leading", "trailing")
    ],
]


def name_of(case: tuple[str, dict[str, Any]]) -> str:
    options = {name: value for name, value in case[1].items() if name not in SD15 and name != "trained_betas"}
    return "-".join([case[0].removesuffix("Scheduler"), *[f"{name}={value}" for name, value in options.items()]])


def network(sample: np.ndarray, timestep: float) -> np.ndarray:
    """Something smooth in both arguments, of the sample's size."""
    return np.sin(sample + np.float32(timestep) / 300).astype(np.float32)


def mu_of(config: dict[str, Any], tokens: int) -> float:
    given = {"base_shift": 0.5, "max_shift": 1.15} | config
    return float(np.interp(tokens, [256, 4096], [given["base_shift"], given["max_shift"]]))


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_each_step_equals_diffusers(case: tuple[str, dict[str, Any]], steps: int) -> None:
    class_name, config = case
    prk = class_name == "PNDMScheduler" and not config.get("skip_prk_steps")
    if (prk and steps < 4) or (steps == 1 and ("shift_terminal" in config or class_name == "PNDMScheduler")):
        pytest.skip("diffusers itself needs more steps here")
    theirs = getattr(diffusers, class_name)(**config)
    if config.get("use_dynamic_shifting"):
        theirs.set_timesteps(steps, mu=mu_of(config, 1000))
    else:
        theirs.set_timesteps(steps)
    ours = make_scheduler(dict(theirs.config) | {"_class_name": class_name}, steps, 1000)

    np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy(), rtol=1e-5, atol=1e-4)
    if class_name != FLOW:
        assert ours.initial_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-5)

    sample = np.random.default_rng(0).standard_normal((2, 4, 8, 6), dtype=np.float32) * np.float32(ours.initial_sigma)
    for index, timestep in enumerate(theirs.timesteps):
        scaled = ours.scale(sample, index)
        if class_name != FLOW:
            expected = theirs.scale_model_input(torch.from_numpy(sample), timestep).numpy()
            np.testing.assert_allclose(scaled, expected, rtol=1e-5, atol=1e-5)
        output = network(scaled, float(timestep))
        expected = theirs.step(torch.from_numpy(output), timestep, torch.from_numpy(sample), return_dict=False)[0]
        sample = ours.step(output, index, sample)
        assert sample.dtype == np.float32
        # relative to the sample's own size: sigmas of SD go up to 14.6
        np.testing.assert_allclose(sample, expected.numpy(), rtol=1e-5, atol=1e-5 * max(1, np.abs(sample).max()))


def test_an_unknown_scheduler_lists_the_known() -> None:
    with pytest.raises(CompatibilityError, match=r"UniPCMultistepScheduler is not supported.*EulerDiscreteScheduler"):
        make_scheduler({"_class_name": "UniPCMultistepScheduler"}, 10, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": FLOW, "stochastic_sampling": True}, "stochastic_sampling=True"),
        ({"_class_name": EULER, "use_beta_sigmas": True}, "use_beta_sigmas=True"),
        ({"_class_name": EULER, "prediction_type": "flow"}, "prediction_type='flow'"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding=True"),
        ({"_class_name": "PNDMScheduler", "beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "odd"}, "timestep_spacing='odd'"),
    ],
)
def test_an_option_that_is_not_supported_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CompatibilityError, match=message):
        make_scheduler(config, 10, 1)


def test_more_steps_than_training_timesteps_is_an_error() -> None:
    with pytest.raises(ConfigError, match="1001 steps are more than the 1000"):
        make_scheduler({"_class_name": "DDIMScheduler"}, 1001, 1)
