"""Sana and Sana-Sprint."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from obsdiff_runtime.kinds import Conditions, Kind, Settings, skipped_part, skipped_whole
from obsdiff_runtime.kinds.encoding import encode_masked
from obsdiff_runtime.networks import Networks

INSTRUCTION: Final = "complex_human_instruction"  # in the configuration of its text encoder: lines


def encode(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """Gemma-2, told what is padding, and which tokens are not.

    Prompts, not negative ones, stand behind the instruction that the bundle has of diffusers' pipeline. Of its tokens
    the first is kept, and of the prompt's all but the first: as many as negative ones have. The rest is as PixArt's.
    """
    written, length = [prompt.lower().strip() for prompt in prompts], settings.max_sequence_length
    longest = length
    instruction = "\n".join(networks.bundle.config("text_encoder").get(INSTRUCTION) or ())
    if instruction and not negative:
        written = [instruction + prompt for prompt in written]
        longest = networks.tokenizer("tokenizer").length(instruction) + length - 2
    # padded as the pipeline does, whatever its tokenizer does
    states, mask = encode_masked(networks, "", written, longest, pads_left=False)
    kept = [0, *range(1 - length, 0)]
    return {"encoder_hidden_states": states[:, kept], "encoder_attention_mask": mask[:, kept]}


SANA: Final = Kind(
    encode=encode,
    skipped=skipped_whole,  # as PixArt's
)
SANA_SPRINT: Final = replace(SANA, skipped=skipped_part, scheduler="SCMScheduler")
