"""Where a budget is spent: which group loses how many units, which linear how many weights, and which stay dense.

`uniform` takes the same share everywhere, as the paper does. `measured` saves at least the same multiply-accumulates
(MACs) where it costs the denoiser's velocity least: groups differ a thousandfold. Every candidate is measured alone, in
an otherwise dense model (sensitivities.py), and errors of several are taken to add up.

With a latency table (`latency:FILE`, latencies.py) it is time that is saved: the budget is what the uniform rule's cuts
would save by that table, and a group's units are worth what the table says. Removals cost the same error either way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn

from obsdiff import costs, latencies, ranks, sensitivities, trajectories, unit_costs
from obsdiff.assignments import Assignment, assign
from obsdiff.core import budget
from obsdiff.core.budget import Option
from obsdiff.core.metric import Metric
from obsdiff.core.support import count
from obsdiff.families import Family
from obsdiff.groups import Group, LinearSpec
from obsdiff.latencies import Times
from obsdiff.methods import Method, Options
from obsdiff.parking import STAYING, Lot
from obsdiff.recipe import Recipe, select
from obsdiff.residuals import block_modules
from obsdiff.results import Journal, PackageResult, Sensitivity
from obsdiff.sampling import named
from obsdiff.sensitivities import Candidate
from obsdiff.sparsity import NM, Pattern, Unstructured
from obsdiff.trajectories import Call, Guidance
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.progress import Progress

EFFORT: Final = 0.75
"""What measuring may cost, as a share of the denoiser calls that recording took; one probe is always made."""

WIDTHS: Final = 64
"""Widths of a feed-forward that are considered, at most."""

REACH: Final = 0.25
"""How far the share of single weights that a linear loses may be from the one asked for, down or up."""

MOST: Final = 0.95
"""The largest share of single weights that a linear loses, unless more is asked for."""

DOUBLING: Final = 0.1
"""Of a linear's weights: so many more removed double its error, and so many fewer halve it. Measured on the shipped
pipeline between 60 % and 70 %; half or twice of it gives the same quality."""

MIDDLE: Final = 3 / 8
"""Of a feed-forward's neurons: the smaller of the two shares at which its error is measured; the other is the most
that can go. In between the error is interpolated."""


def uniform(denoiser: nn.Module, family: Family, recipe: Recipe) -> Assignment:
    """The same share of every group, the same pattern in every linear."""
    linears, groups = select(recipe, family.linears(denoiser), family.groups(denoiser))
    removals = unit_costs.removals(groups, recipe.sparsity, align=recipe.align)
    return assign(linears, groups, removals, recipe.sparsity.pattern)


def measured(
    denoiser: nn.Module,
    family: Family,
    recipe: Recipe,
    method: Method,
    options: Options,
    calls: Sequence[Call],
    metrics: Mapping[str, Metric],
    *,
    lot: Lot = STAYING,
    journal: Journal | None,
    progress: Progress,
) -> Assignment:
    """Spends the uniform rule's MACs, or time, where they cost least, and the dense share where pruning costs most.

    Args:
        denoiser: dense; the same bits afterwards.
        family: of it.
        recipe: `spared` blocks keep their units; otherwise the protection is the uniform rule's alone.
        method: that will prune, and solves for the candidates.
        options: of the method.
        calls: recorded, those of this rank; see trajectories.
        metrics: what errors of a linear's output cost, by name; see gradients.
        lot: takes what blocks gave; see parking.
        journal: keeps what was measured, so that a run that goes on prunes what it began.
        progress: told of the measuring.

    Raises:
        CalibrationError: see sensitivities.measure.
        ConfigError: the latency table lacks a shape, or has no cut of the uniform rule save time.
    """
    everything = family.linears(denoiser)
    first, last = recipe.spared
    linears, groups = select(
        replace(recipe, protect_first=first, protect_last=last), everything, family.groups(denoiser)
    )
    spending = _Spending(denoiser, recipe, linears, groups, positions(denoiser, calls[0]), everything)
    paper = uniform(denoiser, family, recipe)
    wanted = spending.worth(paper.groups, paper.removals)
    by_weight = recipe.dense_share > 0 or isinstance(recipe.sparsity.pattern, Unstructured)
    candidates = spending.candidates(units=wanted > 0, weights=by_weight)
    known = journal.read("allocation") if journal is not None else None
    if known is None:
        probes = _probes(recipe, candidates, len(block_modules(everything)), ranks.total(len(calls)))
        errors = sensitivities.measure(
            denoiser,
            everything,
            candidates,
            method,
            options,
            calls,
            metrics,
            weights=trajectories.weights(calls, recipe),
            probes=probes,
            guidance=Guidance.of(family, denoiser, recipe.sampling),
            lot=lot,
            progress=progress,
        )
        known = PackageResult(errors=errors)
        if journal is not None:
            journal.write("allocation", known)
    found = assign(linears, groups, spending.removals(wanted, known.errors), recipe.sparsity.pattern)
    found = spending.spread(spending.spare(found, known.errors), known.errors)
    return replace(found, sensitivities=spending.table(candidates, known.errors))


@dataclass(frozen=True, kw_only=True)
class _Readers:
    """The linears that read one tensor: they stay dense together or not at all."""

    name: str
    block: int
    linears: tuple[str, ...]


class _Spending:
    """What can be removed, and what it saves."""

    def __init__(
        self,
        denoiser: nn.Module,
        recipe: Recipe,
        linears: Sequence[LinearSpec],
        groups: Sequence[Group],
        positions: Mapping[str, int],
        everything: Sequence[LinearSpec],
    ) -> None:
        self._denoiser, self._recipe, self._positions, self._linears = denoiser, recipe, positions, linears
        sparsity = recipe.sparsity
        self._groups = [group for group in groups if _share(group, recipe) > 0]
        self._numbers = {group.name: removable(group, recipe.align) for group in self._groups}
        self._readers = _readers(linears, sparsity.pattern)
        self._times: Times | None = None
        if latencies.is_latency(recipe.allocation):
            self._times = Times(latencies.table_of(recipe.allocation), everything, positions)
            self._times.require(spendable(self._groups, recipe))

    def worth(self, groups: Sequence[Group], removals: Mapping[str, int]) -> float:
        """What these removals save, in what the budget is in: MACs of one image, or milliseconds of the table's call.

        Raises:
            ConfigError: units go and the table has them save no time.
        """
        if self._times is None:
            return self.saved(groups, removals)
        ms = self._times.saved_ms(groups, removals)
        if ms <= 0 and any(removals.values()):
            raise ConfigError(
                "--allocation latency: by this table the cuts asked for save no time, so there is nothing to allocate; "
                "ask for more, or use --allocation measured"
            )
        return ms

    def saved(self, groups: Sequence[Group], removals: Mapping[str, int]) -> int:
        """MACs of one image that these removals save."""
        return unit_costs.saved_macs(self._denoiser, groups, removals, self._positions)

    def candidates(self, *, units: bool, weights: bool) -> list[Candidate]:
        """What is measured."""
        found: list[Candidate] = []
        for group in self._groups if units else ():
            for number in probed(group, self._numbers[group.name]):
                key = f"{group.name} {number}"
                found.append(Candidate(key=key, block=group.block, linears=group.readers, group=group, removed=number))
        pattern = self._recipe.sparsity.pattern
        for readers in self._readers if weights else ():
            found.append(Candidate(key=readers.name, block=readers.block, linears=readers.linears, pattern=pattern))
        return found

    def removals(self, wanted: float, errors: Mapping[str, float]) -> dict[str, int]:
        """How many units each group loses, so that `wanted` is saved at least error."""
        if wanted == 0:
            return {}
        worth = [[self._worth_of(group, number) for number in self._numbers[group.name]] for group in self._groups]
        savings, goal = _whole(worth, wanted)
        items: list[list[Option]] = []
        for group, numbers in zip(self._groups, savings, strict=True):
            curve = {
                number / group.units: errors[f"{group.name} {number}"]
                for number in probed(group, self._numbers[group.name])
            }
            items.append(
                [
                    Option(saving=saving, error=budget.interpolate(curve, number / group.units))
                    for number, saving in zip(self._numbers[group.name], numbers, strict=True)
                ]
            )
        chosen = budget.choose(items, min(goal, budget.most(items)))
        return {group.name: self._numbers[group.name][index] for group, index in zip(self._groups, chosen, strict=True)}

    def _worth_of(self, group: Group, number: int) -> float:
        return (
            self.saved([group], {group.name: number})
            if self._times is None
            else self._times.saved_ms([group], {group.name: number})
        )

    def spare(self, assignment: Assignment, errors: Mapping[str, float]) -> Assignment:
        """Takes the pattern from the linears where it costs most, up to the share of MACs that may stay dense."""
        if self._recipe.dense_share == 0:
            return assignment
        readers = [each for each in self._readers if all(name in assignment.patterns for name in each.linears)]
        left = unit_costs.left_macs(self._linears, assignment.groups, assignment.removals, self._positions)
        macs = [sum(left[name] for name in each.linears) for each in readers]
        pruned = sum(macs) - int(sum(macs) * self._recipe.dense_share)
        items = [
            [Option(saving=0, error=0.0), Option(saving=size, error=errors[each.name])]
            for each, size in zip(readers, macs, strict=True)
        ]
        chosen = budget.choose(items, pruned)
        dense = {
            name: f"costs most: {errors[each.name]:.2g} of the velocity if pruned"
            for each, index in zip(readers, chosen, strict=True)
            if index == 0
            for name in each.linears
        }
        patterns = {name: pattern for name, pattern in assignment.patterns.items() if name not in dense}
        return replace(assignment, patterns=patterns, dense={**assignment.dense, **dense})

    def spread(self, assignment: Assignment, errors: Mapping[str, float]) -> Assignment:
        """Under an unstructured pattern, linears that read one tensor lose a share of their own; as many go in all."""
        pattern = self._recipe.sparsity.pattern
        if not isinstance(pattern, Unstructured):
            return assignment
        readers = [each for each in self._readers if all(name in assignment.patterns for name in each.linears)]
        left = unit_costs.left_macs(
            self._linears, assignment.groups, assignment.removals, dict.fromkeys(self._positions, 1)
        )
        sizes = [sum(left[name] for name in each.linears) for each in readers]
        ratios = ratios_near(pattern.ratio)
        items = [
            [
                Option(saving=count(size, ratio), error=errors[each.name] * 2 ** ((ratio - pattern.ratio) / DOUBLING))
                for ratio in ratios
            ]
            for each, size in zip(readers, sizes, strict=True)
        ]
        chosen = budget.choose(items, sum(count(size, pattern.ratio) for size in sizes))
        patterns = {
            name: Unstructured(ratio=ratios[index])
            for each, index in zip(readers, chosen, strict=True)
            for name in each.linears
        }
        return replace(assignment, patterns={**assignment.patterns, **patterns})

    def table(self, candidates: Sequence[Candidate], errors: Mapping[str, float]) -> tuple[Sensitivity, ...]:
        """What was measured, as a record."""
        whole = unit_costs.left_macs(self._linears, (), {}, self._positions)
        records = []
        for candidate in candidates:
            group = candidate.group
            if group is not None:
                change = f"{group.kind} {group.units - candidate.removed}/{group.units}"
                name, ratio = group.name, candidate.removed / group.units
                macs = self.saved([group], {group.name: candidate.removed})
            else:
                pattern: Any = candidate.pattern
                name, change, ratio = candidate.key, str(pattern), pattern.ratio
                macs = round(ratio * sum(whole[linear] for linear in candidate.linears))
            records.append(Sensitivity(name=name, change=change, ratio=ratio, error=errors[candidate.key], macs=macs))
        return tuple(records)


def _whole(worth: Sequence[Sequence[float]], wanted: float) -> tuple[list[list[int]], int]:
    """Savings and budget as whole numbers of one unit; MACs are that already."""
    flat = [*(value for values in worth for value in values), wanted]
    *numbers, goal = (
        [int(value) for value in flat] if all(isinstance(value, int) for value in flat) else budget.whole(flat)
    )
    left = iter(numbers)
    return [[next(left) for _ in values] for values in worth], goal


def ratios_near(ratio: float) -> list[float]:
    """Shares of single weights that a linear may lose where `ratio` is asked for: hundredths up and down from it."""
    steps = range(-round(100 * REACH), round(100 * REACH) + 1)
    near = [round(ratio + step / 100, 6) for step in steps]
    return [value for value in near if 0 < value <= max(MOST, ratio)]


def spendable(groups: Sequence[Group], recipe: Recipe) -> list[Group]:
    """Those that the sparsity takes units from and that can lose some."""
    return [group for group in groups if _share(group, recipe) > 0 and len(removable(group, recipe.align)) > 1]


def _share(group: Group, recipe: Recipe) -> float:
    return recipe.sparsity.heads if group.kind == "heads" else recipe.sparsity.ffn


def removable(group: Group, align: int) -> list[int]:
    """The numbers of units that a group can lose, ascending from 0.

    Heads: all but one. Neurons: so that a multiple of `align` is kept, at most WIDTHS widths, the narrowest among them.
    """
    if group.kind == "heads":
        return list(range(group.units))
    step = align * -(-group.units // (align * WIDTHS))
    kept = {align, *range(step, group.units, step)} if group.units > align else set()
    return [0, *sorted(group.units - width for width in kept)]


def probed(group: Group, numbers: Sequence[int]) -> list[int]:
    """Where the error is measured: of heads the first, the middle and the last of the numbers, of neurons two."""
    some = [number for number in numbers if number]
    if not some:
        return []
    if group.kind == "heads":
        picked = {some[0], some[len(some) // 2], some[-1]}
    else:
        picked = {min(some, key=lambda number: abs(number / group.units - MIDDLE)), some[-1]}
    return sorted(picked)


def _readers(linears: Sequence[LinearSpec], pattern: Pattern | None) -> list[_Readers]:
    together: dict[tuple[int, str], list[LinearSpec]] = {}
    for linear in linears if pattern is not None else ():
        if not isinstance(pattern, NM) or linear.in_features % pattern.m == 0:
            together.setdefault((linear.block, linear.reads), []).append(linear)
    return [
        _Readers(
            name=" ".join(linear.name for linear in sharing),
            block=block,
            linears=tuple(linear.name for linear in sharing),
        )
        for (block, _), sharing in together.items()
    ]


def _probes(recipe: Recipe, candidates: Sequence[Candidate], blocks: int, calls: int) -> int:
    """On how many calls the candidates are measured: as many as EFFORT pays for, 1 to PROBES."""
    passes = -(-len(recipe.prompts) // recipe.sampling.batch_size)
    affordable = EFFORT * passes * recipe.sampling.num_inference_steps - min(calls, sensitivities.MOMENT_CALLS)
    return min(max(int(affordable / sensitivities.cost(candidates, blocks)), 1), sensitivities.PROBES)


def positions(denoiser: nn.Module, call: Call) -> dict[str, int]:
    """Tokens of each linear for one image, by making a call."""
    args, kwargs = call.arguments
    inputs = named(denoiser, args, kwargs)
    rows = next(len(each) for each in inputs.values() if isinstance(each, list) or getattr(each, "ndim", 0) > 1)
    with costs.counting(denoiser) as found, torch.no_grad():
        denoiser(*args, **kwargs)
    return {name: number // rows for name, number in found.items()}
