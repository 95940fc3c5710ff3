"""Every sampler against diffusers' own, one step after the other, over the options that change its arithmetic."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule

from obsdiff_runtime.errors import CompatibilityError, ConfigError
from obsdiff_runtime.kinds.flux2 import FLUX2_KLEIN
from obsdiff_runtime.kinds.ltx import linear_quadratic
from obsdiff_runtime.noise import Noise, noise_sources
from obsdiff_runtime.schedulers import SCHEDULERS, Scheduler, make_scheduler

# diffusers' Euler hands torch tensors to numpy functions
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

SD15: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = "FlowMatchEulerDiscreteScheduler"
FLOW_HEUN = "FlowMatchHeunDiscreteScheduler"
EULER = "EulerDiscreteScheduler"
ANCESTRAL = "EulerAncestralDiscreteScheduler"
HEUN = "HeunDiscreteScheduler"
DPM = "DPMSolverMultistepScheduler"
UNIPC = "UniPCMultistepScheduler"
SCM = "SCMScheduler"
LCM = "LCMScheduler"
TCD = "TCDScheduler"
TOKENS = 1000  # of the image

SPACINGS = ("linspace", "leading", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
ZERO_SNR: dict[str, Any] = SD15 | {
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
}
OF_FLOWS: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SDE: dict[str, Any] = {"algorithm_type": "sde-dpmsolver++"}
COSINE: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2"}

Case = tuple[str, dict[str, Any]]


def stacked(sources: Sequence[Noise]) -> Noise:
    """One source for a batch whose images take every step together."""
    return lambda shape: np.stack([source(shape[1:]) for source in sources])


CASES: list[Case] = [
    (FLOW, {}),
    (FLOW, {"shift": 3.0}),
    (FLOW, {"shift": 3.0, "num_train_timesteps": 500}),
    (FLOW, {"use_dynamic_shifting": True}),
    (FLOW, {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.6, "max_shift": 1.3}),
    (FLOW, {"shift": 2.0, "shift_terminal": 0.1}),
    (FLOW, {"shift": 3.0, "use_karras_sigmas": True}),
    (FLOW, {"shift": 3.0, "use_exponential_sigmas": True}),
    (FLOW, {"shift": 3.0, "use_beta_sigmas": True}),
    (FLOW, {"use_dynamic_shifting": True, "use_beta_sigmas": True}),
    (FLOW, {"shift": 3.0, "invert_sigmas": True}),
    (FLOW, {"shift": 3.0, "stochastic_sampling": True}),
    (FLOW, {"invert_sigmas": True, "stochastic_sampling": True}),
    (FLOW_HEUN, {}),
    (FLOW_HEUN, {"shift": 3.0, "num_train_timesteps": 500}),
    *[
        (EULER, SD15 | {"timestep_spacing": spacing, "prediction_type": prediction, "steps_offset": offset})
        for spacing in SPACINGS
        for prediction in PREDICTIONS
        for offset in (0, 1)
    ],
    (EULER, SD15 | {"use_karras_sigmas": True}),
    (EULER, SD15 | {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0}),
    (EULER, SD15 | {"use_exponential_sigmas": True, "timestep_spacing": "leading"}),
    (EULER, SD15 | {"use_beta_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0}),
    (EULER, SD15 | {"interpolation_type": "log_linear"}),
    (EULER, SD15 | {"final_sigmas_type": "sigma_min"}),
    (EULER, SD15 | {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    (EULER, ZERO_SNR),
    (EULER, COSINE),
    (EULER, {"beta_schedule": "linear"}),
    (EULER, {"trained_betas": [0.001 + 0.00002 * step for step in range(1000)]}),
    *[
        ("DDIMScheduler", SD15 | {"timestep_spacing": spacing, "prediction_type": prediction, "set_alpha_to_one": one})
        for spacing in SPACINGS
        for prediction in PREDICTIONS
        for one in (False, True)
    ],
    ("DDIMScheduler", SD15 | {"clip_sample": False, "steps_offset": 1}),
    ("DDIMScheduler", SD15 | {"clip_sample_range": 0.5}),
    ("DDIMScheduler", ZERO_SNR),
    *[
        ("DDPMScheduler", SD15 | {"timestep_spacing": spacing, "prediction_type": prediction})
        for spacing, prediction in product(SPACINGS, PREDICTIONS)
    ],
    *[("DDPMScheduler", SD15 | {"variance_type": variance}) for variance in ("fixed_small_log", "fixed_large")],
    ("DDPMScheduler", SD15 | {"clip_sample": False, "steps_offset": 1, "beta_end": 0.03}),
    ("DDPMScheduler", SD15 | {"clip_sample_range": 0.5}),
    ("DDPMScheduler", ZERO_SNR),
    *[
        ("PNDMScheduler", SD15 | {"skip_prk_steps": skip, "prediction_type": prediction, "set_alpha_to_one": one})
        for skip in (True, False)
        for prediction in ("epsilon", "v_prediction")
        for one in (False, True)
    ],
    *[
        ("PNDMScheduler", SD15 | {"skip_prk_steps": True, "timestep_spacing": spacing, "steps_offset": 1})
        for spacing in SPACINGS
    ],
    *[
        (ANCESTRAL, SD15 | {"timestep_spacing": spacing, "prediction_type": prediction, "steps_offset": 1})
        for spacing, prediction in product(SPACINGS, PREDICTIONS[:2])
    ],
    (ANCESTRAL, ZERO_SNR),
    *[
        (HEUN, SD15 | {"timestep_spacing": spacing, "prediction_type": prediction, "steps_offset": 1})
        for spacing, prediction in product(SPACINGS, PREDICTIONS)
    ],
    (HEUN, {}),
    (HEUN, SD15 | {"use_karras_sigmas": True}),
    (HEUN, SD15 | {"use_exponential_sigmas": True}),
    (HEUN, SD15 | {"use_beta_sigmas": True}),
    (HEUN, SD15 | {"clip_sample": True, "clip_sample_range": 0.5}),
    *[
        (name, SD15 | {"timestep_spacing": spacing, "prediction_type": prediction, "steps_offset": 1})
        for name, spacing, prediction in product((DPM, UNIPC), SPACINGS, PREDICTIONS)
    ],
    *[(name, ZERO_SNR) for name in (DPM, UNIPC)],
    *[
        (DPM, SD15 | {"solver_order": order, "solver_type": kind, "final_sigmas_type": final} | algorithm)
        for order, kind, final, algorithm in product((1, 2, 3), ("midpoint", "heun"), ("zero", "sigma_min"), ({}, SDE))
    ],
    *[
        (DPM, SD15 | {"solver_order": 3, "lower_order_final": lower, "euler_at_final": euler} | algorithm)
        for lower, euler, algorithm in product((True, False), (True, False), ({}, SDE))
    ],
    *[
        (DPM, betas | {option: True})
        for option in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
        for betas in (SD15, COSINE)
    ],
    *[(DPM, COSINE | {"lambda_min_clipped": -5.1, "timestep_spacing": spacing}) for spacing in SPACINGS],
    *[
        (DPM, OF_FLOWS | {"flow_shift": 3.0, "solver_order": order} | algorithm)
        for order, algorithm in product((1, 2, 3), ({}, SDE))
    ],
    (DPM, OF_FLOWS | {"use_dynamic_shifting": True}),
    (DPM, OF_FLOWS | {"prediction_type": "epsilon"}),
    *[
        (
            UNIPC,
            SD15 | {"solver_order": order, "solver_type": kind, "predict_x0": clean, "final_sigmas_type": "sigma_min"},
        )
        for order, kind, clean in product((1, 2, 3), ("bh1", "bh2"), (True, False))
    ],
    *[
        (UNIPC, SD15 | {"predict_x0": False, "final_sigmas_type": "sigma_min", "prediction_type": prediction})
        for prediction in PREDICTIONS[1:]
    ],
    (UNIPC, SD15 | {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    (UNIPC, SD15 | {"solver_order": 1, "lower_order_final": False}),
    (UNIPC, SD15 | {"disable_corrector": [0, 1, 4]}),
    (UNIPC, SD15 | {"use_karras_sigmas": True}),
    (UNIPC, SD15 | {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0, "final_sigmas_type": "sigma_min"}),
    (UNIPC, SD15 | {"use_exponential_sigmas": True}),
    (UNIPC, SD15 | {"use_beta_sigmas": True}),
    *[(UNIPC, OF_FLOWS | {"flow_shift": 3.0, "solver_order": order}) for order in (1, 2, 3)],
    (UNIPC, OF_FLOWS | {"flow_shift": 5.0, "shift_terminal": 0.1}),
    (UNIPC, OF_FLOWS | {"use_dynamic_shifting": True}),
    (UNIPC, OF_FLOWS | {"use_karras_sigmas": True}),
    (UNIPC, OF_FLOWS | {"final_sigmas_type": "sigma_min"}),
    (SCM, {"sigma_data": 1.0}),
    *[(LCM, {"prediction_type": prediction}) for prediction in PREDICTIONS],
    (LCM, {"original_inference_steps": 100, "timestep_scaling": 0.1}),
    (LCM, {"clip_sample": True, "clip_sample_range": 0.5, "beta_schedule": "linear"}),
    (LCM, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    *[(TCD, {"prediction_type": prediction}) for prediction in PREDICTIONS],
    (TCD, {"original_inference_steps": 100, "num_train_timesteps": 500}),
]


def name_of(case: Case) -> str:
    options = {name: value for name, value in case[1].items() if name not in SD15 and name != "trained_betas"}
    return "-".join([case[0].removesuffix("Scheduler"), *[f"{name}={value}" for name, value in options.items()]])


def network(sample: np.ndarray, timestep: float) -> np.ndarray:
    """Something smooth in both arguments, of the sample's size."""
    return np.sin(sample + np.float32(timestep) / 300).astype(np.float32)


