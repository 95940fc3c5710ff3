"""How alike two pictures are, and how sure a counted share is.

Pictures are (height, width, 3) uint8; their range is 255.
"""

import math
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

Picture = NDArray[np.uint8]

PEAK: Final = 255.0
WINDOW: Final = 11
WINDOW_SIGMA: Final = 1.5
NORMAL_95: Final = 1.959963984540054


def mean_squared_error(a: Picture, b: Picture) -> float:
    """Mean of (a - b)^2 over pixels and channels, in units of the full range: 0 to 1."""
    _require_same_shape(a, b)
    return float(np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))) / PEAK**2


def psnr_db(a: Picture, b: Picture) -> float | None:
    """Peak signal-to-noise ratio in decibels; None where the pictures are identical, for which it is infinite."""
    error = mean_squared_error(a, b)
    return None if error == 0 else -10 * math.log10(error)


def ssim(a: Picture, b: Picture) -> float:
    """Structural similarity: 1 for identical pictures.

    Wang, Bovik, Sheikh and Simoncelli 2004, eq. 13 and section III-C: an 11x11 Gaussian window of sigma 1.5 that sums
    to one, K1 = 0.01, K2 = 0.03, the mean over all windows that lie inside the picture. Each colour channel by itself,
    then their mean.

    Raises:
        ValueError: the pictures differ in size or are smaller than the window.
    """
    _require_same_shape(a, b)
    if min(a.shape[:2]) < WINDOW:
        raise ValueError(
            f"SSIM needs pictures of at least {WINDOW}x{WINDOW} pixels, these have {a.shape[0]}x{a.shape[1]}"
        )
    x, y = (torch.from_numpy(picture.astype(np.float64)).permute(2, 0, 1) for picture in (a, b))  # (3, h, w)
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _windowed(torch.stack([x, y, x * x, y * y, x * y]))
    variance_x = mean_xx - mean_x**2
    variance_y = mean_yy - mean_y**2
    covariance = mean_xy - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return float(similarity.mean())


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share that was counted: Wilson 1927, the score interval.

    Raises:
        ValueError: there were no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} of {trials} is no share")
    share, z2 = successes / trials, NORMAL_95**2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = NORMAL_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # At 0 and at 1 the bound is exact; rounding must not put it a hair outside.
    return (0.0 if successes == 0 else middle - half, 1.0 if successes == trials else middle + half)


def _windowed(maps: torch.Tensor) -> torch.Tensor:
    """Gaussian-weighted means over every whole window: (n, 3, h, w) -> (n, 3, h - 10, w - 10)."""
    offsets = torch.arange(WINDOW, dtype=maps.dtype) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * WINDOW_SIGMA**2))
    weights /= weights.sum()
    flat = maps.flatten(0, 1).unsqueeze(1)  # (n * 3, 1, h, w)
    flat = functional.conv2d(flat, weights.view(1, 1, WINDOW, 1))
    flat = functional.conv2d(flat, weights.view(1, 1, 1, WINDOW))
    return flat.view(*maps.shape[:2], *flat.shape[-2:])


def _require_same_shape(a: Picture, b: Picture) -> None:
    if a.shape != b.shape:
        raise ValueError(f"pictures of different sizes cannot be compared: {a.shape} and {b.shape}")
