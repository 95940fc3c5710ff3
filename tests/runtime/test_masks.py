"""Pictures of which a part is drawn anew, against diffusers' pipelines that inpaint."""

import io
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from obsdiff_runtime.bundle import Bundle
from obsdiff_runtime.cli import run
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.masks import mask_of, on_latents
from obsdiff_runtime.pipeline import Pipeline

HEIGHT, WIDTH = 32, 48
INPAINTED = ("sd", "sdxl", "flux", "qwen", "zimage")
"""Kinds of which diffusers has a pipeline that inpaints. That of SD3 keeps nothing of pictures whose latents have other
than 16 channels, and that of Chroma asks for a guidance that its denoiser has not.
"""

# diffusers' Euler hands torch tensors to numpy functions
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def picture() -> np.ndarray:
    slope = np.linspace(0, 255, HEIGHT * WIDTH * 3).reshape(HEIGHT, WIDTH, 3)
    return (slope + np.random.default_rng(0).normal(0, 20, slope.shape)).clip(0, 255).astype(np.uint8)


def mask() -> np.ndarray:
    """Of an odd shape, and grey at its edge."""
    redrawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    redrawn[5:27, 9:38] = 127
    redrawn[8:22, 12:37] = 128
    redrawn[12:20, 20:30] = 255
    return redrawn


def inpainted(theirs: Any, **told: Any) -> np.ndarray:
    """Of diffusers, (1, HEIGHT, WIDTH, 3) in 0..1."""
    name = type(theirs).__name__
    kind = getattr(diffusers, name.replace("Pipeline", "InpaintPipeline"))
    given = {"guidance_scale": 3.0} if name != "QwenImagePipeline" else {"true_cfg_scale": 3.0, "negative_prompt": ""}
    if not name.startswith(("StableDiffusionP", "StableDiffusionXL")):
        given["max_sequence_length"] = 80 if name.startswith("ZImage") else 5
    found: np.ndarray = kind(**theirs.components)(
        "a red circle",
        image=Image.fromarray(picture()),
        mask_image=Image.fromarray(mask()),
        height=HEIGHT,
        width=WIDTH,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        **given | told,
    ).images
    return found


def ours(folder: Path, **told: Any) -> np.ndarray:
    pipeline = Pipeline(folder, threads=1)
    given = {"seed": 7, "noise_source": "torch", "guidance_scale": 3.0, "image": picture(), "mask": mask()}
    if pipeline.bundle.manifest.pipeline_class.startswith("ZImage"):
        given["max_sequence_length"] = 80
    return pipeline("a red circle", **given | told).arrays / 255


def psnr(expected: np.ndarray, found: np.ndarray) -> float:
    return float(-10 * np.log10(np.square(expected - found).mean()))


@pytest.mark.parametrize("pair", INPAINTED, indirect=True)
@pytest.mark.parametrize(("strength", "steps"), [(1.0, 4), (0.6, 5)])
def test_a_part_of_a_picture_is_drawn_anew_as_diffusers_does(
    pair: tuple[Any, Path], strength: float, steps: int
) -> None:
    theirs, folder = pair
    with torch.no_grad():
        expected = inpainted(theirs, strength=strength, num_inference_steps=steps)
    found = ours(folder, strength=strength, num_inference_steps=steps)
    assert psnr(expected, found) > 50
    assert psnr(expected, ours(folder, strength=strength, num_inference_steps=steps, mask=None)) < 30


@pytest.mark.parametrize(
    ("class_name", "options"),
    [
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("DDPMScheduler", {}),
        ("LCMScheduler", {}),
    ],
)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_what_stays_has_the_noise_of_each_sampler_s_steps(
    sd_pair: tuple[Any, Path],
    monkeypatch: pytest.MonkeyPatch,
    class_name: str,
    options: dict[str, Any],
    strength: float,
) -> None:
    theirs, folder = sd_pair
    scheduler = getattr(diffusers, class_name).from_config(theirs.scheduler.config, **options)
    monkeypatch.setattr(theirs, "scheduler", scheduler)
    monkeypatch.setattr(Bundle, "scheduler", lambda self: dict(scheduler.config) | {"_class_name": class_name})
    with torch.no_grad():
        expected = inpainted(theirs, strength=strength, num_inference_steps=6)
    assert psnr(expected, ours(folder, strength=strength, num_inference_steps=6)) > 50


