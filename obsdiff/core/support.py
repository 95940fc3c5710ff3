"""Which weights of a linear stay, and the OBS sweep that moves the others.

W       weight, (out, in)
U       (in, in), upper triangular, H^-1 = U^T U (core.linalg)
keep    (out, in), bool: the support
"""

import math

import torch
from torch import Tensor

from obsdiff.core.gram import full_precision
from obsdiff.sparsity import NM, Pattern
from obsdiff_runtime.errors import ConfigError


def count(total: int, ratio: float) -> int:
    """floor(total * ratio), as if the ratio were the decimal number that was typed (0.29 of 100 is 29)."""
    return math.floor(total * ratio + 1e-6)


def smallest(score: Tensor, number: int) -> Tensor:
    """Marks the smallest entries along the last axis.

    Args:
        score: (..., n), no NaN.
        number: how many of the n.

    Returns:
        (..., n), bool: exactly `number` are True; of equal scores the first ones.
    """
    mask = torch.zeros_like(score, dtype=torch.bool)
    order = torch.sort(score, dim=-1, stable=True).indices
    return mask.scatter_(-1, order[..., :number], True)


def check_groups(columns: int, pattern: Pattern) -> None:
    """Refuses an N:M pattern that the columns cannot be divided into.

    Raises:
        ConfigError: `columns` is no multiple of M.
    """
    if isinstance(pattern, NM) and columns % pattern.m:
        raise ConfigError(
            f"{columns} input columns are no multiple of {pattern.m}, so {pattern} cannot hold; leave this layer dense"
        )


def sweep(weight: Tensor, upper: Tensor, pattern: Pattern, *, block: int = 128) -> tuple[Tensor, Tensor]:
    """Prunes a linear column by column, compensating in the columns to the right (SparseGPT; arXiv 2510.06751).

    Unstructured: in each block of columns exactly floor(out * columns * ratio) weights go, those of the smallest
    w^2 / U_jj^2. N:M: where a group of M begins, the N smallest of its current weights go, row by row. Removing w_j
    moves the columns after it by -(w_j / U_jj) U_j; inside the block at once, beyond it when the block is done.

    Args:
        weight: (out, in), float32 or float64; sets the precision of the sweep.
        upper: (in, in): U, float64.
        pattern: what is removed.
        block: columns per lazy update; rounded down to a multiple of M, to at least M.

    Returns:
        the new weight, (out, in), zero where pruned, and the support, (out, in), bool.

    Raises:
        ConfigError: N:M, and `in` is no multiple of M.
    """
    columns = weight.shape[1]
    check_groups(columns, pattern)
    if isinstance(pattern, NM):
        block = max(pattern.m, block - block % pattern.m)
    weight, upper = weight.clone(), upper.to(weight.dtype)
    keep = torch.ones_like(weight, dtype=torch.bool)
    with full_precision():
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            errors = _sweep_block(weight[:, start:stop], upper[start:stop, start:stop], keep[:, start:stop], pattern)
            weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight, keep


def _sweep_block(weight: Tensor, upper: Tensor, keep: Tensor, pattern: Pattern) -> Tensor:
    """Prunes a block of columns; changes `weight` and `keep`. Returns w / U_jj of what was removed, (out, block)."""
    rows, columns = weight.shape
    energy = upper.diagonal().square()
    errors = torch.zeros_like(weight)
    if not isinstance(pattern, NM):
        score = (weight.square() / energy).flatten()
        keep.copy_(~smallest(score, count(rows * columns, pattern.ratio)).view(rows, columns))
    for j in range(columns):
        if isinstance(pattern, NM) and j % pattern.m == 0:
            group = slice(j, j + pattern.m)
            keep[:, group] = ~smallest(weight[:, group].square() / energy[group], pattern.n)
        error = weight[:, j].masked_fill(keep[:, j], 0) / upper[j, j]
        weight[:, j:] -= torch.outer(error, upper[j, j:])
        weight[:, j].masked_fill_(~keep[:, j], 0)
        errors[:, j] = error
    return errors
