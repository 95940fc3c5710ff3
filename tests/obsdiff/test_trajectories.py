"""What streamed calibration keeps of the sampler's calls."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from obsdiff import calibration, trajectories
from obsdiff.families.table import family_of
from obsdiff.recipe import Sampling
from obsdiff.trajectories import Call, computed, kept
from obsdiff_runtime.errors import CalibrationError

PROMPTS = ("a red circle", "a blue square", "a dog")
KINDS = ["sd3", "sd15", "sdxl"]
Build = Callable[..., DiffusionPipeline]


def sampling(kind: str, steps: int = 4, batch_size: int = 2) -> Sampling:
    return Sampling(
        num_inference_steps=steps,
        guidance_scale=3.0,
        height=32,
        width=32,
        max_sequence_length={"sd3": 2, "qwen": 200}.get(kind),
        batch_size=batch_size,
        seed=5,
    )


def recorded(kind: str, pipeline: Any, *, kept: int, steps: int = 4, batch_size: int = 2, **options: Any) -> list[Call]:
    family = family_of(getattr(pipeline, "transformer", None) or pipeline.unet)
    runs = sampling(kind, steps, batch_size)
    prompts = calibration.encode(pipeline, family, PROMPTS, runs)
    given = {"computed_steps": steps, "kept_steps": kept} | options
    return trajectories.record(pipeline, family, prompts, runs, **given)


def tensors(call: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Tensor]:
    args, kwargs = call
    found = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return [*found, *(kwargs.get("added_cond_kwargs") or {}).values()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_calls_are_those_of_the_plain_sampler(kind: str, build_pipeline: Build) -> None:
    """Every step of every batch is kept, and compared with what a hook sees of a plain run, as values at the time."""
    calls = recorded(kind, build_pipeline(kind), kept=4)
    pipeline: Any = build_pipeline(kind)
    family = family_of(pipeline.transformer if kind == "sd3" else pipeline.unet)
    plain: list[list[Tensor]] = []
    getattr(pipeline, family.denoiser).register_forward_pre_hook(
        lambda _, args, kwargs: plain.append([value.clone() for value in tensors((args, kwargs))]), with_kwargs=True
    )
    runs = sampling(kind)
    prompts = calibration.encode(pipeline, family, PROMPTS, runs)
    for rows in calibration.batches(len(PROMPTS), runs.batch_size):
        calibration.sample(pipeline, prompts, rows, runs)
    assert len(calls) == len(plain) == 8
    for call, expected in zip(calls, plain, strict=True):
        found = tensors(call.arguments)
        assert len(found) == len(expected) >= 3
        assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    assert [call.step for call in calls] == [0, 1, 2, 3] * 2
    assert [call.prompts for call in calls] == ["prompts 1 to 2"] * 4 + ["prompts 3 to 3"] * 4


@torch.no_grad()
def test_two_calls_of_guidance_are_one_of_both_rows(build_pipeline: Build) -> None:
    pipeline: Any = build_pipeline("qwen")
    apart: list[tuple[Tensor, Tensor]] = []
    hook = pipeline.transformer.register_forward_hook(
        lambda _, __, kwargs, output: apart.append((kwargs["hidden_states"].clone(), output[0].clone())),
        with_kwargs=True,
    )
    calls = recorded("qwen", pipeline, kept=4)
    hook.remove()
    assert [call.step for call in calls] == [0, 1, 2, 3] * 2
    assert all(call.paired for call in calls)
    for index, call in enumerate(calls):
        args, kwargs = call.arguments
        (latents, given), (_, without) = apart[2 * index : 2 * index + 2]
        assert torch.equal(kwargs["hidden_states"], torch.cat([latents, latents]))
        torch.testing.assert_close(pipeline.transformer(*args, **kwargs)[0], torch.cat([without, given]))


def test_calls_can_be_run_again(build_pipeline: Build) -> None:
    pipeline: Any = build_pipeline("sd3")
    outputs: list[Tensor] = []
    hook = pipeline.transformer.register_forward_hook(lambda _, __, output: outputs.append(output[0].clone()))
    calls = recorded("sd3", pipeline, kept=4)
    hook.remove()
    with torch.no_grad():
        for call, expected in zip(calls, outputs, strict=True):
            args, kwargs = call.arguments
            assert torch.equal(pipeline.transformer(*args, **kwargs)[0], expected)


@pytest.mark.parametrize(("steps", "count"), [(4, 1), (4, 2), (5, 2), (14, 2), (7, 3), (3, 3)])
def test_batches_take_turns_until_every_step_was_kept(steps: int, count: int) -> None:
    chosen = [kept(frozenset(range(steps)), count, batch) for batch in range(steps)]
    assert all(len(each) == count for each in chosen)
    assert all(each <= set(range(steps)) for each in chosen)
    assert set().union(*chosen) == set(range(steps))
    counts = [sum(step in each for each in chosen) for step in range(steps)]
    assert set(counts) == {count}  # none more often than another


def test_kept_steps_lie_far_apart() -> None:
    assert kept(frozenset(range(14)), 2, 0) == {0, 7}
    assert kept(frozenset(range(14)), 2, 8) == {8, 1}
    assert kept(frozenset({0, 3, 5, 9}), 2, 1) == {3, 9}
    assert kept(frozenset(range(3)), 9, 1) == {0, 1, 2}


@pytest.mark.parametrize(
    ("steps", "count"), [(20, 10), (20, 4), (28, 14), (5, 3), (4, 2), (20, 19), (3, 3), (1, 1), (9, 1)]
)
def test_as_many_steps_as_asked_are_computed_and_together_all(steps: int, count: int) -> None:
    chosen = [computed(steps, count, batch) for batch in range(200)]
    assert {len(each) for each in chosen} == {count}
    assert all(0 in each and max(each) < steps for each in chosen)
    if count > 1:
        assert set().union(*chosen) == set(range(steps))
    assert computed(steps, steps + 3, 5) == set(range(steps))


def test_more_steps_are_computed_towards_the_end() -> None:
    halves = [sum(step >= 10 for step in computed(20, 10, batch)) for batch in range(9)]
    assert sum(halves) > 5.5 * len(halves)
    assert min(halves) >= 5


@pytest.mark.parametrize("kind", ["sd3", "qwen"])
@torch.no_grad()
def test_between_computed_steps_what_the_denoiser_gave_stands(kind: str, build_pipeline: Build) -> None:
    pipeline: Any = build_pipeline(kind)
    family = family_of(pipeline.transformer)
    runs = sampling(kind, steps=8, batch_size=3)
    prompts = calibration.encode(pipeline, family, PROMPTS, runs)
    ran: list[Tensor] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: ran.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    calls = trajectories.record(pipeline, family, prompts, runs, computed_steps=3, kept_steps=3)
    hook.remove()
    asked = 8 * (2 if kind == "qwen" else 1)
    assert len(ran) == asked  # the sampler took every step
    steps = sorted(computed(8, 3, 0))
    assert [call.step for call in calls] == steps
    assert not any("forward" in vars(module) for module in pipeline.transformer.modules())
    for call in calls:
        args, kwargs = call.arguments
        assert len(pipeline.transformer(*args, **kwargs)[0]) == 6
    (first, then), rows = calls[:2], 3
    velocity = pipeline.transformer(*first.arguments[0], **first.arguments[1])[0]
    without, given = velocity.chunk(2)
    moved = then.arguments[1]["hidden_states"][:rows] - first.arguments[1]["hidden_states"][:rows]
    direction = without + runs.guidance_scale * (given - without)
    if kind == "sd3":  # a straight line by what the first step gave
        cosine = torch.nn.functional.cosine_similarity(moved.flatten(1), direction.flatten(1))
        torch.testing.assert_close(cosine, -torch.ones(rows), atol=1e-4, rtol=0)


def test_only_the_wanted_steps_are_kept(build_pipeline: Build) -> None:
    calls = recorded("sd3", build_pipeline("sd3"), kept=2, batch_size=1)
    assert [call.step for call in calls] == [0, 2, 1, 3, 0, 2]


def test_a_scheduler_that_calls_twice_at_a_timestep_keeps_both_calls(build_pipeline: Build) -> None:
    pipeline: Any = build_pipeline("sd3")
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    calls = recorded("sd3", pipeline, kept=4, batch_size=3)
    assert [call.step for call in calls] == [0, 1, 1, 2, 2, 3, 3]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["flux2", "wan"])
def test_prompts_and_negative_ones_that_are_run_by_themselves_are_one_call(kind: str, build_pipeline: Build) -> None:
    pipeline: Any = build_pipeline(kind)
    family = family_of(pipeline.transformer)
    runs = replace(sampling(kind), max_sequence_length=30)
    prompts = calibration.encode(pipeline, family, PROMPTS, runs)
    calls = trajectories.record(pipeline, family, prompts, runs, computed_steps=4, kept_steps=4)
    assert [call.step for call in calls] == [0, 1, 2, 3] * 2
    text = calls[-1].arguments[1]["encoder_hidden_states"]  # of the last batch, of one prompt
    torch.testing.assert_close(text[0], prompts.embeddings["negative_prompt_embeds"][2])
    torch.testing.assert_close(text[1], prompts.embeddings["prompt_embeds"][2])
    args, kwargs = calls[-1].arguments
    assert {len(value) for value in tensors((args, kwargs))} == {2}
    both = pipeline.transformer(*args, **kwargs)[0]
    alone = pipeline.transformer(*args, **{**kwargs, "encoder_hidden_states": text.flip(0)})[0]
    torch.testing.assert_close(both, alone.flip(0))
    unscaled = replace(runs, guidance_scale=1.0)
    unguided = trajectories.record(pipeline, family, prompts, unscaled, computed_steps=4, kept_steps=4)
    assert [len(call.arguments[1]["hidden_states"]) for call in unguided] == [2] * 4 + [1] * 4


def test_a_repeated_prompt_gets_noise_of_its_own(build_pipeline: Build) -> None:
    pipeline: Any = build_pipeline("sd3")
    family = family_of(pipeline.transformer)
    runs = sampling("sd3", batch_size=1)
    prompts = calibration.repeated(calibration.encode(pipeline, family, PROMPTS[:1], runs), 2)
    first, second = trajectories.record(pipeline, family, prompts, runs, computed_steps=1, kept_steps=1)
    (once, twice) = (call.arguments[1]["encoder_hidden_states"] for call in (first, second))
    assert torch.equal(once, twice)
    assert not torch.equal(first.arguments[1]["hidden_states"], second.arguments[1]["hidden_states"])


def test_an_output_that_is_not_finite_is_an_error_that_names_step_and_prompts(build_pipeline: Build) -> None:
    pipeline: Any = build_pipeline("sd3")
    steps: list[int] = []

    def spoil(_: Any, __: Any, output: Tensor) -> Tensor:
        steps.append(len(steps))
        return output * (float("nan") if len(steps) == 6 else 1.0)

    pipeline.transformer.proj_out.register_forward_hook(spoil)
    with pytest.raises(CalibrationError, match=r"step 2, prompts 3 to 3: the denoiser's output is not finite"):
        recorded("sd3", pipeline, kept=1)
    assert "forward" not in vars(pipeline.transformer)  # ours is gone


def test_no_prompt_is_an_error(build_pipeline: Build) -> None:
    pipeline: Any = build_pipeline("sd3")
    empty = calibration.Prompts(texts=(), embeddings={})
    with pytest.raises(CalibrationError, match="no prompt to calibrate on"):
        trajectories.record(
            pipeline, family_of(pipeline.transformer), empty, sampling("sd3"), computed_steps=1, kept_steps=1
        )


def test_progress_counts_calls_to_the_end(build_pipeline: Build) -> None:
    told: list[tuple[str, int, int]] = []
    recorded(
        "sd3",
        build_pipeline("sd3"),
        kept=1,
        progress=lambda stage, done, total, note="": told.append((stage, done, total)),
    )
    assert told[-1] == ("calibrate", 8, 8)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
