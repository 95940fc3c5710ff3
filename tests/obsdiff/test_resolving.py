"""What is left open is the method's or the pipeline's to say; what cannot be done is refused before anything runs."""

from collections.abc import Callable
from typing import Any

import pytest
from diffusers import DiffusionPipeline

from obsdiff.job import given
from obsdiff.methods.table import METHODS
from obsdiff.recipe import Recipe
from obsdiff.resolving import resolve
from obsdiff.settings import Settings
from obsdiff_runtime.errors import ConfigError


@pytest.fixture
def recipe(build_pipeline: Callable[..., DiffusionPipeline]) -> Callable[..., Recipe]:
    """recipe(**settings): resolved for a tiny SD3."""
    loaded = given(build_pipeline("sd3"))

    def resolved(**settings: Any) -> Recipe:
        asked = Settings(**{"sparsity": "2:4", **settings})
        return resolve(asked, model="tiny", family=loaded.family, defaults=loaded.defaults, prompts=["a dog"])

    return resolved


def test_a_pipeline_whose_steps_are_distilled_takes_no_guidance(
    build_pipeline: Callable[..., DiffusionPipeline],
) -> None:
    pipeline = build_pipeline("flux2")
    assert given(pipeline).defaults.guidance_scale == 4.0
    pipeline.register_to_config(is_distilled=True)
    loaded = given(pipeline)
    assert loaded.defaults.guidance_scale == 1.0

    def resolved(**settings: Any) -> Recipe:
        asked = Settings(sparsity="2:4", **settings)
        return resolve(asked, model="tiny", family=loaded.family, defaults=loaded.defaults, prompts=["a dog"])

    assert resolved().sampling.guidance_scale == 1.0
    with pytest.raises(ConfigError, match="--guidance-scale 4: this pipeline's steps are distilled"):
        resolved(guidance_scale=4.0)


@pytest.mark.parametrize("method", METHODS)
def test_time_weights_are_the_method_s_unless_given(method: str, recipe: Callable[..., Recipe]) -> None:
    assert recipe(method=method).time_weights == ("uniform" if method == "sparsegpt" else "log-decrease")
    assert recipe(method=method, time_weights="linear-increase").time_weights == "linear-increase"


def test_streamed_is_what_is_run_when_no_method_is_named(recipe: Callable[..., Recipe]) -> None:
    assert (recipe().method, recipe().time_weights) == ("streamed", "log-decrease")


@pytest.mark.parametrize(("steps", "computed"), [(1, 1), (4, 4), (8, 8), (12, 8), (20, 10), (28, 14)])
def test_of_few_steps_the_denoiser_computes_all(steps: int, computed: int, recipe: Callable[..., Recipe]) -> None:
    assert recipe(steps=steps).trajectory_steps == computed


@pytest.mark.parametrize(
    ("side", "batch"), [(64, 4), (512, 4), (640, 2), (768, 1), (1024, 1), (2048, 1)], ids=lambda value: str(value)
)
def test_a_call_has_fewer_large_pictures(side: int, batch: int, recipe: Callable[..., Recipe]) -> None:
    assert recipe(height=side, width=side).sampling.batch_size == batch
    assert recipe(height=side, width=side, batch_size=3).sampling.batch_size == 3


def test_a_model_that_does_not_fit_the_gpu_holds_no_more_than_it_must(recipe: Callable[..., Recipe]) -> None:
    assert recipe().replay
    assert not recipe(offload=True).replay
    assert recipe(offload=True, method_options={"replay": 1}).replay


@pytest.mark.parametrize("setting", [{"method": ""}, {"time_weights": ""}])
def test_an_empty_choice_is_no_choice(setting: dict[str, str], recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ConfigError, match=r"unknown; there are "):
        recipe(**setting)


@pytest.mark.parametrize("sparsity", ["structured:0.25", "heads:0.2", "ffn:0.3", "structured:0.2+2:4"])
def test_a_method_without_a_structured_form_says_which_have_one(sparsity: str, recipe: Callable[..., Recipe]) -> None:
    able = ", ".join(name for name, method in METHODS.items() if method.removes_units)
    with pytest.raises(ConfigError, match=rf"dsnot: .*single weights only.*: {able}$"):
        recipe(sparsity=sparsity, method="dsnot")
    for method in METHODS:
        if METHODS[method].removes_units:
            assert recipe(sparsity=sparsity, method=method).method == method