def normal(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def no_noise(shape: tuple[int, ...]) -> np.ndarray:
    raise AssertionError("a deterministic sampler asked for noise")


def is_stochastic(case: Case) -> bool:
    return (
        case[0] in (ANCESTRAL, SCM, LCM, "DDPMScheduler")
        or bool(case[1].get("stochastic_sampling"))
        or SDE.items() <= case[1].items()
    )


def both(case: Case, steps: int, noise: Noise, eta: float = 0.0) -> tuple[Any, Scheduler]:
    """diffusers' scheduler and ours."""
    class_name, config = case
    theirs = getattr(diffusers, class_name)(**config)
    if config.get("use_dynamic_shifting"):
        ends = {"base_shift": 0.5, "max_shift": 1.15} | config
        mu = float(np.interp(TOKENS, [256, 4096], [ends["base_shift"], ends["max_shift"]]))
        theirs.set_timesteps(steps, mu=mu)
    elif class_name == SCM:
        theirs.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    else:
        theirs.set_timesteps(steps)
    config = dict(theirs.config) | {"_class_name": class_name}
    return theirs, make_scheduler(config, steps, TOKENS, noise, eta=eta)


def needs_more_steps(case: Case, steps: int) -> bool:
    """Of diffusers itself."""
    prk = case[0] == "PNDMScheduler" and not case[1].get("skip_prk_steps")
    return (prk and steps < 4) or (steps == 1 and ("shift_terminal" in case[1] or case[0] == "PNDMScheduler"))


def assert_close(ours: np.ndarray, theirs: torch.Tensor, before: np.ndarray | None = None) -> None:
    """Relative to the sample's own size, sigmas of SD go up to 14.6, and to that of the sample `before` a step: with a
    terminal SNR of zero it is as large as 4096 sigmas, and processors round its last digit differently."""
    assert ours.dtype == np.float32
    largest = 0.0 if before is None else np.abs(before).max()
    lost = 2 * np.finfo(np.float32).eps * largest
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=max(1e-5 * max(1, np.abs(ours).max()), lost))


