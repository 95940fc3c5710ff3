"""Wan: films of a text, or of a picture and a text."""

from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from typing import Final

from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.kinds import Conditions, Kind, Settings, drawn_channels, skipped_whole
from obsdiff_runtime.kinds.encoding import encode_masked
from obsdiff_runtime.networks import Networks


def encode(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """UMT5, told what is padding, which becomes zeros.

    As diffusers without ftfy, which it uses where that is installed: marks of HTML are read and spaces joined.
    """
    inputs = networks.bundle.component("transformer").inputs
    (tokens,) = (port.shape[1] for port in inputs if port.name == "encoder_hidden_states")
    if isinstance(tokens, int) and tokens != settings.max_sequence_length:
        asked = settings.max_sequence_length
        raise ConfigError(f"max_sequence_length is fixed to {tokens} in this bundle's graph, not {asked}")
    written = [" ".join(unescape(unescape(prompt)).split()) for prompt in prompts]
    states, mask = encode_masked(networks, "", written, settings.max_sequence_length)
    return {"encoder_hidden_states": states * mask[..., None]}


WAN: Final = Kind(
    encode=encode,
    patch=lambda config: int(config["patch_size"][-1]),
    channels=drawn_channels,
    skipped=skipped_whole,  # as PixArt's
)
WAN_OPENING: Final = replace(WAN, opens=True)
