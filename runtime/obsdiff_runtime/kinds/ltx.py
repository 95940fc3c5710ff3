"""LTX-Video: films of a text, or of a picture and a text.

Versions up to 0.9.1 are drawn by diffusers' LTXPipeline, those from 0.9.5 on by its LTXConditionPipeline.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from obsdiff_runtime.kinds import Conditions, Kind, Settings, skipped_whole
from obsdiff_runtime.kinds.encoding import encode_masked
from obsdiff_runtime.networks import Array, Networks
from obsdiff_runtime.openings import Given

TIMES: Final = "frame_times"
"""Input of the denoiser, (rows, f): when each latent frame begins, in seconds."""

RATE: Final = 25.0
"""Frames a second: of a film, unless diffusers' call is told another number."""

LITTLE: Final = 0.025
"""Of the noise."""

FRAME_SCALE: Final = 8
"""Frames in a latent frame behind the first."""


def encode(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """T5, which looks at padding, and which of its tokens are text."""
    ids, mask = networks.tokenizer("tokenizer").masked_ids(prompts, settings.max_sequence_length)
    states = networks.run("text_encoder", {"input_ids": ids}, ["last_hidden_state"])["last_hidden_state"]
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask.astype(np.float32)}


def encode_condition(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """T5, told what is padding, and which of its tokens are text."""
    states, mask = encode_masked(networks, "", prompts, settings.max_sequence_length)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def times(frames: int) -> Array:
    """(f,): of so many latent frames, as LTXPipeline counts: all as long, the first one too."""
    return np.arange(frames, dtype=np.float32) * np.float32(FRAME_SCALE / RATE)


def causal_times(frames: int) -> Array:
    """(f,): as LTXConditionPipeline counts: the first one is one frame long."""
    return np.maximum(np.arange(frames) * FRAME_SCALE + 1 - FRAME_SCALE, 0).astype(np.float32) * np.float32(1 / RATE)


def linear_quadratic(steps: int) -> Array:
    """(steps,): levels of noise from 1 on. The first half of the steps takes LITTLE away, the others ever more."""
    if steps < 2:
        return np.ones(1, np.float32)
    slow = steps // 2
    rate, quick = LITTLE / slow, np.arange(1, steps - slow)
    growth = (1 - LITTLE - rate * (steps - slow)) / (steps - slow) ** 2  # so that the last step ends at 0
    gone = np.concatenate([rate * np.arange(slow + 1), LITTLE + rate * quick + growth * quick**2])
    return (1 - gone).astype(np.float32)


LTX: Final = Kind(
    encode=encode,
    skipped=skipped_whole,  # as PixArt's
    even_sigmas=True,
    told_of_frames={TIMES: times},
    masks=True,
    given=Given(drawn="before"),
    fps=RATE,
    frame_scale=FRAME_SCALE,
)
LTX_CONDITION: Final = replace(
    LTX,
    encode=encode_condition,
    even_sigmas=False,
    levels=linear_quadratic,
    told_of_frames={TIMES: causal_times},
    given=Given(drawn="behind", stirred=0.15),
)
