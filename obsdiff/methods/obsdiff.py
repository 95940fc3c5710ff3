"""OBS-Diff as published (arXiv 2510.06751): SparseGPT and SlimGPT on grams pooled over the denoising steps.

The time weighting is the calibration's; here is what happens to a layer once its gram is known.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from obsdiff.core import linalg, support, units
from obsdiff.core.units import Removal
from obsdiff.methods import Layer, Options, Pruned, result
from obsdiff.sparsity import Pattern

name: str = "obsdiff"
calibrates: bool = True
removes_units: bool = True
streams: bool = False
time_weights: str = "log-decrease"


def prune_weights(layers: Sequence[Layer], pattern: Pattern, options: Options) -> list[Pruned]:
    """Sweeps each layer column by column, with one factorisation for all; see core.support.sweep.

    Silent channels lose their weights, as in the paper's code: no calibration token was ever scaled by them.
    """
    if pattern.ratio == 0:
        return [result.unchanged(layer) for layer in layers]
    with result.named(layers):
        support.check_groups(layers[0].weight.shape[1], pattern)
        factor = linalg.factorise(result.gram_of(layers[0]), options.damp)
    pruned = []
    for layer in layers:
        weight = layer.weight.detach()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32)).masked_fill(factor.dead, 0)
        swept, keep = support.sweep(wide, factor.upper, pattern, block=options.block)
        pruned.append(result.stored(layer, swept, keep))
    return pruned


def prune_units(
    layers: Sequence[Layer], removals: Sequence[Removal], options: Options
) -> tuple[list[Tensor], list[Pruned]]:
    """Removes the units of least loss and compensates; see core.units.remove."""
    if not any(removal.number for removal in removals):
        return result.untouched(layers, removals)
    factors = []
    for layer in layers:
        with result.named([layer]):
            factors.append(linalg.factorise(result.gram_of(layer), options.damp))
    with result.named(layers):
        kept, weights = units.remove([layer.weight.detach() for layer in layers], factors, removals)
    supports = result.without(layers, removals, kept)
    return kept, [result.stored(layer, weight, keep) for weight, (layer, keep) in zip(weights, supports, strict=True)]
