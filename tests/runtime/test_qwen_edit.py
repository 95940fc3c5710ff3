"""Qwen-Image-Edit: pictures go through the text encoder, too, and all of that without torch is what diffusers draws."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as first
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from obsdiff_runtime import references, seeing
from obsdiff_runtime.benchmark import bench
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.kinds.table import KINDS
from obsdiff_runtime.pipeline import Images, Pipeline

PROMPT = "make it winter"
GIVEN = {"num_inference_steps": 3, "height": 24, "width": 32}
SMALL = 96 * 96
"""Pixels of pictures here, in place of a megapixel."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", SMALL)
    monkeypatch.setattr(
        first, "calculate_dimensions", lambda _, shape: (*plus.calculate_dimensions(SMALL, shape), None)
    )
    monkeypatch.setattr(references, "_MEGAPIXEL", SMALL)
    kind = KINDS["QwenImageEditPipeline"]
    own = replace(kind, references=replace(references.QWEN_EDIT, seen=SMALL))
    monkeypatch.setitem(KINDS, "QwenImageEditPipeline", own)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    slope = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    noisy = (slope + np.random.default_rng(seed).normal(0, 40, slope.shape)).clip(0, 255)
    return Image.fromarray(noisy.astype(np.uint8))


@pytest.fixture
def told() -> Iterator[Any]:
    """told(pipeline): its text encoder is told which tokens stand for pictures, which diffusers 0.42 does not tell it.

    Without, transformers 5 counts them on as words; the model was trained with their rows and columns.
    """
    hooks = []

    def tell(pipeline: Any) -> Any:
        def add(_: Any, args: Any, given: dict[str, Any]) -> Any:
            types = pipeline.processor.create_mm_token_type_ids(given["input_ids"])
            return args, {**given, "mm_token_type_ids": torch.tensor(types)}

        hooks.append(pipeline.text_encoder.register_forward_pre_hook(add, with_kwargs=True))
        return pipeline

    yield tell
    for hook in hooks:
        hook.remove()


