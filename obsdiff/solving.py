"""Solves the linears of a tier whose moments are known: places of channels, units, weights."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from obsdiff import pointwise, ranks
from obsdiff.assignments import Assignment
from obsdiff.clusters import clusters
from obsdiff.core.permutation import permute
from obsdiff.groups import Group, LinearSpec
from obsdiff.methods import Layer, Method, Options, Pruned
from obsdiff.methods.result import cast
from obsdiff.results import LayerResult, PackageResult, merged
from obsdiff.shrinking import columns as columns_of
from obsdiff.sparsity import NM, Pattern
from obsdiff_runtime.errors import CalibrationError


class TierSolver:
    """Solves tiers of a denoiser; writes nothing into it."""

    def __init__(
        self,
        denoiser: nn.Module,
        linears: Sequence[LinearSpec],
        groups: Sequence[Group],
        method: Method,
        options: Options,
        assignment: Assignment,
        *,
        permutes: bool,
        stored: torch.dtype,
    ) -> None:
        """Begins.

        Args:
            denoiser: whose weights are looked at.
            linears: all of it.
            groups: likewise.
            method: that prunes.
            options: of it.
            assignment: what happens to which layer.
            permutes: whether channels are reordered for N:M.
            stored: dtype that weights are given in.
        """
        self._denoiser, self._linears, self._groups = denoiser, linears, groups
        self._method, self._options, self._assignment = method, options, assignment
        self._permutes, self._stored = permutes, stored
        self._patterns = assignment.patterns
        losing = [group for group in assignment.groups if assignment.removals.get(group.name)]
        self._cluster_of = {name: each for each in clusters(losing) for name in each.readers}

    def changes(self, name: str) -> bool:
        """Whether a linear loses weights or columns."""
        return name in self._patterns or name in self._cluster_of

    def solve(self, tier: Sequence[LinearSpec], layers: Mapping[str, Layer]) -> PackageResult:
        """New tensors of a tier, and what is told of it; on several ranks part by part.

        Args:
            tier: its linears.
            layers: the same with their moments, by name.

        Raises:
            CalibrationError: moments that cannot be used; names the layer.
        """

        def solved(part: Sequence[LinearSpec]) -> PackageResult:
            return self._solved(part, {linear.name: layers[linear.name] for linear in part})

        return merged(ranks.solve(_parts(tier, self._groups), solved))

    def _solved(self, tier: Sequence[LinearSpec], layers: dict[str, Layer]) -> PackageResult:
        solutions: dict[str, tuple[Pruned, str]] = {}
        kept: dict[str, tuple[int, ...]] = {}
        for losing in dict.fromkeys(self._cluster_of[name] for name in layers if name in self._cluster_of):
            stays, pruned = self._method.prune_units(
                [layers[name] for name in losing.readers],
                losing.removals(self._assignment.removals),
                self._options,
            )
            own = {group.name: tuple(units.tolist()) for group, units in zip(losing.groups, stays, strict=True)}
            kept.update(own)
            for name, solution in zip(losing.readers, pruned, strict=True):
                solutions[name] = solution, losing.told(name, own)
        moved = self._permute(layers, kept, solutions) if self._permutes else PackageResult()
        for sharing in _alike(tier, self._patterns):
            pattern = self._patterns[sharing[0].name]
            columns = [_columns(solutions.get(linear.name)) for linear in sharing]
            reduced = [_reduced(layers[linear.name], part) for linear, part in zip(sharing, columns, strict=True)]
            pruned = self._method.prune_weights(reduced, pattern, self._options)
            for linear, solution, part in zip(sharing, pruned, columns, strict=True):
                solutions[linear.name] = _widened(solution, layers[linear.name], part), str(pattern)
        return merged([moved, self._package(solutions, kept)])

    def _permute(
        self,
        layers: dict[str, Layer],
        kept: Mapping[str, tuple[int, ...]],
        solutions: Mapping[str, tuple[Pruned, str]],
    ) -> PackageResult:
        """Reorders the channels between a producer and its consumers where N:M then costs less: those that stay.

        Changes `layers`, the consumers; returns the producers' new tensors, and the orders.
        """
        moved: dict[str, Tensor] = {}
        orders: dict[str, tuple[int, ...]] = {}
        every = {linear.name for linear in self._linears}
        for group in self._groups:
            pattern = self._patterns.get(group.readers[0])
            free = [producer for producer in group.producers if producer.free]
            if (
                not isinstance(pattern, NM)
                or not free
                or not layers.keys() >= set(group.readers)
                or any(str(self._patterns.get(name)) != str(pattern) for name in group.readers)
                or any(each.name in every and each.name not in self._patterns for each in free)
            ):
                continue
            size, device = group.units * group.width, layers[group.readers[0]].weight.device
            stays = columns_of(group, kept.get(group.name, range(group.units))).to(device)
            stay = {name: _columns(solutions.get(name)) for name in group.readers}
            starts = [_before(stay[consumer.name], consumer.start) for consumer in group.consumers]
            if not _can_move(len(stays), group.width, starts, pattern):
                continue
            scores = [_score(layers[each.name])[:, stays + each.start] for each in group.consumers]
            order = stays[permute(scores, pattern, width=group.width if group.width > 1 else None)]
            orders[group.name] = tuple(order.tolist())
            places = torch.arange(size, device=device)
            places[stays] = order
            for consumer in group.consumers:
                everything = torch.arange(layers[consumer.name].weight.shape[1], device=device)
                everything[consumer.start : consumer.start + size] = places + consumer.start
                layers[consumer.name] = _reduced(layers[consumer.name], everything)
            for producer in free:
                rows = torch.cat([places + part * size for part in range(producer.parts)]) + producer.start
                for key, tensor in self._tensors(producer.name).items():
                    moved[key] = moved.get(key, tensor).clone()
                    moved[key][producer.start : producer.start + len(rows)] = tensor[rows]
        return PackageResult(weights=moved, orders=orders)

    def _package(self, solutions: Mapping[str, tuple[Pruned, str]], kept: dict[str, tuple[int, ...]]) -> PackageResult:
        weights: dict[str, Tensor] = {}
        records = []
        for name, (solution, what) in solutions.items():
            weight = weights[f"{name}.weight"] = cast(name, solution.weight, self._stored)
            if solution.bias is not None:
                weights[f"{name}.bias"] = cast(name, solution.bias, self._stored)
            stays = weight[:, solution.keep.any(dim=0)] if name in self._cluster_of else weight
            zeros = float((stays == 0).sum()) / max(stays.numel(), 1)
            records.append(LayerResult(name=name, pattern=what, loss=solution.loss, zeros=zeros))
        return PackageResult(weights=weights, kept=kept, layers=tuple(records))

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """A linear's weight and, where it has one, its bias, by name in the denoiser."""
        bias = pointwise.bias(self._denoiser, name)
        return {f"{name}.weight": pointwise.weight(self._denoiser, name)} | (
            {} if bias is None else {f"{name}.bias": bias}
        )


