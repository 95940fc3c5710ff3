"""Chroma."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from obsdiff_runtime.kinds import PACKED, Conditions, Kind, Settings, packed_channels, skipped_part
from obsdiff_runtime.kinds.encoding import encode_masked
from obsdiff_runtime.networks import Networks


def encode(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """T5, told what is padding; the denoiser looks at one token of it."""
    length = settings.max_sequence_length
    states, mask = encode_masked(networks, "", prompts, length)
    shown = np.arange(length) <= mask.sum(axis=1, keepdims=True)
    return {"encoder_hidden_states": states, "encoder_attention_mask": shown.astype(np.float32)}


CHROMA: Final = Kind(
    encode=encode,
    patch=lambda config: PACKED,
    channels=packed_channels,
    skipped=skipped_part,
    even_sigmas=True,
)
