"""The packages of a run: which linears' grams are collected in one calibration pass."""

from collections.abc import Sequence
from itertools import groupby

from obsdiff import estimates
from obsdiff.core.gram import BYTES_PER_ENTRY
from obsdiff.groups import LinearSpec


def split_packages(
    linears: Sequence[LinearSpec], *, packages: int, budget_bytes: int | None = None
) -> list[tuple[LinearSpec, ...]]:
    """Splits linears into the packages of successive calibration passes; a tier is never torn apart.

    Args:
        linears: in any order.
        packages: into this many contiguous parts of near-equal numbers of tiers, the first ones larger by one; or into
            one per tier where there are fewer tiers.
        budget_bytes: where given, parts are filled up to this many bytes of grams instead.

    Raises:
        ResourceError: the budget is smaller than one tier's grams.
    """
    ordered = sorted(linears, key=_tier)
    tiers = [tuple(tier) for _, tier in groupby(ordered, key=_tier)]
    if budget_bytes is not None:
        return _fill(tiers, budget_bytes)
    size, larger = divmod(len(tiers), min(packages, len(tiers)) or 1)
    parts: list[tuple[LinearSpec, ...]] = []
    start = 0
    while start < len(tiers):
        stop = start + size + (1 if len(parts) < larger else 0)
        parts.append(tuple(linear for tier in tiers[start:stop] for linear in tier))
        start = stop
    return parts


def gram_bytes(linears: Sequence[LinearSpec]) -> int:
    """What the grams of these linears take together; those that share an input count once."""
    return sum(BYTES_PER_ENTRY * width * width for width in estimates.gram_widths(linears).values())


def _tier(linear: LinearSpec) -> tuple[int, int]:
    return linear.block, linear.tier


def _fill(tiers: Sequence[tuple[LinearSpec, ...]], budget_bytes: int) -> list[tuple[LinearSpec, ...]]:
    parts: list[tuple[LinearSpec, ...]] = []
    for tier in tiers:
        estimates.check_fits(tier, gram_bytes(tier), budget_bytes)
        if parts and gram_bytes(parts[-1] + tier) <= budget_bytes:
            parts[-1] += tier
        else:
            parts.append(tier)
    return parts
