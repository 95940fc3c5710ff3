"""FLUX.1 and FLUX.1 Kontext."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from obsdiff_runtime.fills import Fill
from obsdiff_runtime.kinds import PACKED, Conditions, Kind, Settings, drawn_channels, skipped_part
from obsdiff_runtime.kinds.encoding import encode_t5, max_length
from obsdiff_runtime.networks import Networks
from obsdiff_runtime.references import KONTEXT


def encode(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """T5, and one CLIP encoder's pooled text."""
    ids = networks.tokenizer("tokenizer").ids(prompts, max_length(networks, "tokenizer"))
    pooled = networks.run("text_encoder", {"input_ids": ids}, ["pooler_output"])["pooler_output"]
    return {
        "encoder_hidden_states": encode_t5(networks, "_2", prompts, settings.max_sequence_length),
        "pooled_projections": pooled,
    }


FLUX: Final = Kind(
    encode=encode,
    patch=lambda config: PACKED,
    channels=lambda config: drawn_channels(config) // PACKED**2,
    skipped=skipped_part,
    negatives=False,
    even_sigmas=True,
)
FLUX_FILL: Final = replace(FLUX, fills=Fill(pixels=True, reads_all=True))
FLUX_KONTEXT: Final = replace(FLUX, references=KONTEXT)
