"""The sizes that graphs and engines are made for, from how a pipeline is called."""

from collections.abc import Mapping
from typing import Any

from obsdiff.recipe import Sampling
from obsdiff_export.profiles import Size
from obsdiff_export.requested import IMAGES
from obsdiff_runtime.kinds.table import KINDS
from obsdiff_runtime.references import TOKENS
from obsdiff_runtime.seeing import TOKENS as SEEN


def sizes_of(
    sampling: Sampling,
    pipeline: str,
    config: Mapping[str, Any],
    *,
    rows: int,
    text_tokens: int,
    vae_scale: int,
    instruction_tokens: int = 0,
    template_tokens: int = 0,
) -> dict[str, Size]:
    """What every dynamic axis is at the served size: one image, of so many rows of the denoiser, or up to four.

    Prompts, not negative ones, may stand behind an instruction, and all of them in a template. A denoiser that is told
    pictures is told none, best one of the served size, and at most as many as `References.served` says, of that size or
    as large as they are fitted. Those that the text encoder looks at make the text longer. `pipeline` and `config` are
    as for `served`.
    """
    length = (sampling.max_sequence_length or 256) + template_tokens
    longest = length + instruction_tokens
    *frames, height, width = sampling.latents(vae_scale)
    kind, pictures = KINDS.get(pipeline), {}
    texts: dict[str, Size] = {"text_tokens": text_tokens} if text_tokens else {}
    sequence: Size = (length, longest, longest) if instruction_tokens else length
    if kind is not None and kind.references is not None:
        step = vae_scale * kind.patch(config)
        own = (sampling.height // step) * (sampling.width // step)
        pictures = {TOKENS: (0, own, kind.references.served * max(own, kind.references.pixels // step**2))}
        if kind.references.seen is not None:
            seen = kind.references.seen_sizes(sampling.width, sampling.height)
            pictures |= seen
            words = text_tokens - kind.references.seen_tokens(1, 1)
            texts, sequence = {"text_tokens": _longer(words, seen[SEEN])}, _longer(length, seen[SEEN])
    return {
        "batch": (1, rows, IMAGES[1] * rows),
        **({"frames": frames[0]} if frames else {}),
        "height": height,
        "width": width,
        "image_height": sampling.height,
        "image_width": sampling.width,
        **texts,
        **pictures,
        "sequence": sequence,
    }


def _longer(length: int, more: tuple[int, int, int]) -> Size:
    low, best, high = (length + each for each in more)
    return low, best, high
