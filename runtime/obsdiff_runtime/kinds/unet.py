"""Stable Diffusion, its latent consistency models, and SDXL."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from obsdiff_runtime.fills import Fill
from obsdiff_runtime.kinds import Conditions, Kind, Settings, drawn_channels, skipped_whole
from obsdiff_runtime.kinds.encoding import encode_clip, max_length
from obsdiff_runtime.networks import Array, Networks


def encode_sd(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """The last hidden states of one CLIP encoder."""
    ids = networks.tokenizer("tokenizer").ids(prompts, max_length(networks, "tokenizer"))
    states = networks.run("text_encoder", {"input_ids": ids}, ["last_hidden_state"])
    return {"encoder_hidden_states": states["last_hidden_state"]}


def encode_sdxl(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """Two CLIP encoders side by side, the second one's pooled text, and sizes.

    Negative prompts that are all empty become zeros where the pipeline was trained so (force_zeros_for_empty_prompt).
    """
    hidden = []
    for suffix in ("", "_2"):
        if not networks.has(f"text_encoder{suffix}"):  # the refiner has only the second
            continue
        states = encode_clip(
            networks, suffix, prompts, max_length(networks, f"tokenizer{suffix}"), "text_embeds" if suffix else None
        )
        hidden.append(states["hidden"])
    size = (settings.height, settings.width)
    times = np.array([*size, 0, 0, *size], dtype=np.float32)  # original size, crop's corner, target size
    embeds: Array = np.concatenate(hidden, axis=-1)
    pooled = states["text_embeds"]
    if negative and not any(prompts) and networks.bundle.index().get("force_zeros_for_empty_prompt", True):
        embeds, pooled = np.zeros_like(embeds), np.zeros_like(pooled)
    return {
        "encoder_hidden_states": embeds,
        "text_embeds": pooled,
        "time_ids": np.tile(times, (len(prompts), 1)),
    }


def _patch(config: Mapping[str, Any]) -> int:
    return int(2 ** (len(config["block_out_channels"]) - 1))


SD: Final = Kind(
    denoiser="unet",
    noisy="sample",
    predicted="out_sample",
    encode=encode_sd,
    patch=_patch,
    channels=drawn_channels,
    skipped=skipped_whole,
)
LCM: Final = replace(SD, skipped=None, scheduler="LCMScheduler")
SDXL: Final = replace(SD, encode=encode_sdxl)
SD_INPAINT: Final = replace(SD, fills=Fill(pixels=False, reads_all=False))
SDXL_INPAINT: Final = replace(SD_INPAINT, encode=encode_sdxl)
SD_CONTROLNET: Final = replace(SD, controls=True)
SDXL_CONTROLNET: Final = replace(SDXL, controls=True)
