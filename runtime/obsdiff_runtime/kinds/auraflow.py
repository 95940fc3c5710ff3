"""AuraFlow."""

from collections.abc import Sequence
from math import isqrt
from typing import Final

from obsdiff_runtime.kinds import Conditions, Kind, Settings, skipped_part
from obsdiff_runtime.kinds.encoding import encode_masked
from obsdiff_runtime.networks import Networks


def encode(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """T5, told what is padding; what it makes of padding is set to zero."""
    states, mask = encode_masked(networks, "", prompts, settings.max_sequence_length)
    return {"encoder_hidden_states": states * mask[..., None]}


AURAFLOW: Final = Kind(
    encode=encode,
    largest=lambda config: isqrt(int(config["pos_embed_max_size"])) * int(config["patch_size"]),
    skipped=skipped_part,  # diffusers has no pipeline of AuraFlow that changes an image; as SD3's
)
