"""Text that is padded to one length: where the denoiser masks its padding out, calibration leaves it out, too.

rows    of a denoiser call
"""

from collections.abc import Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from obsdiff.families import Family
from obsdiff_runtime.errors import CalibrationError, ModelError

_TEXT: Final = "encoder_hidden_states"

Masks = Mapping[str, Tensor]
"""By sequence, as LinearSpec.tokens names it: the tokens that a call looks at, (rows, tokens), bool. Of a sequence that
is not in it, it looks at all."""


def masks(family: Family, denoiser: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The masks of a denoiser call, by its arguments' names.

    Where text and image are one sequence, a row's padding is taken to stand behind both, unless the argument masks that
    sequence, text first. A text that comes without its padding has as many tokens as `Family.tokens` says.

    Raises:
        ModelError: the argument holds something else than a token's 0 or 1.
    """
    mask = None if family.text_mask is None else arguments.get(family.text_mask)
    if mask is None:
        return {}

    def tokens(length: int) -> Mapping[str, int]:
        latents = arguments["hidden_states"] if "hidden_states" in arguments else arguments["x"][0]
        height, width = latents.shape[-2:]
        config = cast("Mapping[str, Any]", denoiser.config)
        return family.tokens(config, height=height, width=width, text_tokens=length, vae_scale=1)

    if isinstance(mask, list):
        lengths = torch.tensor([tokens(len(text))["text"] for text in mask])
        found = {"text": torch.arange(int(lengths.max())) < lengths[:, None]}
    elif mask.ndim == 2 and mask.shape[1] > (text := arguments[_TEXT].shape[1]):
        return {"text": mask[:, :text].bool(), "joint": mask.bool()}
    elif mask.ndim == 2:
        found = {"text": mask.bool()}
        lengths = found["text"].sum(dim=1)
    else:
        raise ModelError(
            f"{family.text_mask} is not (rows, text tokens), 0 for padding, but {tuple(mask.shape)}; "
            "which tokens count is not known"
        )
    if not family.described or not {"hidden_states", "x"} & arguments.keys():
        return found
    sizes = tokens(int(lengths.max()))
    if "joint" in sizes:
        found["joint"] = torch.arange(sizes["joint"], device=lengths.device) < lengths[:, None] + sizes["image"]
    return found


def unpadded(values: Tensor, mask: Tensor) -> Tensor:
    """(rows, tokens, width) -> (tokens in the mask, width).

    Raises:
        CalibrationError: the mask is of another sequence.
    """
    if values.shape[:-1] != mask.shape:
        raise CalibrationError(
            f"the text's mask is {tuple(mask.shape)}, but its tokens are {tuple(values.shape[:-1])}; "
            "does this layer read the text?"
        )
    return values[mask.to(values.device)]
