import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from obsdiff.metrics import mean_squared_error, psnr_db, ssim, wilson

Picture = NDArray[np.uint8]


def picture(seed: int, height: int = 16, width: int = 19) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ssim_window_by_window(a: Picture, b: Picture) -> float:
    """The paper's formulas, one window at a time, with the two-dimensional Gaussian written out."""
    offsets = range(-5, 6)
    weights = np.array([[math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in offsets] for i in offsets])
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(3):
        for top in range(a.shape[0] - 10):
            for left in range(a.shape[1] - 10):
                x = a[top : top + 11, left : left + 11, channel].astype(float)
                y = b[top : top + 11, left : left + 11, channel].astype(float)
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                cov = (weights * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def test_ssim_is_the_papers_formula() -> None:
    a = picture(0)
    noise = np.random.default_rng(1).normal(0, 20, a.shape)
    b = np.clip(a + noise, 0, 255).astype(np.uint8)
    assert ssim(a, b) == pytest.approx(ssim_window_by_window(a, b), abs=1e-9)


def test_psnr_and_ssim_are_those_of_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics.functional.image")
    a = picture(3, 24, 31)
    b = np.clip(a + np.random.default_rng(4).normal(0, 30, a.shape), 0, 255).astype(np.uint8)
    x, y = (torch.from_numpy(image.astype(np.float64)).permute(2, 0, 1)[None] for image in (a, b))
    ratio = torchmetrics.peak_signal_noise_ratio(x, y, data_range=255.0)
    assert psnr_db(a, b) == pytest.approx(float(ratio), rel=1e-6)
    # torchmetrics also averages windows that it completes by reflection; ours, as the paper's, lie inside the picture.
    _, everywhere = torchmetrics.structural_similarity_index_measure(x, y, data_range=255.0, return_full_image=True)
    assert ssim(a, b) == pytest.approx(float(everywhere[..., 5:-5, 5:-5].mean()), abs=1e-9)


def test_a_picture_is_entirely_similar_to_itself() -> None:
    assert ssim(picture(2), picture(2)) == pytest.approx(1, abs=1e-12)
    assert psnr_db(picture(2), picture(2)) is None
    assert mean_squared_error(picture(2), picture(2)) == 0


def test_psnr_of_one_level_everywhere_is_the_known_48_decibels() -> None:
    a = np.full((12, 12, 3), 100, np.uint8)
    assert psnr_db(a, a + np.uint8(1)) == pytest.approx(20 * math.log10(255))


def test_differences_of_bytes_do_not_wrap_around() -> None:
    black, white = np.zeros((12, 12, 3), np.uint8), np.full((12, 12, 3), 255, np.uint8)
    assert mean_squared_error(black, white) == mean_squared_error(white, black) == 1


def test_pictures_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="different sizes"):
        ssim(picture(0), picture(0, height=17))
    with pytest.raises(ValueError, match="11x11"):
        ssim(picture(0, height=10), picture(0, height=10))


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 17), (50, 50), (90, 200)])
def test_wilson_bounds_are_where_the_score_test_just_accepts(successes: int, trials: int) -> None:
    share = successes / trials
    for bound in wilson(successes, trials):
        assert 0 <= bound <= 1
        if 0 < bound < 1:
            assert abs(share - bound) / math.sqrt(bound * (1 - bound) / trials) == pytest.approx(1.959964, abs=1e-5)


def test_wilson_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no share"):
        wilson(0, 0)
