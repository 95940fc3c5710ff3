"""The default: supports chosen jointly, all weights re-solved, on inputs as they will be and for the dense outputs.

What a layer should compute comes from the dense model, what it reads from the model as pruned so far (streaming.py):
later layers repair what earlier ones broke (asymmetric calibration; GPTAQ, Li et al. 2025). The support is ADMM's
(ALPS, Meng et al. 2024), the weights on it are the least-squares ones, the bias carries the means. Where it is known
what errors of a layer's output cost the network's (core.metric), it is that cost which is least.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from obsdiff.core import bias, linalg, solver, units
from obsdiff.core.linalg import Factor
from obsdiff.core.metric import Metric
from obsdiff.core.units import Removal
from obsdiff.methods import Layer, Options, Pruned, result
from obsdiff.sparsity import Pattern
from obsdiff_runtime.errors import CalibrationError

name: str = "streamed"
calibrates: bool = True
removes_units: bool = True
streams: bool = True
time_weights: str = "log-decrease"


def prune_weights(layers: Sequence[Layer], pattern: Pattern, options: Options) -> list[Pruned]:
    """Solves for all layers at once, with one factorisation; see core.solver.solve.

    A pattern of ratio 0 without targets changes nothing; with targets, the layers stay dense and are refitted.
    """
    pruned: list[Pruned] = []
    for _, alike in groupby(layers, key=lambda layer: layer.bias is None):
        sharing = list(alike)
        with result.named(sharing):
            factor = _factor(sharing[0], options)
        wanted = [_wanted(layer, factor) for layer in sharing]
        rows = [len(layer.weight) for layer in sharing]
        if pattern.ratio == 0:
            weight, keep = torch.cat(wanted), torch.ones(sum(rows), len(factor.gram), dtype=torch.bool)
        else:
            with result.named(sharing):
                metrics = [layer.metric for layer in sharing]
                stacked = torch.cat(wanted)
                solution = solver.solve(stacked, factor, pattern, rows=rows, metrics=metrics, effort=options.effort)
            weight, keep = solution.weight, solution.keep
        parts = zip(sharing, wanted, torch.split(weight, rows), torch.split(keep.to(weight.device), rows), strict=True)
        pruned += [_finished(layer, best, part, kept) for layer, best, part, kept in parts]
    return pruned


def prune_units(
    layers: Sequence[Layer], removals: Sequence[Removal], options: Options
) -> tuple[list[Tensor], list[Pruned]]:
    """Removes the units of least loss and compensates; see core.units.remove."""
    factors = []
    for layer in layers:
        with result.named([layer]):
            factors.append(_factor(layer, options))
    wanted = [_wanted(layer, factor) for layer, factor in zip(layers, factors, strict=True)]
    with result.named(layers):
        costs = [layer.metric for layer in layers]
        roots = [rows if cost is None else cost.root(rows) for rows, cost in zip(wanted, costs, strict=True)]
        kept, roots = units.remove(roots, factors, removals)
        weights = [rows if cost is None else cost.unroot(rows) for rows, cost in zip(roots, costs, strict=True)]
    supports = result.without(layers, removals, kept)
    parts = zip(wanted, weights, supports, strict=True)
    return kept, [_finished(layer, best, weight, keep) for best, weight, (layer, keep) in parts]


def _factor(layer: Layer, options: Options) -> Factor:
    return linalg.factorise(_gram(layer), options.damp)


def _gram(layer: Layer) -> Tensor:
    """The gram about the mean where a bias can carry the mean, else the gram."""
    gram = result.gram_of(layer)
    if layer.bias is None:
        return gram
    if layer.mean is None:
        raise CalibrationError(f"{layer.name}: this method needs the mean of the input, and none was collected")
    return bias.centred(gram, layer.mean)


def _cross(layer: Layer) -> Tensor | None:
    if layer.target is None:
        return None
    if layer.bias is None or layer.mean is None:
        return layer.target.cross
    return bias.centred_cross(layer.target.cross, layer.target.mean, layer.mean)


def _wanted(layer: Layer, factor: Factor) -> Tensor:
    """W*, (out, in), float64: the best dense weight, drawn to the present one by the damping."""
    weight = layer.weight.detach().double()
    cross = _cross(layer)
    if cross is None:
        return weight
    right = cross + weight @ (factor.gram - _gram(layer))
    return factor.solve(right.mT).mT


def _finished(layer: Layer, best: Tensor, weight: Tensor, keep: Tensor) -> Pruned:
    stored = result.stored(layer, weight, keep)
    if layer.bias is None or layer.mean is None:
        new_bias = None
    else:
        before = layer.bias.detach()
        mean = bias.output_mean(layer.weight.detach(), before, layer.mean)
        wanted = mean if layer.target is None else layer.target.mean
        new_bias = bias.best(stored.weight, wanted, layer.mean).to(before.dtype)
    if layer.metric is not None:
        loss = _share(_gram(layer), layer.metric, stored.weight.double() - best, best)
    else:
        loss = stored.loss if layer.target is None else _loss(layer, stored.weight)
    return Pruned(weight=stored.weight, keep=keep, loss=loss, bias=new_bias)


def _share(gram: Tensor, metric: Metric, change: Tensor, whole: Tensor) -> float:
    """tr(S D G D^T) / tr(S W G W^T)."""
    lost, kept = (float(((rows @ gram) * rows).sum()) for rows in (metric.root(change), metric.root(whole)))
    tiny = torch.finfo(torch.float64).tiny
    return max(lost, tiny) / max(kept, tiny)


def _loss(layer: Layer, weight: Tensor) -> float:
    """E|X x + b - y|^2 / E|y - E y|^2 with the best bias; without a bias, E|X x - y|^2 / E|y|^2."""
    target, cross = layer.target, _cross(layer)
    if target is None or cross is None:
        raise CalibrationError(f"{layer.name}: has no target")
    wide = weight.double()
    energy = target.energy if layer.bias is None else target.energy - target.mean.square()
    left = energy + ((wide @ _gram(layer) - 2 * cross) * wide).sum(dim=1)
    total = float(energy.sum())
    return max(float(left.sum()), 0.0) / total if total > 0 else 0.0