def drawn(theirs: Any, image: Any, **given: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        found: np.ndarray = theirs(
            image=image, prompt=PROMPT, generator=generator, output_type="np", **GIVEN, **given
        ).images
    return found


def psnr(expected: np.ndarray, images: Images) -> float:
    return float(-10 * np.log10(np.mean((expected - images.arrays / 255) ** 2)))  # rounding leaves 59 dB


@pytest.mark.stage("runtime", kind="qwen_edit")
def test_edits_of_several_pictures_are_those_of_diffusers(qwen_edit_pair: tuple[Any, Path], told: Any) -> None:
    """Of shapes of their own, in this order, guided away from a negative prompt that is read beside them."""
    theirs, folder = qwen_edit_pair
    ours, pictures = Pipeline(folder, threads=1), [picture(120, 90), picture(61, 140, seed=1)]
    found = {}
    for name, images, scale in (("one", pictures[:1], 1.0), ("two", pictures, 3.0), ("turned", pictures[::-1], 3.0)):
        given = {"guidance_scale": scale, "max_sequence_length": 120, "negative_prompt": "fog" if scale > 1 else ""}
        fitted = [ours.fit(each) for each in images]
        found[name] = ours(PROMPT, reference=fitted, seed=7, noise_source="torch", **GIVEN, **given)
        more = {"negative_prompt": "fog", "true_cfg_scale": 3.0} if scale > 1 else {"true_cfg_scale": 1.0}
        assert psnr(drawn(told(theirs), images, **more), found[name]) > 50
    assert np.abs(found["two"].latents - found["turned"].latents).max() > 1e-3
    with pytest.raises(ConfigError, match="draws nothing without one; give it a reference picture"):
        ours(PROMPT)


def test_an_edit_of_the_first_model_is_that_of_diffusers(qwen_edit_first_pair: tuple[Any, Path], told: Any) -> None:
    """What its text encoder looks at is what its denoiser is told; it takes one picture."""
    theirs, folder = qwen_edit_first_pair
    ours, image = Pipeline(folder, threads=1), picture(120, 90)
    given = {"guidance_scale": 3.0, "max_sequence_length": 120}
    found = ours(PROMPT, reference=ours.fit(image), seed=7, noise_source="torch", **GIVEN, **given)
    expected = drawn(told(theirs), image, negative_prompt="", true_cfg_scale=3.0)
    assert psnr(expected, found) > 50
    with pytest.raises(ConfigError, match="2 reference pictures; this pipeline takes 1"):
        ours(PROMPT, reference=[ours.fit(image)] * 2)


@pytest.mark.parametrize("pair", ["qwen_edit", "qwen_edit_first"])
def test_text_is_read_beside_pictures_as_diffusers_has_it_read(
    pair: str, make_pair: Callable[[str], tuple[Any, Path]], told: Any
) -> None:
    """A random denoiser hardly minds what it is told of text, so it is looked at by itself."""
    theirs, folder = make_pair(pair)
    ours = Pipeline(folder, threads=1)
    images = [picture(120, 90), picture(61, 140, seed=1)][: 2 if pair == "qwen_edit" else 1]
    fitted = [ours.fit(each) for each in images]
    (drawing,) = ours.begin(PROMPT, reference=fitted, guidance_scale=1.0, max_sequence_length=120)
    (states,) = drawing.conditions["encoder_hidden_states"]
    looked = [Image.fromarray(each.seen) for each in fitted]
    with torch.no_grad():
        plain = theirs.encode_prompt(PROMPT, looked)[0][0].numpy()
        expected = told(theirs).encode_prompt(PROMPT, looked)[0][0].numpy()
    assert drawing.conditions["encoder_hidden_states_mask"].sum() == len(expected)
    np.testing.assert_allclose(states[: len(expected)], expected, atol=5e-5)
    assert not states[len(expected) :].any()
    assert np.abs(plain - expected).max() > 2e-3  # places matter


def test_it_is_timed_on_a_picture_of_the_drawn_size(qwen_edit_pair: tuple[Any, Path]) -> None:
    """A grey one, for it draws nothing without."""
    report = bench(qwen_edit_pair[1], iterations=1, warmup=0, threads=1, **GIVEN)
    (candidate,) = report.candidates.values()
    assert {"vision_encoder", "vae_encoder"} <= candidate.components.keys()


@pytest.mark.parametrize("size", [(112, 140), (57, 200), (28, 28), (420, 170)])
def test_vision_and_places_are_those_of_transformers(qwen_edit_pair: tuple[Any, Path], size: tuple[int, int]) -> None:
    """Windows that are whole or cut at an edge, one alone, and pictures beside another among words."""
    theirs, folder = qwen_edit_pair
    model, networks = theirs.text_encoder.model, Pipeline(folder, threads=1).networks
    images = [picture(*size), picture(90, 61, seed=1)]
    pixels = theirs.processor.image_processor(images, return_tensors="pt")
    with torch.no_grad():
        expected = model.get_image_features(
            **{"pixel_values": pixels.pixel_values, "image_grid_thw": pixels.image_grid_thw}
        )
    seen = seeing.look(networks, [np.asarray(image) for image in images])
    for each, states, grid in zip(seen, expected.pooler_output, pixels.image_grid_thw, strict=True):
        assert [1, each.rows * 2, each.columns * 2] == grid.tolist()
        np.testing.assert_allclose(each.states, states.numpy(), atol=2e-5)

    mark = theirs.text_encoder.config.image_token_id
    one, other = (len(each.states) for each in seen)
    ids = np.array([[3, 4, *[mark] * one, 5, *[mark] * other, 6, 7], [3, *[mark] * one, 4, *[mark] * other, 6, 7, 8]])
    positions, _ = model.get_rope_index(
        torch.from_numpy(ids),
        mm_token_type_ids=torch.from_numpy((ids == mark).astype(np.int32)),
        image_grid_thw=pixels.image_grid_thw.repeat(2, 1),
    )
    found = seeing.told(ids, mark, seen)
    np.testing.assert_array_equal(found[seeing.POSITIONS], positions.numpy())
    assert found[seeing.PLACES].max() == one + other == len(found[seeing.STATES])


@pytest.mark.parametrize("size", [(384, 384), (97, 500), (2000, 90), (20, 31), (33, 30)])
def test_a_picture_becomes_the_patches_of_transformers(size: tuple[int, int]) -> None:
    limits = {"min_pixels": 56 * 56, "max_pixels": 400 * 400}  # one picture is larger, others are smaller
    processor = Qwen2VLImageProcessorPil(**limits)
    image = picture(*size)
    expected = processor(image, return_tensors="np")
    config = {
        **limits,
        **{"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112},
        **{"image_mean": processor.image_mean, "image_std": processor.image_std},
    }
    inputs, order = seeing.windowed(seeing.resized(image, config), config)
    shown = order[..., 0] >= 0
    rows, columns = (side // 2 for side in expected.image_grid_thw[0, 1:])
    assert shown.sum() == rows * columns
    patches = expected.pixel_values.reshape(rows, columns, 4, -1)[order[shown][:, 0], order[shown][:, 1]]
    found = inputs[seeing.PATCHES].reshape(len(order), 16, 4, -1)[shown]
    np.testing.assert_allclose(found, patches, atol=1e-5)


@pytest.mark.parametrize("size", [(1200, 801), (640, 480), (300, 2000), (97, 64)])
def test_a_picture_is_fitted_twice_as_diffusers_does(size: tuple[int, int]) -> None:
    image = picture(*size[::-1])
    found = references.reference_of(image, 16, references.QWEN_EDIT_PLUS, own_size=False)
    for pixels, area in ((found.pixels, SMALL), (found.seen, plus.CONDITION_IMAGE_SIZE)):
        wide, high = plus.calculate_dimensions(area, size[0] / size[1])
        np.testing.assert_array_equal(pixels, np.asarray(image.resize((wide, high), Image.Resampling.LANCZOS)))


def test_what_cannot_be_looked_at_is_explained(qwen_edit_pair: tuple[Any, Path]) -> None:
    ours = Pipeline(qwen_edit_pair[1], threads=1)
    image = ours.fit(picture(64, 64))
    with pytest.raises(ConfigError, match=r"a prompt may not hold <\|image_pad\|>"):
        ours("red <|image_pad|>", reference=image, max_sequence_length=60)
    with pytest.raises(ConfigError, match="max_sequence_length 5 leaves no room for what is around pictures"):
        ours("red", reference=[image] * 2, max_sequence_length=5)
    with pytest.raises(ConfigError, match="the model reads none 200 times as long as wide"):
        ours.fit(picture(4, 1000))
