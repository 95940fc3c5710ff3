"""The smallest weights go: no calibration, no compensation.

Weights are compared within the layer (unstructured) or a group (N:M); units by the L2 norm of their columns.
"""

from collections.abc import Sequence

from torch import Tensor

from obsdiff.core import support
from obsdiff.core.units import Removal
from obsdiff.methods import Layer, Options, Pruned, result
from obsdiff.methods.scores import drop_lowest_units, n_of_m
from obsdiff.sparsity import NM, Pattern

name: str = "magnitude"
calibrates: bool = False
removes_units: bool = True
streams: bool = False
time_weights: str = "log-decrease"


def prune_weights(layers: Sequence[Layer], pattern: Pattern, options: Options) -> list[Pruned]:
    """Drops the smallest weights of each layer or group; the others keep their bits."""
    return [_prune(layer, pattern) for layer in layers]


def prune_units(
    layers: Sequence[Layer], removals: Sequence[Removal], options: Options
) -> tuple[list[Tensor], list[Pruned]]:
    """Drops the units of least norm; two streams are fused by rank as in `obsdiff`."""
    energies = [layer.weight.detach().double().square() for layer in layers]
    return drop_lowest_units(layers, energies, removals)


def _prune(layer: Layer, pattern: Pattern) -> Pruned:
    if pattern.ratio == 0:
        return result.unchanged(layer)
    score = layer.weight.detach().abs()
    if isinstance(pattern, NM):
        with result.named([layer]):
            drop = n_of_m(score, pattern)
    else:
        drop = support.smallest(score.flatten(), support.count(score.numel(), pattern.ratio)).view_as(score)
    return result.stored(layer, layer.weight.detach(), ~drop)
