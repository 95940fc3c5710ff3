"""Pictures by which a ControlNet steers, against diffusers' pipelines."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from obsdiff.families import controls
from obsdiff_runtime.cli import run
from obsdiff_runtime.controls import packed
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.pipeline import Pipeline

HEIGHT, WIDTH = 32, 48
PROMPTS = ["a large red circle above a small blue square", "a small green triangle"]
GIVEN: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0}

# diffusers' Euler hands torch tensors to numpy functions
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


@pytest.fixture(params=["controlnet", "controlnet_xl"])
def steered(request: pytest.FixtureRequest, make_pair: Any) -> tuple[Any, Path]:
    found: tuple[Any, Path] = make_pair(request.param)
    return found


def edges(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def drawn(pipeline: Any, **told: Any) -> np.ndarray:
    """(n, c, h, w) of diffusers, before decoding."""
    generator = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    with torch.no_grad():
        found: torch.Tensor = pipeline(PROMPTS, generator=generator, output_type="latent", **GIVEN, **told).images
    return found.numpy()


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() < 1e-4 * np.abs(expected).max())


@pytest.mark.stage("runtime", kind="controlnet")
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_a_picture_steers_as_it_does_in_diffusers(steered: tuple[Any, Path], scale: float) -> None:
    theirs, folder = steered
    expected = drawn(theirs, image=Image.fromarray(edges()), controlnet_conditioning_scale=scale)
    ours = Pipeline(folder, threads=1)
    found = ours(PROMPTS, control=edges(), control_scale=scale, seed=[7, 8], noise_source="torch", **GIVEN)
    assert found.arrays.shape == (2, HEIGHT, WIDTH, 3)
    assert same(found.latents, expected)
    without = ours(PROMPTS, seed=[7, 8], noise_source="torch", height=HEIGHT, width=WIDTH, **GIVEN).latents
    assert not same(without, expected)
    assert same(without, drawn(controls.plain(theirs), height=HEIGHT, width=WIDTH))


def test_a_picture_steers_a_change_of_another(steered: tuple[Any, Path]) -> None:
    theirs, folder = steered
    kind = getattr(diffusers, type(theirs).__name__.replace("Pipeline", "Img2ImgPipeline"))
    start = edges(seed=1)
    images = {"image": Image.fromarray(start), "control_image": Image.fromarray(edges())}
    expected = drawn(kind(**theirs.components), strength=0.5, controlnet_conditioning_scale=1.0, **images)
    told = {"image": start, "control": edges(), "strength": 0.5}
    found = Pipeline(folder, threads=1)(PROMPTS, seed=[7, 8], noise_source="torch", **told, **GIVEN)
    assert same(found.latents, expected)


def test_pixels_lie_in_the_channels_of_their_latent_pixel() -> None:
    picture = edges()
    found = torch.from_numpy(packed(picture, 4))
    expected = torch.from_numpy(picture).permute(2, 0, 1) / 255
    torch.testing.assert_close(torch.nn.functional.pixel_shuffle(found, 4), expected)


def test_drawings_with_and_without_share_a_run(make_pair: Any) -> None:
    ours = Pipeline(make_pair("controlnet")[1], threads=1)
    size = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2}
    one, other = ours.begin("red", control=edges(), **size)[0], ours.begin("red", seed=3, **size)[0]
    assert one.shapes == other.shapes
    while not one.is_over:
        ours.step([one, other])
    for drawing, told in ((one, {"control": edges()}), (other, {"seed": 3})):
        np.testing.assert_allclose(drawing.sample, ours("red", **told, **size).latents[0], atol=1e-5)


def test_the_command_steers_by_a_file(make_pair: Any, tmp_path: Path) -> None:
    folder = make_pair("controlnet")[1]
    Image.fromarray(edges()).save(tmp_path / "edges.png")
    told = ["--control", str(tmp_path / "edges.png"), "--control-scale", "0.7", "--steps", "2", "--seed", "3", "-q"]
    assert run(["generate", str(folder), "red", *told, "-o", str(tmp_path / "a.png")]) == 0
    expected = Pipeline(folder)("red", control=edges(), control_scale=0.7, num_inference_steps=2, seed=3).arrays[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), expected)


def test_what_does_not_steer_is_explained(make_pair: Any, sd3_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="nothing steers this bundle's denoiser"):
        Pipeline(sd3_bundle, threads=1)("red", control=edges())
    pipeline = Pipeline(make_pair("controlnet")[1], threads=1)
    with pytest.raises(ConfigError, match="control_scale should be from 0 to 10, not -1"):
        pipeline("red", control=edges(), control_scale=-1.0)
    with pytest.raises(ConfigError, match="control_scale says how much a control picture counts, and there is none"):
        pipeline("red", control_scale=0.5)
    with pytest.raises(ConfigError, match="height 64 is not that of the control, 32"):
        pipeline("red", control=edges(), height=64)
    with pytest.raises(ConfigError, match=r"control should be \(height, width, 3\) of uint8"):
        pipeline("red", control=edges()[..., 0])
