"""Denoisers that are told what stays of a picture, against diffusers' pipelines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from obsdiff_runtime.pipeline import Pipeline

HEIGHT, WIDTH = 32, 48
KINDS = ("inpaint", "inpaint_xl", "fill")

# diffusers' Euler hands torch tensors to numpy functions
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def mask() -> np.ndarray:
    redrawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    redrawn[7:22, 12:37] = 255
    return redrawn


def both(pair: tuple[Any, Path], *, shown: bool = True, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Latents, (2, c, h, w), of diffusers and of the runtime; where nothing is shown, all is drawn anew."""
    theirs, folder = pair
    prompts, given = ["a red circle", "a dog"], {"num_inference_steps": 4, "guidance_scale": 3.0, **options}
    flux = type(theirs).__name__.startswith("Flux")
    given |= {"max_sequence_length": 5} if flux else {}
    image = Image.fromarray(picture()) if shown else torch.full((1, 3, HEIGHT, WIDTH), 0.5)
    redrawn = Image.fromarray(mask()) if shown else torch.ones(1, HEIGHT, WIDTH)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    own: dict[str, Any] = {"image": picture(), "mask": mask()}
    start = {}
    if not shown:  # diffusers draws latents of a picture before the noise
        scale = theirs.vae_scale_factor
        noise = np.random.default_rng(1).standard_normal((2, 4, HEIGHT // scale, WIDTH // scale), np.float32)
        own = {"height": HEIGHT, "width": WIDTH, "latents": noise}
        latents = torch.from_numpy(noise)
        start = {"latents": theirs._pack_latents(latents, *latents.shape) if flux else latents}
    with torch.no_grad():
        # diffusers gives one picture latents of its own for each generator where there are as many pictures
        images = [image] * 2 if shown else image.expand(2, -1, -1, -1)
        masks = [redrawn] * 2 if shown else redrawn.expand(2, -1, -1)[:, None]
        size = {"height": HEIGHT, "width": WIDTH, "strength": 1.0}
        expected = theirs(
            prompts,
            image=images,
            mask_image=masks,
            generator=generators,
            output_type="latent",
            **size | given | start,
        )[0]
        if flux:
            expected = theirs._unpack_latents(expected, HEIGHT, WIDTH, theirs.vae_scale_factor)
    found = Pipeline(folder, threads=1)(prompts, seed=[7, 8], noise_source="torch", **own, **given).latents
    return expected.numpy(), found


def same(expected: np.ndarray, found: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() < 1e-4 * np.abs(expected).max())


@pytest.mark.stage("runtime")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"strength": 0.6, "num_inference_steps": 5}])
def test_a_part_of_a_picture_is_drawn_anew_by_a_denoiser_that_is_told_the_rest(
    kind: str, options: dict[str, Any], make_pair: Any
) -> None:
    expected, found = both(make_pair(kind), **options)
    assert same(expected, found)
    pipeline = Pipeline(make_pair(kind)[1], threads=1)
    other = pipeline("a red circle", image=picture(), mask=255 - mask(), seed=[7], noise_source="torch").latents
    assert not same(found[:1], other)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_picture_all_is_drawn_anew(kind: str, make_pair: Any) -> None:
    expected, found = both(make_pair(kind), shown=False)
    assert same(expected, found)
