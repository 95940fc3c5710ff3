"""The families there are, and which one a denoiser belongs to."""

from collections.abc import Mapping
from typing import Any, Final

import diffusers
from torch import nn

from obsdiff.families import (
    Family,
    auraflow,
    chroma,
    dit,
    flux,
    flux2,
    generic,
    hunyuan,
    ltx,
    lumina2,
    pixart,
    qwen,
    sana,
    sd3,
    unet,
    wan,
    zimage,
)
from obsdiff_runtime.errors import ModelError

FAMILIES: Final[dict[str, Family]] = {
    "sd3": sd3,
    "unet": unet,
    "flux": flux,
    "chroma": chroma,
    "flux2": flux2,
    "pixart": pixart,
    "auraflow": auraflow,
    "sana": sana,
    "qwen": qwen,
    "lumina2": lumina2,
    "hunyuan": hunyuan,
    "wan": wan,
    "ltx": ltx,
    "zimage": zimage,
    "dit": dit,
    "generic": generic,
}


_LEGACY: Final = {("Transformer2DModel", "ada_norm_zero"): "DiTTransformer2DModel"}
"""What class and norm_type of older configurations are now, where `Family.classes` does not say it."""


def family_of(denoiser: nn.Module | str, config: Mapping[str, Any] | None = None) -> Family:
    """The family of a denoiser, or of the diffusers class of that name; `generic` where none describes it.

    Args:
        denoiser: itself, or the name of its class.
        config: its configuration, where only the name is known; older names stand for several classes.

    Raises:
        ModelError: diffusers has no class of that name; lists those that a family describes.
    """
    class_name = denoiser if isinstance(denoiser, str) else type(denoiser).__name__
    class_name = _LEGACY.get((class_name, str((config or {}).get("norm_type"))), class_name)
    for family in FAMILIES.values():
        if class_name in family.classes:
            return family
    if isinstance(denoiser, nn.Module) or hasattr(diffusers, class_name):
        return generic
    described = [family for family in FAMILIES.values() if family.described]
    known = "; ".join(f"{family.name} ({', '.join(family.classes)})" for family in described)
    raise ModelError(
        f"{class_name} is no denoiser of a known family, and none of diffusers {diffusers.__version__}; "
        f"known families are {known}"
    )