def _can_move(channels: int, width: int, starts: Sequence[int], pattern: NM) -> bool:
    """Whether channels fill whole groups of M: a unit's, or all, and the columns that they begin at, are multiples."""
    segment = width if width > 1 else channels
    return not segment % pattern.m and not any(start % pattern.m for start in starts)


def _before(stays: Tensor | None, start: int) -> int:
    """How many of the columns that stay lie before one; None: all stay."""
    return start if stays is None else int((stays < start).sum())


def _alike(tier: Sequence[LinearSpec], patterns: Mapping[str, Pattern]) -> list[list[LinearSpec]]:
    """The linears that get a pattern, by the tensor they read and by pattern."""
    alike: dict[tuple[str, str], list[LinearSpec]] = {}
    for linear in tier:
        if linear.name in patterns:
            alike.setdefault((linear.reads, str(patterns[linear.name])), []).append(linear)
    return list(alike.values())


def _parts(tier: Sequence[LinearSpec], groups: Sequence[Group]) -> list[list[LinearSpec]]:
    """The linears that are solved together: those that read one tensor, or lose the same units, or change places."""
    parts: list[tuple[set[str], list[LinearSpec]]] = []
    for linear in tier:
        ties = {linear.reads, *(group.name for group in groups if linear.name in group.readers)}
        near = [part for part in parts if part[0] & ties]
        parts = [part for part in parts if not part[0] & ties]
        parts.append((ties.union(*(part[0] for part in near)), [*(each for part in near for each in part[1]), linear]))
    return [linears for _, linears in parts]


def _score(layer: Layer) -> Tensor:
    """What losing a weight costs, w^2 times its input's variance, as a share of the layer's whole, (out, in)."""
    if layer.gram is None or layer.mean is None:
        raise CalibrationError(f"{layer.name}: has no moments")
    variance = (layer.gram.diagonal() - layer.mean.square()).clamp_min(0)
    score = layer.weight.double().square() * variance
    return score / score.sum().clamp_min(torch.finfo(score.dtype).tiny)


def _columns(solution: tuple[Pruned, str] | None) -> Tensor | None:
    """The columns that the removal of units left, None where none was removed."""
    return None if solution is None else solution[0].keep[0].nonzero().flatten()


def _reduced(layer: Layer, columns: Tensor | None) -> Layer:
    """The layer with these columns only, in this order."""
    if columns is None or layer.gram is None or layer.mean is None:
        return layer
    target = layer.target
    return replace(
        layer,
        weight=layer.weight[:, columns],
        gram=layer.gram[columns][:, columns],
        mean=layer.mean[columns],
        target=None if target is None else replace(target, cross=target.cross[:, columns]),
    )


def _widened(pruned: Pruned, layer: Layer, columns: Tensor | None) -> Pruned:
    """At full width again, zero in the removed columns."""
    if columns is None:
        return pruned
    weight, keep = torch.zeros_like(layer.weight), torch.zeros_like(layer.weight, dtype=torch.bool)
    weight[:, columns], keep[:, columns] = pruned.weight, pruned.keep.to(keep.device)
    return replace(pruned, weight=weight, keep=keep)
