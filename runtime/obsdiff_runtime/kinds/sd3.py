"""Stable Diffusion 3 and 3.5."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from obsdiff_runtime.kinds import Conditions, Kind, Settings, skipped_part
from obsdiff_runtime.kinds.encoding import encode_clip, encode_t5, max_length
from obsdiff_runtime.networks import Networks


def encode(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """Two CLIP encoders side by side, zeros up to T5's width; T5, or zeros in its place, behind them."""
    length = max_length(networks, "tokenizer")  # of both: diffusers asks the first tokenizer only
    hidden, pooled = [], []
    for suffix in ("", "_2"):
        states = encode_clip(networks, suffix, prompts, length, "text_embeds")
        hidden.append(states["hidden"])
        pooled.append(states["text_embeds"])
    clip = np.concatenate(hidden, axis=-1)  # (n, t, d1 + d2)
    if networks.has("text_encoder_3"):
        t5 = encode_t5(networks, "_3", prompts, settings.max_sequence_length)  # (n, max_sequence_length, d)
    else:
        width = networks.bundle.config("transformer")["joint_attention_dim"]
        t5 = np.zeros((len(prompts), settings.max_sequence_length, width), dtype=np.float32)
    clip = np.pad(clip, ((0, 0), (0, 0), (0, t5.shape[-1] - clip.shape[-1])))
    return {
        "encoder_hidden_states": np.concatenate([clip, t5], axis=1),
        "pooled_projections": np.concatenate(pooled, axis=-1),
    }


SD3: Final = Kind(
    encode=encode,
    largest=lambda config: int(config["pos_embed_max_size"]) * int(config["patch_size"]),
    skipped=skipped_part,
)