def assert_steps_agree(
    case: Case, theirs: Any, ours: Scheduler, sample: np.ndarray, start: int, eta: float = 0.0
) -> None:
    """From call `start` on; both are given the same sample at each."""
    noisy = is_stochastic(case) or eta > 0
    generator: dict[str, Any] = {"generator": torch.Generator().manual_seed(5)} if noisy else {}
    if case[0] == TCD or eta:
        generator["eta"] = eta  # which is not TCD's default, but that of pipelines
    for index, timestep in list(enumerate(theirs.timesteps[: len(ours.timesteps)]))[start:]:
        scaled = ours.scale(sample, index)
        if hasattr(theirs, "scale_model_input"):
            assert_close(scaled, theirs.scale_model_input(torch.from_numpy(sample), timestep))
        output = network(scaled, float(timestep))
        given = torch.from_numpy(output), timestep, torch.from_numpy(sample)
        before, sample = sample, ours.step(output, index, sample)
        assert_close(sample, theirs.step(*given, return_dict=False, **generator)[0], before)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize(
    "case",
    [
        (TCD, {}),
        (TCD, {"prediction_type": "v_prediction", "num_train_timesteps": 500}),
        ("DDIMScheduler", SD15 | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
        ("DDIMScheduler", {"clip_sample_range": 2.0, "prediction_type": "v_prediction"}),
    ],
    ids=name_of,
)
def test_each_step_that_adds_noise_equals_diffusers(case: Case, steps: int, eta: float) -> None:
    theirs, ours = both(case, steps, stacked(noise_sources("torch", 5, 2)), eta)
    sample = np.random.default_rng(3).standard_normal((2, 4, 6, 8), np.float32)
    assert_steps_agree(case, theirs, ours, sample, 0, eta)


def test_an_eta_that_makes_no_sense_is_refused() -> None:
    for name, eta, said in (
        (EULER, 0.5, "eta is for DDIMScheduler and TCDScheduler, and this pipeline draws by EulerDiscreteScheduler"),
        (TCD, 1.5, "eta should be from 0 to 1, not 1.5"),
        ("DDIMScheduler", -0.1, "eta should be from 0 to 1, not -0.1"),
        (LCM, 0.5, "eta is for DDIMScheduler and TCDScheduler"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_scheduler({"_class_name": name}, 4, TOKENS, no_noise, eta=eta)


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_each_step_equals_diffusers(case: Case, steps: int) -> None:
    if needs_more_steps(case, steps):
        pytest.skip("diffusers itself needs more steps here")
    theirs, ours = both(case, steps, stacked(noise_sources("torch", 5, 2)) if is_stochastic(case) else no_noise)
    told = theirs.timesteps.numpy()
    told = told[:-1] if case[0] == SCM else told  # behind them it says where it ends
    np.testing.assert_allclose(ours.timesteps, told, rtol=1e-5, atol=1e-4)
    assert ours.order == theirs.order
    if hasattr(theirs, "init_noise_sigma"):
        assert ours.initial_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-5)
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(0)
    assert_steps_agree(case, theirs, ours, normal((2, 4, 8, 6)) * np.float32(ours.initial_sigma), 0)


STARTS: list[Case] = [
    (FLOW, {"shift": 3.0}),
    (FLOW, {"stochastic_sampling": True}),
    (FLOW_HEUN, {"shift": 3.0}),
    (EULER, SD15 | {"timestep_spacing": "leading"}),
    (ANCESTRAL, SD15),
    (HEUN, SD15),
    (DPM, SD15 | {"solver_order": 3}),
    (DPM, SD15 | SDE),
    (DPM, OF_FLOWS | {"flow_shift": 3.0}),
    (UNIPC, SD15 | {"solver_order": 3}),
    (UNIPC, OF_FLOWS | {"flow_shift": 3.0}),
    ("DDIMScheduler", SD15 | {"steps_offset": 1}),
    ("DDPMScheduler", SD15 | {"steps_offset": 1}),
    ("PNDMScheduler", SD15 | {"skip_prk_steps": True}),
    (SCM, {"sigma_data": 1.0}),
    (LCM, {}),
    (TCD, {}),
]


@pytest.mark.parametrize("first", [0, 1, 7, 11])
@pytest.mark.parametrize("case", STARTS, ids=name_of)
def test_an_image_is_noised_and_drawn_from_there_as_by_diffusers(case: Case, first: int) -> None:
    """As diffusers' image-to-image pipelines do it."""
    theirs, ours = both(case, 12, stacked(noise_sources("torch", 5, 2)) if is_stochastic(case) else no_noise)
    start = first * ours.order
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(start)
    clean, noise = normal((2, 2, 4, 8, 6))
    timestep = theirs.timesteps[start]
    if case[0] in (FLOW, FLOW_HEUN):
        expected = theirs.scale_noise(torch.from_numpy(clean), timestep[None], torch.from_numpy(noise))
    elif case[0] == SCM:  # diffusers' pipeline does that itself
        expected = timestep.cos() * torch.from_numpy(clean) + timestep.sin() * torch.from_numpy(noise)
    else:
        expected = theirs.add_noise(torch.from_numpy(clean), torch.from_numpy(noise), timestep[None])
    sample = ours.noised(clean, noise, start)
    assert_close(sample, expected)
    assert_steps_agree(case, theirs, ours, sample, start)


def test_every_sampler_begins_in_the_middle() -> None:
    assert {case[0] for case in STARTS} == set(SCHEDULERS)


@pytest.mark.parametrize("case", STARTS, ids=name_of)
def test_an_image_s_noise_and_steps_do_not_depend_on_its_batch(case: Case) -> None:
    """One scheduler for a batch (n, c, h, w), or one for each image (c, h, w): the same images."""
    sources = noise_sources("numpy", 5, 2)
    together = both(case, 6, stacked(sources))[1]
    alone = [both(case, 6, source)[1] for source in noise_sources("numpy", 5, 2)]
    batch = normal((2, 4, 8, 6)) * np.float32(together.initial_sigma)
    images = list(batch)
    for index, timestep in enumerate(together.timesteps):
        batch = together.step(network(together.scale(batch, index), timestep), index, batch)
        images = [
            scheduler.step(network(scheduler.scale(image, index), timestep), index, image)
            for scheduler, image in zip(alone, images, strict=True)
        ]
    # BLAS is not involved: sums of two or three terms, in one order
    np.testing.assert_array_equal(batch, np.stack(images))


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("sigma", [0.5, 0.3])
def test_few_steps_are_diffusers_in_units_of_sigma_data(steps: int, sigma: float) -> None:
    """Noise, samples and outputs of diffusers' are times sigma_data; the denoiser is told the same of both."""
    theirs, ours = both((SCM, {"sigma_data": sigma}), steps, stacked(noise_sources("torch", 5, 2)))
    generator, sample = torch.Generator().manual_seed(5), normal((2, 4, 8, 6))
    for index, timestep in enumerate(theirs.timesteps[:-1]):
        output = network(sample, float(timestep))
        given = torch.from_numpy(sigma * output), timestep, torch.from_numpy(sigma * sample)
        after, clean = theirs.step(*given, generator=generator, return_dict=False)
        sample = ours.step(output, index, sample)
        assert_close(sample, after / sigma)
    assert_close(sample, clean / sigma)  # what its pipeline gives behind the last step


def test_the_last_step_of_bh1_is_finite_where_diffusers_is_not() -> None:
    theirs, ours = both((UNIPC, SD15 | {"solver_type": "bh1"}), 5, no_noise)
    sample = normal((1, 4, 8, 6))
    for index, timestep in enumerate(theirs.timesteps):
        output = network(sample, float(timestep))
        expected = theirs.step(torch.from_numpy(output), timestep, torch.from_numpy(sample), return_dict=False)[0]
        sample = ours.step(output, index, sample)
    assert torch.isnan(expected).all()
    assert np.isfinite(sample).all()


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"shift": 3.0, "use_dynamic_shifting": True}], ids=str)
def test_even_sigmas_are_shifted_as_flux_s_pipeline_has_it(config: dict[str, Any], steps: int) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    mu = float(np.interp(TOKENS, [256, 4096], [0.5, 1.15]))
    theirs.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    ours = make_scheduler(dict(theirs.config) | {"_class_name": FLOW}, steps, TOKENS, no_noise, even_sigmas=True)
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy(), rtol=1e-5, atol=1e-4)
    theirs.set_begin_index(0)
    assert_steps_agree((FLOW, config), theirs, ours, normal((2, 4, 8, 6)), 0)


