"""Wanda (Sun et al., arXiv 2306.11695): weight times input norm, no compensation.

The score of a weight is |W_ij| * sqrt(G_jj). Weights are compared within a row (unstructured) or a group (N:M). The
score of a unit is the sum of the squared scores of its columns.
"""

from collections.abc import Sequence

from torch import Tensor

from obsdiff.core import support
from obsdiff.core.linalg import check
from obsdiff.core.units import Removal
from obsdiff.methods import Layer, Options, Pruned, result
from obsdiff.methods.scores import drop_lowest_units, n_of_m
from obsdiff.sparsity import NM, Pattern
from obsdiff_runtime.errors import CalibrationError

name: str = "wanda"
calibrates: bool = True
removes_units: bool = True
streams: bool = False
time_weights: str = "log-decrease"


def prune_weights(layers: Sequence[Layer], pattern: Pattern, options: Options) -> list[Pruned]:
    """Drops the lowest scores of each row or group; the other weights keep their bits."""
    return [_prune(layer, pattern) for layer in layers]


def prune_units(
    layers: Sequence[Layer], removals: Sequence[Removal], options: Options
) -> tuple[list[Tensor], list[Pruned]]:
    """Drops the units with the lowest sums of squared scores; two streams are fused by rank as in `obsdiff`."""
    return drop_lowest_units(layers, [_score(layer).square() for layer in layers], removals)


def support_of(layer: Layer, pattern: Pattern) -> Tensor:
    """What stays, (out, in), bool.

    Raises:
        CalibrationError: the gram cannot be used; names the layer.
        ConfigError: N:M, and the input width is no multiple of M.
    """
    score = _score(layer)
    if isinstance(pattern, NM):
        with result.named([layer]):
            return ~n_of_m(score, pattern)
    return ~support.smallest(score, support.count(score.shape[1], pattern.ratio))


def _prune(layer: Layer, pattern: Pattern) -> Pruned:
    if pattern.ratio == 0:
        return result.unchanged(layer)
    return result.stored(layer, layer.weight.detach(), support_of(layer, pattern))


def _score(layer: Layer) -> Tensor:
    """|W_ij| * sqrt(G_jj), (out, in), float64."""
    gram = result.gram_of(layer)
    with result.named([layer]):
        check(gram)
    if float(gram.diagonal().max()) == 0:
        raise CalibrationError(
            f"{layer.name}: the gram is zero: every activation of this layer was zero in calibration"
        )
    return layer.weight.detach().double().abs() * gram.diagonal().double().sqrt()
