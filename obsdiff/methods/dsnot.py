"""DSnoT (Zhang et al., ICLR 2024, arXiv 2310.08915): Wanda's support, then swaps that lower the expected error.

    W           weight, (out, in)
    m, v        mean and variance of the input's channels, (in,)
    e           expected error of each row, sum of W_rj m_j over what the row lost, (out,)

One swap at a time in every row, at most `CYCLES` of them, without touching a weight that stays:

    grow        the lost weight of largest sign(e_r) W_rj m_j / v_j, where that is positive
    drop        the kept weight of least |W_rj| sqrt(G_jj) among those with sign(e_r) W_rj m_j < 0
    accept      while |e_r| falls; then the row is done

In N:M both come from one group, that of the grown weight. A weight moves once at most, as in the authors' code. Theirs
stops at |e_r| <= 0.1, an absolute bound that no scale of activations but their own fits, and lets a swap overshoot.
The variant is the one that starts from, and drops by, Wanda's score. OBS-Diff's tables have DSnoT in its other mode,
W^2 / diag(U)^2 in place of it, with OBS-Diff's own time weights, which are the default here too.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from obsdiff.core.units import Removal
from obsdiff.methods import Layer, Options, Pruned, result, wanda
from obsdiff.sparsity import NM, Pattern
from obsdiff_runtime.errors import CalibrationError, ConfigError

name: str = "dsnot"
calibrates: bool = True
removes_units: bool = False
streams: bool = False
time_weights: str = "log-decrease"

CYCLES: Final = 50
"""Swaps per row at most: the authors' default."""

ROWS: Final = 256
"""Worked on together: bounds the memory, several float64 copies of them."""

LEAST_VARIANCE: Final = 1e-6
"""Of a channel, as a share of its energy: what float32 products leave of a constant channel's variance is noise."""


def prune_weights(layers: Sequence[Layer], pattern: Pattern, options: Options) -> list[Pruned]:
    """Swaps weights in Wanda's support row by row; those that stay keep their bits."""
    return [_prune(layer, pattern) for layer in layers]


def prune_units(
    layers: Sequence[Layer], removals: Sequence[Removal], options: Options
) -> tuple[list[Tensor], list[Pruned]]:
    """Refused: a swap inside a row has no counterpart among units, which leave every row at once.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(f"{layers[0].name}: dsnot swaps single weights and removes no heads or neurons")


def swap(weight: Tensor, keep: Tensor, gram: Tensor, mean: Tensor, *, group: int) -> Tensor:
    """The support after the swaps.

    Args:
        weight: (out, in), any float dtype.
        keep: (out, in), bool: the support to start from.
        gram: (in, in), undamped; only its diagonal is read.
        mean: (in,): m.
        group: columns a swap stays within: M, or `in` for no bound.

    Returns:
        (out, in), bool: as many kept in each group of each row as before; |e| nowhere larger.
    """
    energy, mean = gram.diagonal().double(), mean.double()
    variance = torch.maximum(energy - mean.square(), LEAST_VARIANCE * energy)
    swapped = []
    for part, start in zip(torch.split(weight, ROWS), torch.split(keep, ROWS), strict=True):
        wide = part.double().reshape(len(part), -1, group)  # (rows, in / group, group)
        share = wide * mean.view(-1, group)
        gain = share / torch.where(variance > 0, variance, 1.0).view(-1, group)
        score = wide.abs() * energy.sqrt().view(-1, group)
        swapped.append(_swap_rows(share, gain, score, start.reshape_as(share)).flatten(1))
    return torch.cat(swapped)


def _swap_rows(share: Tensor, gain: Tensor, score: Tensor, keep: Tensor) -> Tensor:
    """Swaps in some rows at once; all are (rows, groups, group).

    Args:
        share: W m, what a weight adds to the expected output.
        gain: W m / v, by which the grown weight is chosen.
        score: |W| sqrt(diag G), by which the dropped one is.
        keep: the support to start from.
    """
    lost, kept, keep = ~keep, keep.clone(), keep.clone()
    rows = torch.arange(len(keep), device=keep.device)
    error = (share * lost).sum(dim=(1, 2))
    for _ in range(CYCLES):
        here = torch.arange(len(rows), device=rows.device)
        toward = share[rows] * error.sign()[:, None, None]
        droppable = kept[rows] & (toward < 0)
        growable = lost[rows] & (toward > 0) & droppable.any(dim=2, keepdim=True)
        wish = torch.where(growable, gain[rows].abs(), -1.0).flatten(1).argmax(dim=1)
        block, grow = wish // keep.shape[2], wish % keep.shape[2]
        drop = torch.where(droppable[here, block], score[rows, block], torch.inf).argmin(dim=1)
        after = error - share[rows, block, grow] + share[rows, block, drop]
        falls = growable[here, block, grow] & (after.abs() < error.abs())
        rows, block, grow, drop, error = rows[falls], block[falls], grow[falls], drop[falls], after[falls]
        if not len(rows):
            break
        keep[rows, block, grow], keep[rows, block, drop] = True, False
        lost[rows, block, grow], kept[rows, block, drop] = False, False
    return keep


def _prune(layer: Layer, pattern: Pattern) -> Pruned:
    if pattern.ratio == 0:
        return result.unchanged(layer)
    keep, weight = wanda.support_of(layer, pattern), layer.weight.detach()
    group = pattern.m if isinstance(pattern, NM) else weight.shape[1]
    return result.stored(layer, weight, swap(weight, keep, result.gram_of(layer), _mean_of(layer), group=group))


def _mean_of(layer: Layer) -> Tensor:
    if layer.mean is None:
        raise CalibrationError(f"{layer.name}: dsnot needs the mean of the input, and none was collected")
    if not bool(layer.mean.isfinite().all()):
        raise CalibrationError(f"{layer.name}: the mean of the input is not finite; are the weights before it?")
    return layer.mean
