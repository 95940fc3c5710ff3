"""Qwen-Image and Qwen-Image-Edit."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from obsdiff_runtime import seeing
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.kinds import PACKED, Conditions, Kind, Settings, packed_channels, skipped_part
from obsdiff_runtime.kinds.encoding import encode_masked
from obsdiff_runtime.networks import Array, Networks
from obsdiff_runtime.references import QWEN_EDIT, QWEN_EDIT_PLUS

TEMPLATE: Final = "prompt_template_encode"  # of diffusers' pipeline; in the configuration of its text encoder
DROPPED: Final = "prompt_template_encode_start_idx"  # likewise: tokens of the template in front of the prompt


def encode(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """Qwen2.5-VL on the prompt inside of the template that the bundle has of diffusers' pipeline, and where text is.

    The template's first tokens are left out of what it makes of them; what is padding is set to zero.
    """
    config = networks.bundle.config("text_encoder")
    written = [str(config[TEMPLATE]).format(prompt) for prompt in prompts]
    # padded behind, for the pipeline drops whatever stands in front
    states, mask = encode_masked(
        networks, "", written, int(config[DROPPED]) + settings.max_sequence_length, pads_left=False
    )
    return _behind_template(config, states, mask)


def encode_edit(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """As Qwen-Image's, with what Qwen2.5-VL's vision made of the pictures among the text.

    Where the template has no place for one, they stand in front of the prompt, each behind its number. Their tokens
    come on top of the length that is asked for.

    Raises:
        ConfigError: a prompt holds the mark of a picture, or there is no room for what stands around pictures.
    """
    config = networks.bundle.config("text_encoder")
    template, count = str(config[TEMPLATE]), sum(len(each.states) for each in settings.seen)
    if any(seeing.MARK in prompt for prompt in prompts):
        raise ConfigError(f"a prompt may not hold {seeing.MARK}, which stands for pictures")
    before = "".join(f"Picture {index + 1}: {seeing.PICTURE}" for index in range(len(settings.seen)))
    before = "" if seeing.MARK in template else before
    written = [seeing.written(template.format(before + prompt), settings.seen) for prompt in prompts]
    length = int(config[DROPPED]) + settings.max_sequence_length + count
    ids, mask = networks.tokenizer("tokenizer").masked_ids(written, length, pads_left=False)
    image = int(config["image_token_id"])
    if ((ids == image).sum(axis=1) != count).any():
        raise ConfigError(
            f"max_sequence_length {settings.max_sequence_length} leaves no room for what is around pictures"
        )
    inputs = {"input_ids": ids, "attention_mask": mask, **seeing.told(ids, image, settings.seen)}
    states = networks.run("text_encoder", inputs, ["last_hidden_state"])["last_hidden_state"]
    return _behind_template(config, states, mask.astype(np.float32))


def _behind_template(config: Mapping[str, Any], states: Array, mask: Array) -> Conditions:
    """What Qwen-Image's denoiser is told of hidden states (n, t, d) and of where text is, (n, t)."""
    dropped = int(config[DROPPED])
    states, mask = states[:, dropped:], mask[:, dropped:]
    return {"encoder_hidden_states": states * mask[..., None], "encoder_hidden_states_mask": mask}


def _lengths_of_patches(latents: Array) -> Array:
    """Over the channels and pixels of each packed token, (c, h, w) -> (h, w)."""
    channels, height, width = latents.shape
    split = latents.reshape(channels, height // PACKED, PACKED, width // PACKED, PACKED)
    lengths = np.sqrt(np.square(split).sum(axis=(0, 2, 4)))
    return np.asarray(lengths.repeat(PACKED, axis=0).repeat(PACKED, axis=1))


QWEN: Final = Kind(
    encode=encode,
    patch=lambda config: PACKED,
    channels=packed_channels,
    skipped=skipped_part,
    even_sigmas=True,
    kept_lengths=_lengths_of_patches,
)
QWEN_IMAGE_EDIT: Final = replace(QWEN, encode=encode_edit, references=QWEN_EDIT)
QWEN_IMAGE_EDIT_PLUS: Final = replace(QWEN_IMAGE_EDIT, references=QWEN_EDIT_PLUS)
