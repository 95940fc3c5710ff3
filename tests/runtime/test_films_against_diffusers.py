"""The same prompt and noise through diffusers and through the bundle: the same film."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from obsdiff_runtime.pipeline import Images, Pipeline

PROMPTS = ["a large red circle above a small blue square", "a small green triangle"]
UNWANTED = ["two yellow stars", ""]


def both(pair: tuple[Any, Path], **options: Any) -> tuple[Any, Images]:
    """(n, frames, height, width, 3) of diffusers, in 0..1, and what the runtime draws."""
    theirs, folder = pair
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 32, "width": 48, "num_frames": 9}
    given |= {"max_sequence_length": 5, "negative_prompt": UNWANTED} | options
    with torch.no_grad():
        seeded = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
        expected = theirs(PROMPTS, generator=seeded, output_type="np", **given).frames
    return expected, Pipeline(folder, threads=1)(PROMPTS, seed=[7, 8], noise_source="torch", **given)


def psnr(expected: Any, images: Images) -> float:
    error = np.mean((expected - images.arrays / 255) ** 2)
    return float(-10 * np.log10(error))


@pytest.mark.stage("runtime", kind="wan")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_frames": 1},
        {"num_frames": 5, "height": 48, "width": 16},
        {"num_frames": 21, "num_inference_steps": 2},
        {"guidance_scale": 1.0, "num_inference_steps": 7},
    ],
)
def test_the_same_noise_gives_the_same_film(wan_pair: tuple[Any, Path], options: dict[str, Any]) -> None:
    expected, films = both(wan_pair, **options)
    assert films.arrays.shape == expected.shape
    assert expected.std() > 0.02
    assert psnr(expected, films) > 58  # that of rounding to 256 values is 58.9
