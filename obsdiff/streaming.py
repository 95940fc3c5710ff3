"""Prunes a denoiser block by block along two streams: the dense model and the model as pruned so far.

Both run on the inputs of the dense model's own trajectories. When block b is pruned, one stream waits at it with what
the dense blocks before it computed, the other with what the pruned ones did. So every linear sees the inputs that it
will get, and is fitted to what the dense model computes at that place; nothing is run twice but the block at hand.
"""

import copy
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff import calibration, moments, offloading, pausing, pointwise, ranks, replays, trajectories
from obsdiff.clusters import clusters
from obsdiff.core.metric import Metric
from obsdiff.core.permutation import permute
from obsdiff.families import Family
from obsdiff.groups import Group, LinearSpec
from obsdiff.methods import Layer, Method, Options, Pruned
from obsdiff.methods.result import cast
from obsdiff.pausing import PausedPass
from obsdiff.recipe import Recipe
from obsdiff.replays import Replay
from obsdiff.residuals import block_modules
from obsdiff.results import Journal, LayerResult, PackageResult, Sensitivity, merged
from obsdiff.sparsity import NM, Pattern
from obsdiff.trajectories import Call, Guidance
from obsdiff_runtime.errors import CalibrationError
from obsdiff_runtime.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What happens to which layer.

    Attributes:
        removals: group name -> units that go, where any go.
        patterns: linear name -> its pattern.
        dense: linear name -> why it stays dense though a pattern was asked for.
        sensitivities: what was measured to decide it; see allocation.
    """

    groups: tuple[Group, ...]
    removals: Mapping[str, int]
    patterns: Mapping[str, Pattern]
    dense: Mapping[str, str]
    sensitivities: tuple[Sensitivity, ...] = ()


def record(pipeline: DiffusionPipeline, family: Family, recipe: Recipe, progress: Progress) -> list[Call]:
    """The dense model's denoiser calls that everything is fitted on.

    Raises:
        CalibrationError: there is no prompt, or an output is not finite.
    """
    prompts = calibration.encode(pipeline, family, recipe.prompts, recipe.sampling)
    return trajectories.record(
        pipeline,
        family,
        calibration.repeated(prompts, recipe.draws),
        recipe.sampling,
        computed_steps=recipe.trajectory_steps,
        kept_steps=recipe.kept_steps,
        progress=progress,
    )


def prune(
    denoiser: nn.Module,
    family: Family,
    recipe: Recipe,
    method: Method,
    options: Options,
    calls: Sequence[Call],
    metrics: Mapping[str, Metric],
    assignment: Assignment,
    *,
    stored: torch.dtype,
    journal: Journal | None,
    progress: Progress,
) -> PackageResult:
    """Prunes the denoiser in place along recorded calls; removed units are zero columns, not yet cut.

    `metrics` is what errors of a linear's output cost, by name; see gradients.

    Returns:
        what was done, without the weights: the denoiser has them.

    Raises:
        CalibrationError: statistics that cannot be used; names the layer.
        ModelError: the denoiser does not run its blocks once each, in order.
    """
    run = _Run(denoiser, family, recipe, method, options, assignment, calls, metrics, stored)
    results: list[PackageResult] = []
    with torch.no_grad(), pausing.gated([denoiser.get_submodule(name) for name in run.blocks]):
        run.start()
        for done in range(len(run.blocks)):
            index, name = run.next()
            progress("prune blocks", done, len(run.blocks), name)
            result = journal.read(f"block-{index}") if journal is not None else None
            result = run.block(index, name, result)
            if journal is not None:
                journal.write(f"block-{index}", result)
            results.append(replace(result, weights={}))
        run.finish()
        progress("prune blocks", len(run.blocks), len(run.blocks))
    return merged(results)


class _Side:
    """A block as one of the streams runs it, and what its parts gave, call by call.

    Args:
        block: dense, or being pruned.
        name: of it in the denoiser.
        linears: parts that hold one of them need not run again.
        calls: how many there are.
    """

    def __init__(self, block: nn.Module, name: str, linears: Sequence[LinearSpec], calls: int) -> None:
        self.block, self._name = block, name
        self._parts = replays.parts(block, name, linears)
        self._results: list[replays.Results] = [{} for _ in range(calls)]

    def replay(self, call: int, unsettled: Collection[str] = ()) -> Replay:
        """For a run before these modules of the denoiser change; those of other blocks do not matter."""
        inside = [name for name in unsettled if f"{name}.".startswith(f"{self._name}.")]
        modules = [replays.within(self.block, self._name, name) for name in inside]
        return Replay(self._parts, self._results[call], modules)

    def past(self, call: int) -> None:
        """Lets go of what was kept for a call."""
        self._results[call].clear()


class _Run:
    """The two streams of one run, and the block at which they wait."""

    def __init__(
        self,
        denoiser: nn.Module,
        family: Family,
        recipe: Recipe,
        method: Method,
        options: Options,
        assignment: Assignment,
        calls: Sequence[Call],
        metrics: Mapping[str, Metric],
        stored: torch.dtype,
    ) -> None:
        self._denoiser, self._family = denoiser, family
        self._method, self._options, self._metrics = method, options, metrics
        self._assignment, self._calls, self._stored = assignment, calls, stored
        self._linears = family.linears(denoiser)
        self.blocks = block_modules(self._linears)
        self._patterns = assignment.patterns
        self._weights = trajectories.weights(calls, recipe)
        self._recipe = recipe
        self._guidance = Guidance.of(family, denoiser, recipe.sampling)
        self._groups = family.groups(denoiser)
        losing = [group for group in assignment.groups if assignment.removals.get(group.name)]
        self._cluster_of = {name: each for each in clusters(losing) for name in each.readers}

    def start(self) -> None:
        self._dense = [PausedPass(self._denoiser, call.arguments) for call in self._calls]
        self._pruned = [PausedPass(self._denoiser, call.arguments) for call in self._calls]
        self._ahead = {index: self._denoiser.get_submodule(name) for index, name in enumerate(self.blocks)}

    def next(self) -> tuple[int, str]:
        """Index and name of the block that the denoiser goes on with, in its own order.

        Raises:
            ModelError: it goes on with none, or with one that was run before.
        """
        index = pausing.next_block(self._dense[0], self._ahead, self.blocks)
        del self._ahead[index]
        return index, self.blocks[index]

    def block(self, index: int, name: str, known: PackageResult | None) -> PackageResult:
        """Prunes a block, or sets it to what is known of it, and moves both streams past it."""
        block = self._denoiser.get_submodule(name)
        with offloading.on_device(block):
            return self._past(index, name, block, known)

    def _past(self, index: int, name: str, block: nn.Module, known: PackageResult | None) -> PackageResult:
        for stream in (self._dense, self._pruned):
            pausing.check_at(stream, block, name)
        linears = [linear for linear in self._linears if linear.block == index and self._changes(linear)]
        if known is None and linears:
            return self._solve(block, name, linears)
        for waiting in self._dense:
            waiting.resume(pausing.run(block, waiting.arguments))
        known = known or PackageResult()
        self._write(known.weights)
        for waiting in self._pruned:
            waiting.resume(pausing.run(block, waiting.arguments))
        return known

    def finish(self) -> None:
        for stream in (self._dense, self._pruned):
            pausing.check_over(stream, self.blocks[-1])

    def _solve(self, block: nn.Module, name: str, linears: Sequence[LinearSpec]) -> PackageResult:
        """Prunes a block tier by tier, and moves both streams past it."""
        replayed = linears if self._recipe.replay else ()
        dense, pruned = (_Side(each, name, replayed, len(self._calls)) for each in (copy.deepcopy(block), block))
        found: list[PackageResult] = []
        tiers = [list(tier) for _, tier in groupby(sorted(linears, key=_tier_of), key=_tier_of)]
        for place, tier in enumerate(tiers):
            behind = [linear.name for each in tiers[place + 1 :] for linear in each]
            found.append(self._tier(tier, behind, name, dense, pruned))
            self._write(found[-1].weights)
        for place, waiting in enumerate(self._pruned):
            with pruned.replay(place).on():
                output = pausing.run(block, waiting.arguments)
            pruned.past(place)
            waiting.resume(output)
        return merged(found)

    def _changes(self, linear: LinearSpec) -> bool:
        return linear.name in self._patterns or linear.name in self._cluster_of

    def _tier(
        self, tier: Sequence[LinearSpec], behind: Sequence[str], name: str, dense: _Side, pruned: _Side
    ) -> PackageResult:
        """Collects a tier's moments over all calls and solves it, on several ranks part by part.

        Where no linears are left to change `behind` it in the block, the dense stream moves past the block.
        """
        sums = moments.TierMoments(tier, self._weight(tier[0].name).device, self._guidance, self._recipe.guided)
        repair = self._recipe.repair
        later = [each for each in self._linears if each.block == tier[0].block and each.tier > tier[0].tier]
        idle = later if self._family.described else []  # else tiers may not be in the order in which they run
        skipped = idle if behind else []
        want: moments.Wanted = "outputs" if behind else "result"
        ahead = [*behind, *(linear.name for linear in skipped)]
        unsettled = self._with_producers([*(linear.name for linear in (*tier, *idle)), *behind])
        for place, (call, weight) in enumerate(zip(self._calls, self._weights, strict=True)):
            look = partial(moments.glance, name=name, linears=tier, streams=repair > 0, masks=call.masks)
            before, after = self._dense[place].arguments, self._pruned[place].arguments
            again = dense.replay(place, ahead)
            wanted, output = look(dense.block, arguments=before, want=want, idle=skipped, replay=again)
            again = pruned.replay(place, unsettled)
            seen, _ = look(pruned.block, arguments=after, want="inputs", idle=idle, replay=again)
            sums.add(wanted, seen, weight, paired=call.paired)
            if not behind:
                dense.past(place)
                self._dense[place].resume(output)
        grams, targets = sums.finish(repair)
        layers = {
            linear.name: Layer(
                name=linear.name,
                weight=self._weight(linear.name),
                gram=grams[linear.reads].matrix,
                mean=grams[linear.reads].mean,
                bias=self._bias(linear.name),
                target=targets[linear.name] if self._recipe.dense_targets else None,
                metric=self._metrics.get(linear.name),
            )
            for linear in tier
        }

        def solved(part: Sequence[LinearSpec]) -> PackageResult:
            members = {linear.name: layers[linear.name] for linear in part}
            moved = self._permute(members) if self._recipe.permute else PackageResult()
            return merged([moved, self._solved(part, members)])

        return merged(ranks.solve(_parts(tier, self._groups), solved))

    def _with_producers(self, names: Collection[str]) -> set[str]:
        """These linears, and those whose rows change places when they are pruned."""
        groups = [group for group in self._groups if not set(group.readers).isdisjoint(names)]
        return {*names, *(producer.name for group in groups for producer in group.producers)}

    def _permute(self, layers: dict[str, Layer]) -> PackageResult:
        """Reorders the channels between a producer and its consumers where N:M then costs less.

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
                or not can_move(group, pattern)
                or any(name in self._cluster_of for name in group.readers)
                or any(each.name in every and each.name not in self._patterns for each in free)
            ):
                continue
            size = group.units * group.width
            own = {consumer.name: slice(consumer.start, consumer.start + size) for consumer in group.consumers}
            scores = [_score(layers[name])[:, columns] for name, columns in own.items()]
            order = permute(scores, pattern, width=group.width if group.width > 1 else None)
            orders[group.name] = tuple(order.tolist())
            for name, columns in own.items():
                everything = torch.arange(layers[name].weight.shape[1], device=order.device)
                everything[columns] = order + columns.start
                layers[name] = _reduced(layers[name], everything)
            for producer in free:
                rows = torch.cat([order + part * size for part in range(producer.parts)]) + producer.start
                for key, tensor in self._tensors(producer.name).items():
                    moved[key] = moved.get(key, tensor).clone()
                    moved[key][producer.start : producer.start + len(rows)] = tensor[rows]
        return PackageResult(weights=moved, orders=orders)

    def _solved(self, tier: Sequence[LinearSpec], layers: Mapping[str, Layer]) -> PackageResult:
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
        for sharing in _alike(tier, self._patterns):
            pattern = self._patterns[sharing[0].name]
            columns = [_columns(solutions.get(linear.name)) for linear in sharing]
            reduced = [_reduced(layers[linear.name], part) for linear, part in zip(sharing, columns, strict=True)]
            pruned = self._method.prune_weights(reduced, pattern, self._options)
            for linear, solution, part in zip(sharing, pruned, columns, strict=True):
                solutions[linear.name] = _widened(solution, layers[linear.name], part), str(pattern)
        return self._package(solutions, kept)

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

    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in weights.items():
            pointwise.write(self._denoiser.get_parameter(name), value)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """A linear's weight and, where it has one, its bias, by name in the denoiser."""
        bias = self._bias(name)
        return {f"{name}.weight": self._weight(name)} | ({} if bias is None else {f"{name}.bias": bias})

    def _weight(self, name: str) -> Tensor:
        return pointwise.matrix(self._denoiser.get_parameter(f"{name}.weight").data)

    def _bias(self, name: str) -> Tensor | None:
        bias = self._denoiser.get_submodule(name).bias
        return bias.data if isinstance(bias, Tensor) else None


