"""Denoisers that are told the guidance scale, so that no second run guides them."""

from collections.abc import Iterable
from typing import Final

import numpy as np

from obsdiff_runtime.bundle import TensorEntry
from obsdiff_runtime.kinds import Conditions
from obsdiff_runtime.networks import Array

GUIDANCE: Final = "guidance"
GUIDANCE_WAVES: Final = "timestep_cond"
"""Inputs of denoisers that are told the scale: as it is, or as sines and cosines."""


def told_scale(inputs: Iterable[TensorEntry], scale: float) -> Conditions:
    """What the denoiser is told of one image's guidance scale, () or (width,), where it has an input for it."""
    told: Conditions = {}
    for entry in inputs:
        if entry.name == GUIDANCE:
            told[entry.name] = np.array(scale, dtype=np.float32)
        elif entry.name == GUIDANCE_WAVES:
            told[entry.name] = _waves(1000 * (scale - 1), int(entry.shape[1]))
    return told


def _waves(value: float, width: int) -> Array:
    """(width,): sines, then cosines, of frequencies from 1 to 1 / 10000; Luo et al. 2023 tell the scale so."""
    half = width // 2
    angles = np.float32(value) * np.exp(np.arange(half, dtype=np.float32) * -np.float32(np.log(10000) / (half - 1)))
    return np.pad(np.concatenate([np.sin(angles), np.cos(angles)]), (0, width % 2))
