"""Prompts through tokenizers and text encoders: what several pipelines do alike.

Shapes: n prompts, t text tokens, d width of a text token, p pooled width.
"""

from collections.abc import Sequence

import numpy as np

from obsdiff_runtime.errors import BundleError
from obsdiff_runtime.networks import Array, Networks


def encode_clip(
    networks: Networks, suffix: str, prompts: Sequence[str], length: int, pooled: str | None
) -> dict[str, Array]:
    """Penultimate hidden states (n, t, d) as "hidden", and the pooled output (n, p) if one is named."""
    encoder = f"text_encoder{suffix}"
    ids = networks.tokenizer(f"tokenizer{suffix}").ids(prompts, length)
    penultimate = f"hidden_states.{networks.hidden_layers(encoder) - 1}"
    results = networks.run(encoder, {"input_ids": ids}, [penultimate] + ([pooled] if pooled else []))
    results["hidden"] = results.pop(penultimate)
    return results


def encode_t5(networks: Networks, suffix: str, prompts: Sequence[str], length: int) -> Array:
    """(n, length, d), padding included."""
    ids = networks.tokenizer(f"tokenizer{suffix}").ids(prompts, length)
    return networks.run(f"text_encoder{suffix}", {"input_ids": ids}, ["last_hidden_state"])["last_hidden_state"]


def encode_masked(
    networks: Networks,
    suffix: str,
    texts: Sequence[str],
    length: int,
    *,
    output: str = "last_hidden_state",
    **options: bool,
) -> tuple[Array, Array]:
    """What an encoder that is told of padding makes of texts, (n, length, d), and where text is, (n, length), float32.

    Args:
        networks: of the bundle.
        suffix: of the encoder's name and of its tokenizer's.
        texts: as they are read.
        length: of all rows, in tokens.
        output: of the encoder.
        options: of `PromptTokenizer.masked_ids`.
    """
    ids, mask = networks.tokenizer(f"tokenizer{suffix}").masked_ids(texts, length, **options)
    states = networks.run(f"text_encoder{suffix}", {"input_ids": ids, "attention_mask": mask}, [output])[output]
    return states, mask.astype(np.float32)


def max_length(networks: Networks, tokenizer: str) -> int:
    """Tokens that a tokenizer's own configuration says; BundleError where it does not."""
    length = networks.tokenizer(tokenizer).max_length
    if length is None:
        raise BundleError(f"{tokenizer}/tokenizer_config.json: model_max_length is missing; CLIP needs it")
    return length