@pytest.mark.parametrize("steps", [1, 4, 50, 200])
@pytest.mark.parametrize("tokens", [256, 4096, 4300, 4301, 16384])
def test_flux2_s_pipeline_says_how_far_the_shift_goes(tokens: int, steps: int) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    theirs.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))
    assert FLUX2_KLEIN.shift is not None
    mu = FLUX2_KLEIN.shift(tokens, steps)
    assert mu == pytest.approx(compute_empirical_mu(tokens, steps))
    config = dict(theirs.config) | {"_class_name": FLOW}
    ours = make_scheduler(config, steps, tokens, no_noise, even_sigmas=True, mu=mu)
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy(), rtol=1e-5, atol=1e-4)


def test_a_scheduler_that_a_pipeline_does_not_draw_by_is_named() -> None:
    with pytest.raises(CompatibilityError, match=r"UniPC.* with this pipeline; supported is FlowMatchEuler"):
        make_scheduler({"_class_name": UNIPC} | OF_FLOWS, 10, 1, no_noise, even_sigmas=True)
    with pytest.raises(CompatibilityError, match=r"DPMSolver.* with this pipeline; supported is SCMScheduler"):
        make_scheduler({"_class_name": DPM} | OF_FLOWS, 10, 1, no_noise, only=SCM)


