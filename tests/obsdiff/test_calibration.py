"""Grams against activations recorded by hand, and step indices against diffusers' own schedulers."""

from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SCMScheduler,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from obsdiff.calibration import Prompts, StepIndex, calibrate, encode
from obsdiff.core import timesteps
from obsdiff.families import sd3
from obsdiff.recipe import Sampling
from obsdiff_runtime.errors import CalibrationError

SAMPLING = Sampling(
    num_inference_steps=3, guidance_scale=3.0, height=32, width=32, max_sequence_length=1, batch_size=2, seed=5
)
TEXTS = ("a red circle", "a blue square", "a small green triangle")


@pytest.fixture
def pipeline(build_pipeline: Callable[..., StableDiffusion3Pipeline]) -> StableDiffusion3Pipeline:
    return build_pipeline("sd3")


@pytest.fixture
def prompts(pipeline: StableDiffusion3Pipeline) -> Prompts:
    return encode(pipeline, sd3, TEXTS, SAMPLING)


def collect(pipeline: StableDiffusion3Pipeline, prompts: Prompts, sampling: Sampling = SAMPLING) -> dict[str, Tensor]:
    linears = sd3.linears(pipeline.transformer)
    grams = calibrate(pipeline, sd3, linears, prompts, sampling, time_weights="log-decrease")
    return {reads: gram.matrix for reads, gram in grams.items()}


def test_grams_are_the_weighted_means_of_recorded_activations(
    pipeline: StableDiffusion3Pipeline, prompts: Prompts
) -> None:
    weights = timesteps.weights("log-decrease", 3)
    calls: dict[str, list[Tensor]] = {}
    hooks = [
        pipeline.transformer.get_submodule(linear.name).register_forward_pre_hook(
            lambda _, args, name=linear.name: calls.setdefault(name, []).append(args[0].double())
        )
        for linear in sd3.linears(pipeline.transformer)
    ]
    grams = collect(pipeline, prompts)
    for hook in hooks:
        hook.remove()

    for linear in sd3.linears(pipeline.transformer):
        recorded = calls[linear.name]
        assert len(recorded) == 2 * 3  # two batches of three steps
        products = [x.flatten(0, 1).T @ x.flatten(0, 1) * weights[i % 3] for i, x in enumerate(recorded)]
        tokens = sum(x.shape[0] * x.shape[1] * float(weights[i % 3]) for i, x in enumerate(recorded))
        # float32 products of float32 activations
        torch.testing.assert_close(grams[linear.reads], sum(products) / tokens, rtol=1e-5, atol=1e-6)


def test_q_k_and_v_share_a_gram_so_that_a_joint_block_has_eight(pipeline: StableDiffusion3Pipeline) -> None:
    linears = sd3.linears(pipeline.transformer)
    first = [linear for linear in linears if linear.block == 0]
    joint = [linear for linear in first if "attn2" not in linear.name]
    assert len(joint) == 12
    assert len({linear.reads for linear in joint}) == 8
    assert len(first) == 16  # the second attention of SD3.5-medium
    assert len({linear.reads for linear in first}) == 10


def test_linears_that_do_not_share_their_input_are_found_out(
    pipeline: StableDiffusion3Pipeline, prompts: Prompts
) -> None:
    import dataclasses

    linears = [dataclasses.replace(linear, reads="same") for linear in sd3.linears(pipeline.transformer)[:5]]
    with pytest.raises(CalibrationError, match="were taken to read the same input and do not"):
        calibrate(pipeline, sd3, linears, prompts, SAMPLING, time_weights="uniform")


def test_batch_size_changes_nothing_but_rounding(pipeline: StableDiffusion3Pipeline, prompts: Prompts) -> None:
    import dataclasses

    one = collect(pipeline, prompts, dataclasses.replace(SAMPLING, batch_size=1))
    three = collect(pipeline, prompts, dataclasses.replace(SAMPLING, batch_size=3))
    for reads, gram in one.items():
        torch.testing.assert_close(gram, three[reads], rtol=1e-4, atol=1e-5 * float(gram.abs().max()))


def test_a_nan_activation_names_layer_step_and_prompts(pipeline: StableDiffusion3Pipeline, prompts: Prompts) -> None:
    with torch.no_grad():
        pipeline.transformer.transformer_blocks[1].attn.to_v.weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"transformer_blocks\.1\.attn\.to_\S+: step 1, prompts 1 to 2: .*NaN"):
        collect(pipeline, prompts)


def test_no_prompt_is_an_error_not_a_zero_model(pipeline: StableDiffusion3Pipeline, prompts: Prompts) -> None:
    empty = Prompts(texts=(), embeddings=prompts.embeddings)
    with pytest.raises(CalibrationError, match="no prompt to calibrate on"):
        collect(pipeline, empty)


def test_no_hook_stays_behind(pipeline: StableDiffusion3Pipeline, prompts: Prompts) -> None:
    collect(pipeline, prompts)
    assert not any(module._forward_pre_hooks for module in pipeline.transformer.modules())


def steps_of(timestep_values: Tensor, index: StepIndex, calls_per_step: int = 1) -> Iterator[int]:
    for value in timestep_values:
        for _ in range(calls_per_step):
            yield index.advance(value.expand(2))


def test_each_call_of_a_first_order_scheduler_is_a_step() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    index = StepIndex(scheduler, 5)
    assert list(steps_of(scheduler.timesteps, index)) == [0, 1, 2, 3, 4]
    index.restart()
    assert list(steps_of(scheduler.timesteps, index, calls_per_step=2)) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_scheduler_that_also_says_where_it_ends_has_no_step_there(steps: int) -> None:
    scheduler = SCMScheduler()
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    assert len(scheduler.timesteps) == steps + 1
    assert list(steps_of(scheduler.timesteps[:-1], StepIndex(scheduler, steps))) == list(range(steps))


def test_a_scheduler_that_calls_twice_a_step_ends_on_the_last_step() -> None:
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(5)
    assert len(scheduler.timesteps) == 9
    steps = list(steps_of(scheduler.timesteps, StepIndex(scheduler, 5)))
    assert steps[0] == 0
    assert steps[-1] == 4
    assert steps == sorted(steps)
