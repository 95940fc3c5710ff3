"""Random networks that are the same in every process, and denoisers that are cut."""

import functools
import zlib
from collections.abc import Callable
from typing import Any

from kinds import uneven

CAPTIONS = (
    "a large red circle above a small blue square",
    "a small green triangle",
    "two yellow stars, left of a purple ring",
    "It's  an ODD\tcaption: 42 pieces!",
)


def seeded(make: Callable[..., Any]) -> Callable[..., Any]:
    """One network for each set of arguments, with the same weights in every process."""

    @functools.cache
    @functools.wraps(make)
    def made(**options: Any) -> Any:
        import torch

        torch.manual_seed(zlib.crc32(f"{make.__name__} {sorted(options.items())}".encode()))
        return make(**options)

    return made


def cut(make: Callable[..., Any]) -> Callable[..., Any]:
    """The denoiser as pruning leaves it: blocks of different numbers of heads and neurons."""

    @functools.wraps(make)
    def made(**options: Any) -> Any:
        from obsdiff.families.table import family_of
        from obsdiff.shrinking import shrink

        denoiser = make(**options)
        shrink(denoiser, family_of(denoiser), uneven(denoiser))
        return denoiser

    return made