def test_an_unknown_scheduler_lists_the_known() -> None:
    with pytest.raises(CompatibilityError, match=r"KDPM2DiscreteScheduler is not supported.*EulerDiscreteScheduler"):
        make_scheduler({"_class_name": "KDPM2DiscreteScheduler"}, 10, 1, no_noise)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": EULER, "prediction_type": "flow"}, "prediction_type='flow'"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding=True"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "variance_type='learned'"),
        ({"_class_name": "PNDMScheduler", "beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "odd"}, "timestep_spacing='odd'"),
        ({"_class_name": ANCESTRAL, "prediction_type": "sample"}, "prediction_type='sample'"),
        ({"_class_name": HEUN, "beta_schedule": "exp"}, "beta_schedule='exp'"),
        ({"_class_name": DPM, "algorithm_type": "dpmsolver"}, "algorithm_type='dpmsolver'"),
        ({"_class_name": DPM, "solver_order": 4}, "solver_order=4 is not supported; supported are 1, 2, 3"),
        ({"_class_name": DPM, "variance_type": "learned_range"}, "variance_type='learned_range'"),
        ({"_class_name": DPM, "use_flow_sigmas": True, "use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ({"_class_name": DPM, "prediction_type": "flow_prediction"}, "flow_prediction needs use_flow_sigmas"),
        ({"_class_name": SCM, "prediction_type": "epsilon"}, "prediction_type='epsilon'"),
        ({"_class_name": UNIPC, "thresholding": True}, "thresholding=True"),
        ({"_class_name": UNIPC, "use_beta_sigmas": True} | OF_FLOWS, "use_beta_sigmas=True"),
        ({"_class_name": UNIPC, "lower_order_final": False}, "set final_sigmas_type=sigma_min"),
        ({"_class_name": UNIPC, "predict_x0": False}, "set final_sigmas_type=sigma_min"),
        ({"_class_name": UNIPC, "predict_x0": False} | OF_FLOWS, "flow_prediction needs predict_x0"),
    ],
)
def test_an_option_that_is_not_supported_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CompatibilityError, match=message):
        make_scheduler(config, 10, 1, no_noise)


@pytest.mark.parametrize(
    ("config", "steps", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, 1001, "1001 steps are more than the 1000"),
        ({"_class_name": UNIPC}, 1001, "1001 steps are more than the 1000"),
        ({"_class_name": SCM}, 1001, "1001 steps are more than the 1000"),
        ({"_class_name": LCM}, 51, "51 steps are more than the 50"),
        ({"_class_name": DPM}, 1000, "1000 steps put two of them at the same level of noise; take fewer"),
        ({"_class_name": FLOW, "shift_terminal": 0.1}, 1, "num_inference_steps 1: .* needs 2 or more"),
    ],
)
def test_more_steps_than_the_schedule_has_or_fewer_are_an_error(
    config: dict[str, Any], steps: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_scheduler(config, steps, 1, no_noise)


def test_a_runge_kutta_start_cannot_be_left_out() -> None:
    scheduler = make_scheduler({"_class_name": "PNDMScheduler"}, 10, 1, no_noise)
    sample = normal((4, 8, 6))
    with pytest.raises(ConfigError, match="cannot begin in the middle; set skip_prk_steps"):
        scheduler.step(sample, 5, sample)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 25])
def test_levels_that_ltx_s_pipeline_gives_are_those_of_the_steps(steps: int) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(timesteps=linear_quadratic_schedule(steps) * 1000)
    config = dict(theirs.config) | {"_class_name": FLOW}
    ours = make_scheduler(config, steps, 1, no_noise, levels=linear_quadratic(steps))
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
    sample, velocity = (np.random.default_rng(seed).standard_normal((1, 4, 6)).astype(np.float32) for seed in (0, 1))
    for index, timestep in enumerate(theirs.timesteps):
        told = {"per_token_timesteps": timestep.expand(1, 4), "return_dict": False}
        expected = theirs.step(-torch.from_numpy(velocity), timestep, torch.from_numpy(sample), **told)[0]
        np.testing.assert_allclose(ours.step(velocity, index, sample), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "config", [{"shift": 3.0}, {"use_dynamic_shifting": True}, {"shift_terminal": 0.1}, {"stochastic_sampling": True}]
)
def test_levels_that_are_given_are_not_changed(config: dict[str, Any]) -> None:
    (name,) = config
    with pytest.raises(CompatibilityError, match=f"{name}=.* is not supported"):
        make_scheduler({"_class_name": FLOW} | config, 4, 1, no_noise, levels=linear_quadratic(4))
