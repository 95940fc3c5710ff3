"""Pictures that a denoiser is told beside the text: what diffusers draws with them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image

from obsdiff_runtime import cli
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.pipeline import Images, Pipeline
from obsdiff_runtime.references import FLUX2, KONTEXT, KONTEXT_SIZES, packed, pixels_of

PROMPTS = ["a large red circle above a small blue square", "a small green triangle"]
GIVEN = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 24, "width": 32}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    slope = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    return (slope + np.random.default_rng(seed).normal(0, 40, slope.shape)).clip(0, 255).astype(np.uint8)


def drawn(theirs: Any, references: list[np.ndarray], **told: Any) -> np.ndarray:
    """(n, height, width, 3) in 0..1, of diffusers told the very sizes that it is asked for."""
    images: Any = [Image.fromarray(each) for each in references] or None
    if type(theirs).__name__ == "FluxKontextPipeline":
        told |= {"_auto_resize": False, "max_area": told["height"] * told["width"]}
        images = images and images[0]
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        found: np.ndarray = theirs(image=images, generator=generator, output_type="np", **told).images
    return found


def same(expected: np.ndarray, images: Images) -> bool:
    return float(-10 * np.log10(np.mean((expected - images.arrays / 255) ** 2))) > 50  # rounding leaves 59 dB


@pytest.mark.stage("runtime", kind="kontext")
def test_kontext_draws_what_diffusers_draws_with_a_picture_and_without(kontext_pair: tuple[Any, Path]) -> None:
    theirs, folder = kontext_pair
    ours, given = Pipeline(folder, threads=1), GIVEN | {"max_sequence_length": 5}
    found = {}
    for name, references in {"none": [], "one": [picture(32, 48)]}.items():
        found[name] = ours(PROMPTS, seed=7, noise_source="torch", reference=references, **given)
        assert same(drawn(theirs, references, prompt=PROMPTS, **given), found[name])
    change = np.abs(found["one"].latents - found["none"].latents).max()
    assert change > 0.05  # of latents of unit variance: the picture was looked at
    with pytest.raises(ConfigError, match="2 reference pictures; this pipeline takes 1"):
        ours("red", reference=[picture(32, 32), picture(32, 32)])


def test_flux2_draws_what_diffusers_draws_with_several_pictures(flux2_pair: tuple[Any, Path]) -> None:
    """Of other sizes than what is drawn, and in this order; under guidance its rows are told them both times."""
    theirs, folder = flux2_pair
    ours, given = Pipeline(folder, threads=1), GIVEN | {"max_sequence_length": 60}
    pictures = [picture(64, 96), picture(92, 64, seed=1)]
    found = ours(PROMPTS, seed=7, noise_source="torch", reference=pictures, **given)
    assert same(drawn(theirs, pictures, prompt=PROMPTS, **given), found)
    none, turned = (
        ours(PROMPTS, seed=7, noise_source="torch", reference=each, **given) for each in ([], pictures[::-1])
    )
    assert np.abs(found.latents - none.latents).max() > 0.05
    assert np.abs(found.latents - turned.latents).max() > 1e-4  # a random denoiser hardly minds


def test_tokens_stand_where_diffusers_has_them(flux2_pair: tuple[Any, Path], kontext_pair: tuple[Any, Path]) -> None:
    sides = [(3, 5), (2, 4), (1, 1)]
    expected = flux2_pair[0]._prepare_image_ids([torch.zeros(1, 16, *each) for each in sides])[0]
    np.testing.assert_array_equal(FLUX2.places(sides), expected.numpy())
    own = kontext_pair[0]._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    own[:, 0] = 1  # as its prepare_latents does
    np.testing.assert_array_equal(KONTEXT.places(sides[:1]), own.numpy())
    latents = np.random.default_rng(0).standard_normal((4, 6, 10), dtype=np.float32)
    tokens = kontext_pair[0]._pack_latents(torch.from_numpy(latents)[None], 1, 4, 6, 10)[0]
    np.testing.assert_array_equal(packed(latents, 2), tokens.numpy())


def test_flux2_dev_draws_what_diffusers_draws_with_a_picture(flux2_dev_pair: tuple[Any, Path]) -> None:
    theirs, folder = flux2_dev_pair
    given = GIVEN | {"max_sequence_length": 60}
    found = Pipeline(folder, threads=1)(PROMPTS, seed=7, noise_source="torch", reference=picture(64, 96), **given)
    assert same(drawn(theirs, [picture(64, 96)], prompt=PROMPTS, **given), found)


def test_drawings_that_are_told_pictures_of_other_shapes_do_not_share_a_run(kontext_pair: tuple[Any, Path]) -> None:
    """Places are those of all rows: as many tokens alone are not enough."""
    ours = Pipeline(kontext_pair[1], threads=1)
    shapes = {
        size: ours.begin("red", reference=picture(*size), num_inference_steps=1)[0].shapes
        for size in ((32, 48), (48, 32), (24, 64))
    }
    assert len(set(shapes.values())) == 3


@pytest.mark.parametrize("size", [(1200, 801), (640, 480), (300, 2000), (1023, 1031), (97, 64)])
def test_a_picture_is_fitted_as_diffusers_does(size: tuple[int, int]) -> None:
    width, height = size
    image = Image.fromarray(picture(height, width))
    assert set(KONTEXT_SIZES) == {tuple(each) for each in PREFERRED_KONTEXT_RESOLUTIONS}

    shape = width / height
    _, wide, high = min((abs(shape - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    expected = VaeImageProcessor(vae_scale_factor=16).resize(image, high // 16 * 16, wide // 16 * 16)
    np.testing.assert_array_equal(pixels_of(image, 16, KONTEXT), np.asarray(expected))

    processor = Flux2ImageProcessor(vae_scale_factor=16)
    smaller = processor._resize_to_target_area(image) if width * height > 1024**2 else image
    wide, high = (side // 16 * 16 for side in smaller.size)
    wanted = processor.preprocess(smaller, height=high, width=wide, resize_mode="crop")[0].permute(1, 2, 0)
    np.testing.assert_allclose(pixels_of(image, 16, FLUX2) / 127.5 - 1, wanted.numpy(), atol=1e-6)


@pytest.mark.parametrize("held", [1, 6], ids=["upright", "on its side"])
def test_the_command_tells_pictures_of_files_in_their_order(
    flux2_pair: tuple[Any, Path], held: int, tmp_path: Path
) -> None:
    """As a camera says that it was held; what is no whole token is cut off."""
    pixels = [picture(67, 98), picture(92, 64, seed=1)]
    for index, each in enumerate(pixels):
        exif = Image.Exif()
        exif[0x0112] = held  # orientation
        Image.fromarray(each).save(tmp_path / f"{index}.png", exif=exif)
    asked = ["--steps", "2", "--seed", "7", "--height", "24", "--width", "32", "--max-sequence-length", "60"]
    told = [word for index in range(2) for word in ("--reference", str(tmp_path / f"{index}.png"))]
    output = str(tmp_path / "out.png")
    assert cli.run(["generate", str(flux2_pair[1]), "red", "-o", output, *told, *asked, "--threads", "1", "-q"]) == 0
    ours = Pipeline(flux2_pair[1], threads=1)
    upright = [np.rot90(each, 0 if held == 1 else -1) for each in pixels]
    references = [ours.fit(Image.fromarray(each)) for each in upright]
    given = GIVEN | {"num_inference_steps": 2, "max_sequence_length": 60}
    expected = ours("red", seed=7, reference=references, **given)
    np.testing.assert_array_equal(np.asarray(Image.open(output)), expected.arrays[0])


def test_what_is_no_reference_is_explained(kontext_pair: tuple[Any, Path], sd3_bundle: Path) -> None:
    ours = Pipeline(kontext_pair[1], threads=1)
    with pytest.raises(ConfigError, match=r"reference of 30 x 32 pixels; its sides should be multiples of 4"):
        ours("red", reference=picture(32, 30))
    with pytest.raises(ConfigError, match="give one of them"):
        ours("red", reference=picture(32, 32), image=picture(32, 32))
    with pytest.raises(ConfigError, match="the model reads no fewer than 4"):
        ours.fit(Image.fromarray(picture(3, 90)))
    assert ours.fit(Image.fromarray(picture(35, 90)), own_size=True).pixels.shape == (32, 88, 3)
    with pytest.raises(ConfigError, match="is told no pictures"):
        Pipeline(sd3_bundle, threads=1)("red", reference=picture(32, 32))
