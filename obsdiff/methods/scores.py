"""What methods share that only score and drop."""

from collections.abc import Sequence

import torch
from torch import Tensor

from obsdiff.core import support, units
from obsdiff.methods import Layer, Pruned, result
from obsdiff.sparsity import NM


def n_of_m(score: Tensor, pattern: NM) -> Tensor:
    """Marks the N lowest scores of every M consecutive columns.

    Args:
        score: (out, in).
        pattern: N and M.

    Returns:
        (out, in), bool: what goes.

    Raises:
        ConfigError: `in` is no multiple of M.
    """
    support.check_groups(score.shape[1], pattern)
    groups = score.reshape(len(score), -1, pattern.m)  # (out, in / M, M)
    return support.smallest(groups, pattern.n).flatten(1)


def drop_lowest_units(
    layers: Sequence[Layer], scores: Sequence[Tensor], *, width: int, remove: int
) -> tuple[Tensor, list[Pruned]]:
    """Drops the units whose summed scores are lowest, without compensation.

    Args:
        layers: one linear, or two that share their units.
        scores: per layer (out, in); those of a unit's weights are summed up.
        width: columns per unit.
        remove: how many units go.

    Returns:
        as Method.prune_units.
    """
    number = layers[0].weight.shape[1] // width
    live = torch.ones(number, dtype=torch.bool, device=layers[0].weight.device)
    if remove == 0:
        return live.nonzero().flatten(), [result.unchanged(layer) for layer in layers]
    live[units.lowest([score.sum(dim=0).view(number, width).sum(dim=1) for score in scores], remove)] = False
    kept = live.nonzero().flatten()
    return kept, [result.stored(layer, layer.weight.detach(), result.spread(kept, layer, width)) for layer in layers]
