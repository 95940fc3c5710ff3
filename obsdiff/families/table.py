"""The families there are, and which one a denoiser belongs to."""

from typing import Final

from torch import nn

from obsdiff.families import Family, flux, pixart, sd3, unet
from obsdiff_runtime.errors import ModelError

FAMILIES: Final[dict[str, Family]] = {
    "sd3": sd3,
    "unet": unet,
    "flux": flux,
    "pixart": pixart,
}


def family_of(denoiser: nn.Module | str) -> Family:
    """The family of a denoiser, or of the diffusers class of that name.

    Raises:
        ModelError: no family has that class; lists those that are known.
    """
    class_name = denoiser if isinstance(denoiser, str) else type(denoiser).__name__
    for family in FAMILIES.values():
        if class_name in family.classes:
            return family
    known = "; ".join(f"{family.name} ({', '.join(family.classes)})" for family in FAMILIES.values())
    raise ModelError(f"{class_name} is of no known family of denoisers; known are {known}")
