"""Denoisers that the tests of families run on: one of each kind that a family describes, by its name in DENOISERS."""

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
    "hunyuan",
    "wan",
)
