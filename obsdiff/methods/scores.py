"""What methods share that only score and drop."""

from collections.abc import Sequence

import torch
from torch import Tensor

from obsdiff.core import support, units
from obsdiff.core.units import Removal
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
    layers: Sequence[Layer], scores: Sequence[Tensor], removals: Sequence[Removal]
) -> tuple[list[Tensor], list[Pruned]]:
    """Drops the units whose summed scores are lowest, without compensation.

    Args:
        layers: linears that share their units.
        scores: per layer (out, in); those of a unit's weights are summed up.
        removals: as in Method.prune_units.

    Returns:
        as Method.prune_units.
    """
    if not any(removal.number for removal in removals):
        return result.untouched(layers, removals)
    kept = []
    for removal in removals:
        energies = []
        for start, score in zip(removal.starts, scores, strict=True):
            if start is not None:
                own = score[:, start : start + removal.units * removal.width]
                energies.append(own.sum(dim=0).view(removal.units, removal.width).sum(dim=1))
        live = torch.ones(removal.units, dtype=torch.bool, device=layers[0].weight.device)
        live[units.lowest(energies, removal.number)] = False
        kept.append(live.nonzero().flatten())
    supports = result.without(layers, removals, kept)
    return kept, [result.stored(layer, layer.weight.detach(), keep) for layer, keep in supports]
