"""FLUX.2, klein and dev."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from obsdiff_runtime.kinds import PROMPT_TEMPLATE, Conditions, Kind, Settings, skipped_part
from obsdiff_runtime.kinds.encoding import encode_masked
from obsdiff_runtime.networks import Networks
from obsdiff_runtime.references import FLUX2 as REFERENCES


def encode_klein(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """Hidden states of a chat model, told what is padding, though the denoiser looks at it."""
    before, behind = networks.bundle.config("text_encoder")[PROMPT_TEMPLATE]
    written = [f"{before}{prompt}{behind}" for prompt in prompts]
    length = settings.max_sequence_length
    states, _ = encode_masked(networks, "", written, length, output="prompt_embeds", special=False)
    return {"encoder_hidden_states": states}


def encode_dev(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """As klein's, of prompts without the mark that stands for an image."""
    return encode_klein(networks, [prompt.replace("[IMG]", "") for prompt in prompts], negative, settings)


def _shift(image_tokens: int, steps: int) -> float:
    """Lines over the tokens for 10 and for 200 steps, and between them a line over the steps; diffusers' numbers."""
    at_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * image_tokens + 1.89833333
    return at_200 + (at_10 - at_200) / 190 * (200 - steps)


FLUX2_KLEIN: Final = Kind(
    encode=encode_klein,
    patch=lambda config: 1,  # its latents are patches already
    skipped=skipped_part,  # diffusers has no pipeline of FLUX.2 that changes an image by a strength; as FLUX.1's
    even_sigmas=True,
    shift=_shift,
    references=REFERENCES,
)
FLUX2: Final = replace(FLUX2_KLEIN, encode=encode_dev)