def assign(
    linears: Sequence[LinearSpec],
    groups: Sequence[Group],
    removals: Mapping[str, int],
    pattern: Pattern | None,
) -> Assignment:
    """The same for every layer: each of `linears` gets the pattern, unless its width after the cut does not fit."""
    lost: Counter[str] = Counter()
    for group in groups:
        lost.update({name: removals.get(group.name, 0) * group.width for name in group.readers})
    patterns: dict[str, Pattern] = {}
    dense: dict[str, str] = {}
    if pattern is not None and pattern.ratio > 0:
        for linear in linears:
            left = linear.in_features - lost[linear.name]
            if isinstance(pattern, NM) and left % pattern.m:
                dense[linear.name] = f"{left} inputs are not divisible by {pattern.m}"
            else:
                patterns[linear.name] = pattern
    removed = {name: number for name, number in removals.items() if number}
    return Assignment(groups=tuple(groups), removals=removed, patterns=patterns, dense=dense)


def can_move(group: Group, pattern: NM) -> bool:
    """Whether the channels of a group fill whole groups of M: its segments and where they begin are multiples of M."""
    segment = group.width if group.width > 1 else group.units
    return not segment % pattern.m and not any(consumer.start % pattern.m for consumer in group.consumers)


def _tier_of(linear: LinearSpec) -> int:
    return linear.tier


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
