"""Which GPUs compute in a number format."""

import re
from collections.abc import Collection, Sequence
from typing import Final

from obsdiff_runtime.errors import CompatibilityError

NEEDS: Final = {"int8": (7, 2), "bf16": (8, 0), "fp8": (8, 9)}
"""Least compute capability whose tensor cores compute in a format; others run everywhere."""


def can_compute(target: str, format: str) -> bool:
    """Whether a compute capability ("8.9") has kernels for a format ("fp8"). Of other targets nothing is known."""
    found = re.fullmatch(r"(\d+)\.(\d+)", target)
    return found is None or (int(found[1]), int(found[2])) >= NEEDS.get(format, (0, 0))


def targets_for(asked: Sequence[str], usual: Sequence[str], formats: Collection[str]) -> tuple[str, ...]:
    """The targets to build for: those asked for, else the usual ones that compute in all the formats.

    Args:
        asked: by the user; empty for the usual ones.
        usual: the builder's own choice.
        formats: of the graphs, such as ("fp8", "bf16").

    Raises:
        CompatibilityError: a target that was asked for lacks a format, or all usual ones do.
    """
    if not formats:
        return tuple(asked or usual)
    for target in asked or usual:
        lacking = [format for format in formats if not can_compute(target, format)]
        if lacking and (asked or len(usual) == 1):
            raise CompatibilityError(_lacks(target, lacking[0]))
    fitting = tuple(target for target in asked or usual if all(can_compute(target, format) for format in formats))
    if not fitting:
        raise CompatibilityError(_lacks(", ".join(usual), next(iter(formats))))
    return fitting


def _lacks(target: str, format: str) -> str:
    needed = ".".join(map(str, NEEDS[format]))
    other = "int8 or fp16" if format == "fp8" else "fp16"
    return (
        f"compute capability {target} has no {format}: that needs {needed} or later; "
        f"build for such GPUs with --targets, or take --precision {other}"
    )