def test_by_default_nothing_is_left_of_what_is_drawn_anew_and_the_rest_stays(sd_pair: tuple[Any, Path]) -> None:
    pipeline, redrawn = Pipeline(sd_pair[1], threads=1), mask() >= 128
    given = {"image": picture(), "num_inference_steps": 3, "seed": 3}
    found = pipeline("red", mask=redrawn, **given)
    np.testing.assert_array_equal(found.latents, pipeline("red", mask=mask(), strength=1, **given).latents)
    other = pipeline("blue", mask=redrawn, **given).latents
    cells = on_latents(redrawn, found.arrays.shape[1] // found.latents.shape[2], HEIGHT, WIDTH)
    assert np.array_equal(found.latents[..., ~cells], other[..., ~cells])
    assert (found.latents != other)[..., cells].mean() > 0.9
    drawings = pipeline.begin(["red", "blue"], mask=redrawn, **given)
    while not drawings[0].is_over:
        pipeline.step(drawings)
    np.testing.assert_allclose(drawings[0].sample, found.latents[0], atol=1e-5)  # in a batch, too


def test_the_command_reads_a_mask_of_another_size(sd_pair: tuple[Any, Path], tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    Image.fromarray(mask()).resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.NEAREST).save(tmp_path / "mask.png")
    told = ["--image", str(tmp_path / "a.png"), "--mask", str(tmp_path / "mask.png"), "--steps", "2", "--seed", "3"]
    assert run(["generate", str(sd_pair[1]), "red", *told, "-o", str(tmp_path / "b.png"), "-q"]) == 0
    pipeline = Pipeline(sd_pair[1])
    cut = mask_of(Image.open(tmp_path / "mask.png"), WIDTH, HEIGHT)
    expected = pipeline("red", image=picture(), mask=cut, num_inference_steps=2, seed=3).arrays[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "b.png")), expected)
    assert run(["generate", str(sd_pair[1]), "red", *told[2:], "-o", str(tmp_path / "c.png"), "-q"]) == 2


def test_a_mask_is_what_is_transparent_or_else_what_is_white() -> None:
    white = np.zeros((4, 6), np.uint8)
    white[1:3, 2:5] = 255
    wanted = white > 0
    clear = Image.fromarray(np.dstack([np.full((4, 6, 3), 9, np.uint8), 255 - white]))
    opaque = Image.fromarray(np.dstack([white] * 3 + [np.full((4, 6), 255, np.uint8)]))
    palette = Image.fromarray(white).convert("P")
    for image in (Image.fromarray(white), Image.fromarray(wanted), clear, opaque, palette, clear.convert("LA")):
        np.testing.assert_array_equal(mask_of(image, 6, 4), wanted)
    file = io.BytesIO()
    clear.quantize().save(file, "png", transparency=clear.quantize().getpixel((2, 1)))
    np.testing.assert_array_equal(mask_of(Image.open(file), 6, 4), wanted)
    assert mask_of(Image.fromarray(white).resize((60, 40), Image.Resampling.NEAREST), 6, 4)[1:3, 2:5].all()


def test_what_is_no_mask_is_explained(sd_pair: tuple[Any, Path], wan_pair: tuple[Any, Path]) -> None:
    pipeline = Pipeline(sd_pair[1], threads=1)
    with pytest.raises(ConfigError, match=r"a mask says which part of an image is changed, and there is no image"):
        pipeline("red", mask=mask())
    for wrong in (mask()[:16], mask().astype(np.float32), mask()[..., None]):
        with pytest.raises(ConfigError, match=r"mask should be \(32, 48\) of bool or uint8, as the image, not"):
            pipeline("red", image=picture(), mask=wrong)
    with pytest.raises(ConfigError, match=r"mask: nothing is drawn anew"):
        pipeline("red", image=picture(), mask=np.zeros((HEIGHT, WIDTH), bool))
    with pytest.raises(ConfigError, match=r"strength should be above 0"):
        pipeline("red", image=picture(), mask=mask(), strength=0.0)
