"""Denoisers that the tests of families run on: one of each kind that a family describes, by its name in DENOISERS."""

from collections.abc import Sequence
from typing import Final

EVERY: Final = (
    "sd3",
    "sd35",
    "sd15",
    "sdxl",
    "flux",
    "flux2",
    "pixart",
    "pixart_sigma",
    "auraflow",
    "sana",
    "qwen",
    "lumina2",
    "zimage",
    "hunyuan",
    "wan",
    "dit",
)

CLASSES: Final = ("golden retriever", "tench", "208")
"""Prompts of the models that draw classes."""


def prompts_of(family: str, prompts: Sequence[str]) -> Sequence[str]:
    """The prompts, or as many classes where a prompt is one."""
    return CLASSES[: len(prompts)] if family == "dit" else prompts


def latents_of(family: str) -> tuple[int, int]:
    """Sides of latents that its denoiser takes: lopsided where it takes any."""
    return (16, 16) if family == "dit" else (12, 16)
