"""What a pipeline says there is to choose: all else it refuses, or it makes no difference."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from obsdiff_runtime.bundle import open_bundle
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.pipeline import Pipeline
from obsdiff_runtime.verbs import drawing

MakePair = Callable[[str], tuple[Any, Path]]
WAN = ("wan", "wan22", "wan22_i2v", "wan_ti2v", "wan_flf2v")
KINDS = ("controlnet", "sd3", "flux", "flux2", "kontext", "sana_sprint", "qwen_edit", "dit", *WAN)


def refuses(pipeline: Pipeline, **given: Any) -> bool:
    """Whether a call cannot be begun so."""
    try:
        pipeline.begin(pipeline.example, num_inference_steps=2, **{**pipeline.example_pictures(), **given})
    except ConfigError:
        return True
    return False


def drawn(pipeline: Pipeline, **given: Any) -> np.ndarray:
    found = pipeline(pipeline.example, num_inference_steps=2, **pipeline.example_pictures(), **given)
    return found.latents


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_choice_is_refused_and_what_is_one_makes_a_difference(kind: str, make_pair: MakePair) -> None:
    pipeline = Pipeline(make_pair(kind)[1], threads=1)
    choices, own = pipeline.resolver.choices, pipeline.bundle.manifest.defaults
    grey = np.full((32, 32, 3), 127, np.uint8)
    assert refuses(pipeline, negative_prompt="blue") != choices.negative_prompt
    assert refuses(pipeline, guidance_scale_2=2.0) != choices.guidance_scale_2
    assert refuses(pipeline, num_frames=5) == (choices.frame_step is None)
    assert refuses(pipeline, num_frames=(choices.frame_step or 1) + 2)
    length = {"flux2": 96}.get(kind)  # or the tiny tokenizer has no room for a prompt beside the template
    low, high = (drawn(pipeline, guidance_scale=scale, max_sequence_length=length) for scale in (2.0, 5.0))
    assert np.array_equal(low, high) != choices.guidance_scale
    if choices.size_step is None:
        assert refuses(pipeline, height=own.height + pipeline.size_step)
    elif not pipeline.resolver.opens:
        assert not refuses(pipeline, height=own.height - choices.size_step)
        assert refuses(pipeline, height=own.height - choices.size_step // 2)
    assert refuses(pipeline, control=grey) != choices.control
    least, most = choices.pictures
    name = "image" if pipeline.resolver.opens or choices.changes else "reference"
    few: dict[str, Any] = {"image": None} if name == "image" else {"reference": []}
    assert refuses(pipeline, **few) == (least > 0)
    if choices.changes:
        assert not refuses(pipeline, image=grey, strength=0.6, mask=grey[..., 0] > 0)
    else:
        assert refuses(pipeline, strength=0.6)
    if pipeline.resolver.opens:
        assert refuses(pipeline, last_image=None) == (least > 1)
    assert refuses(pipeline, **{name: [grey] if name == "reference" else grey}) == (most == 0)
    if name == "reference":
        assert refuses(pipeline, reference=[grey] * 2) == (most in (0, 1))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sd3", "'...' -o a.png"),
        ("kontext", "'...' -o a.png"),
        ("qwen_edit", "'...' --reference FILE -o a.png"),
        ("wan22_i2v", "'...' --image FILE -o a.webp"),
        ("wan_flf2v", "'...' --image FILE --last-image FILE -o a.webp"),
    ],
)
def test_a_command_that_draws_names_the_files_that_it_wants(kind: str, expected: str, make_pair: MakePair) -> None:
    folder = make_pair(kind)[1]
    assert drawing(open_bundle(folder, "sizes")) == f"{folder} {expected}"


def test_guidance_is_no_choice_of_distilled_steps_and_pictures_none_without_an_encoder(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline(make_pair("flux2")[1], threads=1)
    monkeypatch.setattr(pipeline.resolver, "_distilled", True)
    monkeypatch.setattr(pipeline.networks, "has", lambda component: component != "vae_encoder")
    assert refuses(pipeline, guidance_scale=2.0)
    choices = pipeline.resolver.choices
    assert (choices.guidance_scale, choices.negative_prompt, choices.pictures) == (False, False, (0, 0))


def test_a_class_is_drawn_by_each_name_that_it_has(make_pair: MakePair) -> None:
    pipeline = Pipeline(make_pair("dit")[1], threads=1)
    assert pipeline.resolver.choices.classes is not None
    assert [pipeline.resolver.choices.classes[number] for number in (0, 1, 134, 517)] == [
        "Tinca tinca, tench",
        "1",
        "134",
        "crane",
    ]
    first, other, third = (pipeline(name, num_inference_steps=1).latents for name in ("Tinca tinca", "tench", "1"))
    np.testing.assert_array_equal(first, other)
    assert not np.array_equal(first, third)
