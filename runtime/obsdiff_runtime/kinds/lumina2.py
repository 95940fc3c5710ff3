"""Lumina-Image 2.0."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from obsdiff_runtime.kinds import Conditions, Kind, Settings, skipped_part
from obsdiff_runtime.kinds.encoding import encode_masked
from obsdiff_runtime.networks import Array, Networks

SYSTEM_PROMPT: Final = "system_prompt"  # likewise: what prompts stand behind


def encode(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """Gemma-2 up to the layer before its last, told what is padding, and which tokens are not.

    Prompts, not negative ones, stand behind the system prompt that the bundle has of diffusers' pipeline; it counts as
    text.
    """
    prompt = networks.bundle.config("text_encoder")[SYSTEM_PROMPT]
    written = list(prompts) if negative else [f"{prompt} <Prompt Start> {text}" for text in prompts]
    output = f"hidden_states.{networks.hidden_layers('text_encoder')}"
    states, mask = encode_masked(networks, "", written, settings.max_sequence_length, output=output, pads_left=False)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def _lengths_of_rows(latents: Array) -> Array:
    """Of each row of pixels, (c, h, w) -> (c, h, 1)."""
    return np.asarray(np.linalg.norm(latents, axis=-1, keepdims=True))


LUMINA2: Final = Kind(
    encode=encode,
    largest=lambda config: int(min(config["axes_lens"][1:])) * int(config["patch_size"]),
    skipped=skipped_part,  # as AuraFlow's
    even_sigmas=True,
    counted=lambda channels, tokens: channels,  # diffusers' pipeline counts them in place of tokens
    kept_lengths=_lengths_of_rows,
)
