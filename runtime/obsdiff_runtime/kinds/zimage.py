"""Z-Image and Z-Image-Turbo."""

from collections.abc import Sequence
from typing import Final

from obsdiff_runtime.kinds import PACKED, PROMPT_TEMPLATE, Conditions, Kind, Settings, skipped_part
from obsdiff_runtime.kinds.encoding import encode_masked
from obsdiff_runtime.networks import Networks


def encode(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """Qwen3 on the prompt inside of the template that the bundle has of its tokenizer, and which tokens are padding."""
    before, behind = networks.bundle.config("text_encoder")[PROMPT_TEMPLATE]
    written = [f"{before}{prompt}{behind}" for prompt in prompts]
    # padded behind, for the denoiser counts places from the first token
    states, mask = encode_masked(
        networks, "", written, settings.max_sequence_length, output="prompt_embeds", pads_left=False
    )
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


ZIMAGE: Final = Kind(
    encode=encode,
    patch=lambda config: PACKED,
    largest=lambda config: int(min(config["axes_lens"][1:])) * PACKED,
    skipped=skipped_part,
    unguided=0.0,
    even_sigmas=True,
)
