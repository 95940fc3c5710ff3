"""Pictures that films begin or end with: what the denoiser is told of one, or what is put in place of what it draws.

Shapes: c latent channels, f latent frames of the film, h w their sides.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from obsdiff_runtime.autoencoder import FRAME_SCALE, Pixels
from obsdiff_runtime.networks import Array

STATES: Final = "opening_states"
"""Input of the denoiser, (rows, FRAME_SCALE + c, f, h, w): which frames are given, and latents of a film of them."""

SEEN: Final = "encoder_hidden_states_image"
"""Likewise where there is an image encoder: what that makes of the picture, (rows, tokens, width), or of the first and
the last one, (rows, 2, tokens, width), where `ends` says so."""

MASK: Final = "frame_mask"
"""Input of a denoiser that is told a timestep for each frame, (rows, f): 1 where a frame is drawn, and 0 where it is
given, of which the timestep is 0. At every step latents that are given stand in place of what is drawn."""

PROCESSOR: Final = "image_processor/preprocessor_config.json"
"""In a bundle: what an image encoder's pictures are made into."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """How latents of a picture stand in place of a film's first ones.

    Attributes:
        drawn: when they are drawn from what the encoder gives, with the film's own source of noise: "before" that of
            the film, or "behind"; None: they are the mean of it.
        stirred: noise that is put on them at each step, as a multiple of the square of the step's level of noise.
    """

    drawn: Literal["before", "behind"] | None = None
    stirred: float = 0.0


MEAN: Final = Given()


def ends(config: Mapping[str, Any]) -> bool:
    """Whether a denoiser of that configuration counts on a picture that the film ends with, too."""
    return bool(config.get("pos_embed_seq_len"))


def states(latents: Array, *, closed: bool = False) -> Array:
    """(FRAME_SCALE + c, f, h, w) of (c, f, h, w), the latents of a film of which the first frame is given.

    `closed` says whether the last one is, too. The first latent frame stands for one frame, each other for FRAME_SCALE.
    """
    given = np.zeros((FRAME_SCALE, *latents.shape[1:]), np.float32)
    given[:, 0] = 1
    given[-1, -1] = 1 if closed else given[-1, -1]
    return np.concatenate([given, latents])


def frame_mask(frames: int, *, given: bool) -> Array:
    """(f,) of a film of which the first frame alone is given, or none."""
    found = np.ones(frames, np.float32)
    found[0] = not given
    return found


def pixel_values(picture: Pixels, config: Mapping[str, Any]) -> Array:
    """What CLIP's image encoder reads of a picture, (1, 3, side, side): its middle, of unit variance.

    Args:
        picture: (height, width, 3).
        config: of its processor in transformers.
    """
    from PIL import Image

    shortest = int(config["size"]["shortest_edge"])
    sides = picture.shape[:2]
    height, width = (int(shortest * side / min(sides)) for side in sides)
    crop = config["crop_size"]
    resized = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling(config["resample"])))
    top, left = (height - crop["height"]) // 2, (width - crop["width"]) // 2
    cut = resized[top : top + crop["height"], left : left + crop["width"]].astype(np.float32)
    mean, deviation = (np.array(config[name], np.float32) for name in ("image_mean", "image_std"))
    unit = (cut * np.float32(config["rescale_factor"]) - mean) / deviation
    return unit.transpose(2, 0, 1)[None]
