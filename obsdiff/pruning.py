"""Prunes a pipeline's denoiser: package by package, calibrate, solve, go on with the pruned weights.

Structured sparsity comes first: units are chosen and masked package by package, then cut out physically. An N:M or
unstructured pattern follows, on what is left.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from obsdiff import (
    allocation,
    calibration,
    gradients,
    parking,
    pointwise,
    ranks,
    stream_costs,
    streaming,
    trajectories,
    turns,
    unit_costs,
)
from obsdiff.assignments import Assignment
from obsdiff.calls import by_frames
from obsdiff.clusters import Cluster, clusters
from obsdiff.core import solver
from obsdiff.core.gram import Gram
from obsdiff.core.metric import Metric
from obsdiff.families import Family
from obsdiff.groups import LinearSpec
from obsdiff.methods import Layer, Method, Options
from obsdiff.methods.result import cast
from obsdiff.methods.table import METHODS
from obsdiff.packages import split_packages
from obsdiff.parking import Lot
from obsdiff.recipe import Recipe, select
from obsdiff.residuals import block_modules
from obsdiff.results import Journal, LayerResult, PackageResult, Sensitivity, Within, merged
from obsdiff.shrinking import shrink
from obsdiff.sparsity import NM, Pattern
from obsdiff.trajectories import Call
from obsdiff_runtime.progress import Progress, silent

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A pruned denoiser in its pipeline.

    Attributes:
        pipeline: the pipeline given, with its denoiser pruned and shrunk in place.
        kept: group name -> kept units, sorted, for every group that lost some.
        units: group name -> how many units it had, for the same groups.
        orders: group name -> which channel is at each place now, of those that stay; for groups whose channels changed
            places.
        layers: one record for each linear considered.
        sensitivities: what was measured to allocate the budget, where it was.
        behind: the denoisers that take their turns behind this one, where some do.
    """

    pipeline: DiffusionPipeline
    family: Family
    recipe: Recipe
    kept: Mapping[str, tuple[int, ...]]
    units: Mapping[str, int]
    layers: tuple[LayerResult, ...]
    orders: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sensitivities: tuple[Sensitivity, ...] = ()
    behind: "tuple[Pruned, ...]" = ()

    @property
    def turns(self) -> "tuple[Pruned, ...]":
        """All that take turns, this one first."""
        return (self, *self.behind)

    @property
    def denoiser(self) -> nn.Module:
        module: nn.Module = getattr(self.pipeline, self.family.denoiser)
        return module

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """By name, in turn."""
        return {each.family.denoiser: each.denoiser for each in self.turns}

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_json(),
            "kept": {name: list(units) for name, units in self.kept.items()},
            "layers": [asdict(layer) for layer in self.layers],
            "sensitivities": [asdict(sensitivity) for sensitivity in self.sensitivities],
            **({"behind": {each.family.denoiser: each.to_json() for each in self.behind}} if self.behind else {}),
        }


def prune(
    pipeline: DiffusionPipeline,
    family: Family,
    recipe: Recipe,
    *,
    stored: torch.dtype = torch.float32,
    journal: Journal | None = None,
    scratch: Path | None = None,
    progress: Progress = silent,
) -> Pruned:
    """Prunes `pipeline` in place; where ranks have joined (ranks.py), all of them call this and get the same.

    Denoisers that take turns are pruned from the last to the first: so each is calibrated on what dense ones drew.

    Args:
        pipeline: complete enough to run: text encoders, denoiser, scheduler; the VAE is not used.
        family: of its denoiser.
        recipe: what to do.
        stored: dtype the weights will be saved in; results are rounded to it at once, so that later layers and the
            pattern check see the weights as stored.
        journal: finished packages, read and written.
        scratch: folder on whose disk hidden states may lie meanwhile; None: where the system has such files.
        progress: told of calibration and solving.

    Raises:
        CalibrationError: statistics that cannot be used.
        ConfigError: a selection that leaves nothing, or more ranks than batches of prompts.
        RunError: another rank failed.
    """
    found: tuple[Pruned, ...] = ()
    with by_frames(pipeline):
        for each in reversed(turns.families(pipeline, family)):
            own = journal if journal is None or each is family else Within(journal, each.denoiser)
            pruned = _prune(pipeline, each, recipe, stored=stored, journal=own, scratch=scratch, progress=progress)
            found = (pruned, *found)
    return replace(found[0], behind=found[1:])


def _prune(
    pipeline: DiffusionPipeline,
    family: Family,
    recipe: Recipe,
    *,
    stored: torch.dtype,
    journal: Journal | None,
    scratch: Path | None,
    progress: Progress,
) -> Pruned:
    """One denoiser; see `prune`."""
    method = METHODS[recipe.method]
    denoiser: nn.Module = getattr(pipeline, family.denoiser)
    run = _Run(pipeline, family, recipe, method, stored, ranks.shared(journal), scratch, progress)
    units = {group.name: group.units for group in family.groups(denoiser)}
    if method.streams:
        found = run.streamed()
        shrink(denoiser, family, found.kept)
    else:
        kept: dict[str, tuple[int, ...]] = {}
        layers: list[LayerResult] = []
        if recipe.sparsity.structured:
            kept, layers = run.structured()
            shrink(denoiser, family, kept)
        if recipe.sparsity.pattern is not None:
            layers += run.pattern(recipe.sparsity.pattern)
        found = PackageResult(kept=kept, layers=tuple(layers))
    return Pruned(
        pipeline=pipeline,
        family=family,
        recipe=recipe,
        kept=found.kept,
        units={name: units[name] for name in found.kept},
        orders=found.orders,
        layers=found.layers,
        sensitivities=run.sensitivities,
    )


class _Run:
    """The state of one pruning run: the model as pruned so far, and the prompts once encoded."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        family: Family,
        recipe: Recipe,
        method: Method,
        stored: torch.dtype,
        journal: Journal | None,
        scratch: Path | None,
        progress: Progress,
    ) -> None:
        self._pipeline = pipeline
        self._family = family
        self._recipe = recipe
        self._method = method
        self._stored = stored
        self._journal = journal
        self._scratch = scratch
        self._progress = progress
        effort = solver.SWEPT if not recipe.joint else solver.FAST if recipe.fast else solver.LEAN
        self._options = Options(damp=recipe.damp, block=recipe.block_columns, effort=effort)
        self._denoiser: nn.Module = getattr(pipeline, family.denoiser)
        self._prompts: calibration.Prompts | None = None
        self.sensitivities: tuple[Sensitivity, ...] = ()

    def streamed(self) -> PackageResult:
        """Prunes block by block along two streams, units and single weights in one go."""
        subject = (self._denoiser, self._family, self._recipe)
        assignment = allocation.uniform(*subject)
        if not assignment.removals and not assignment.patterns:
            return self._left_dense(assignment)
        stream_costs.check_budget(self._solved(assignment), self._recipe.gram_budget_bytes)
        calls = streaming.record(self._pipeline, self._family, self._recipe, self._progress)
        blocks = [self._denoiser.get_submodule(name) for name in block_modules(self._family.linears(self._denoiser))]
        with parking.lot(self._denoiser, blocks, [call.arguments for call in calls], self._scratch) as lot:
            how = (self._method, self._options)
            seen = (calls, self._metrics(calls, lot))
            if self._recipe.allocation != "uniform":
                assignment = allocation.measured(
                    *subject, *how, *seen, lot=lot, journal=self._journal, progress=self._progress
                )
            self.sensitivities = assignment.sensitivities
            pruned = streaming.prune(
                *subject,
                *how,
                *seen,
                assignment,
                lot=lot,
                stored=self._stored,
                journal=self._journal,
                progress=self._progress,
            )
        return merged([self._left_dense(assignment), pruned])

    def _metrics(self, calls: Sequence[Call], lot: Lot) -> dict[str, Metric]:
        if not self._recipe.metric:
            return {}
        return gradients.measure(
            self._denoiser,
            self._family.linears(self._denoiser),
            calls,
            weights=trajectories.weights(calls, self._recipe),
            lot=lot,
            journal=self._journal,
            progress=self._progress,
        )

    def _solved(self, assignment: Assignment) -> list[LinearSpec]:
        """The linears of the uniform rule that will be solved for."""
        consumers = {name for group in assignment.groups if group.name in assignment.removals for name in group.readers}
        linears = self._family.linears(self._denoiser)
        return [linear for linear in linears if linear.name in assignment.patterns or linear.name in consumers]

    def _left_dense(self, assignment: Assignment) -> PackageResult:
        for name, reason in assignment.dense.items():
            log.warning("%s stays dense: %s", name, reason)
        layers = (
            LayerResult(name=name, pattern="dense", loss=None, zeros=0.0, reason=reason)
            for name, reason in assignment.dense.items()
        )
        return PackageResult(layers=tuple(layers))

    def structured(self) -> tuple[dict[str, tuple[int, ...]], list[LayerResult]]:
        """Chooses and masks units; returns the kept ones."""
        linears = {linear.name: linear for linear in self._family.linears(self._denoiser)}
        _, groups = select(self._recipe, tuple(linears.values()), self._family.groups(self._denoiser))
        removals = unit_costs.removals(groups, self._recipe.sparsity, align=self._recipe.align)
        groups = tuple(group for group in groups if removals.get(group.name, 0) > 0)
        of_linear = {name: each for each in clusters(groups) for name in each.readers}
        kept: dict[str, tuple[int, ...]] = {}
        records: list[LayerResult] = []

        def solve(
            package: Sequence[LinearSpec], grams: Mapping[str, Gram], done: Callable[[str], None]
        ) -> PackageResult:
            def remove(cluster: Cluster) -> PackageResult:
                members = [self._layer(linears[name], grams) for name in cluster.readers]
                keep, solutions = self._method.prune_units(members, cluster.removals(removals), self._options)
                own = {group.name: tuple(units.tolist()) for group, units in zip(cluster.groups, keep, strict=True)}
                weights, layers = {}, []
                for layer, solution in zip(members, solutions, strict=True):
                    weights[f"{layer.name}.weight"] = cast(layer.name, solution.weight, self._stored)
                    pattern = cluster.told(layer.name, own)
                    layers.append(LayerResult(name=layer.name, pattern=pattern, loss=_loss(solution.loss), zeros=0.0))
                done(" ".join(own))
                return PackageResult(weights=weights, kept=own, layers=tuple(layers))

            return merged(ranks.solve(list(dict.fromkeys(of_linear[linear.name] for linear in package)), remove))

        consumers = [linear for linear in linears.values() if linear.name in of_linear]
        for result in self._packages("units", consumers, solve, _pieces(of_linear)):
            kept.update(result.kept)
            records += result.layers
        return kept, records

    def pattern(self, pattern: Pattern) -> list[LayerResult]:
        """Prunes single weights; linears whose width does not fit an N:M pattern stay dense."""
        linears, _ = select(self._recipe, self._family.linears(self._denoiser), self._family.groups(self._denoiser))
        records: list[LayerResult] = []
        fitting = []
        for linear in linears:
            if isinstance(pattern, NM) and linear.in_features % pattern.m:
                reason = f"{linear.in_features} inputs are not divisible by {pattern.m}"
                log.warning("%s stays dense: %s", linear.name, reason)
                records.append(LayerResult(name=linear.name, pattern="dense", loss=None, zeros=0.0, reason=reason))
            else:
                fitting.append(linear)

        def solve(
            package: Sequence[LinearSpec], grams: Mapping[str, Gram], done: Callable[[str], None]
        ) -> PackageResult:
            def remove(sharing: Sequence[LinearSpec]) -> PackageResult:
                members = [self._layer(linear, grams) for linear in sharing]
                solutions = self._method.prune_weights(members, pattern, self._options)
                weights, layers = {}, []
                for layer, solution in zip(members, solutions, strict=True):
                    weight = weights[f"{layer.name}.weight"] = cast(layer.name, solution.weight, self._stored)
                    zeros = float((weight == 0).sum()) / weight.numel()
                    layers.append(
                        LayerResult(name=layer.name, pattern=str(pattern), loss=_loss(solution.loss), zeros=zeros)
                    )
                    done(layer.name)
                return PackageResult(weights=weights, layers=tuple(layers))

            return merged(ranks.solve(_by_input(package), remove))

        for result in self._packages("weights", fitting, solve, len):
            records += result.layers
        return records

    def _packages(
        self,
        kind: str,
        linears: Sequence[LinearSpec],
        solve: Callable[[Sequence[LinearSpec], Mapping[str, Gram], Callable[[str], None]], PackageResult],
        pieces: Callable[[Sequence[LinearSpec]], int],
    ) -> "list[PackageResult]":
        """Calibrates and solves package by package; finished ones come from the journal."""
        if not linears:
            return []
        packages = (
            split_packages(linears, packages=self._recipe.packages, budget_bytes=self._recipe.gram_budget_bytes)
            if self._method.calibrates
            else [tuple(linears)]
        )
        results: list[PackageResult] = []
        solved, total = 0, sum(pieces(package) for package in packages)
        for index, package in enumerate(packages):
            key = f"{kind}-{index}"
            result = self._journal.read(key) if self._journal is not None else None
            if result is None:
                grams = self._grams(package, f"calibrate {kind} {index + 1}/{len(packages)}")

                def told(name: str, count: Iterator[int] = iter(range(solved + 1, total + 1))) -> None:  # noqa: B008
                    self._progress(f"prune {kind}", next(count), total, name)

                result = solve(package, grams, told)
                del grams  # before the next ones are collected
                if self._journal is not None:
                    self._journal.write(key, result)
            solved += pieces(package)
            self._progress(f"prune {kind}", solved, total)
            for name, weight in result.weights.items():
                pointwise.write(self._denoiser.get_parameter(name), weight)
            result = replace(result, weights={})  # the denoiser holds them now
            results.append(result)
        return results

    def _grams(self, package: Sequence[LinearSpec], stage: str) -> Mapping[str, Gram]:
        if not self._method.calibrates:
            return {}
        sampling = self._recipe.sampling
        if self._prompts is None:
            self._prompts = calibration.encode(self._pipeline, self._family, self._recipe.prompts, sampling)
        return calibration.calibrate(
            self._pipeline,
            self._family,
            package,
            self._prompts,
            sampling,
            time_weights=self._recipe.time_weights,
            progress=self._progress,
            stage=stage,
        )

    def _layer(self, linear: LinearSpec, grams: Mapping[str, Gram]) -> Layer:
        weight = pointwise.weight(self._denoiser, linear.name)
        if not self._method.calibrates:
            return Layer(name=linear.name, weight=weight, gram=None)
        gram = grams[linear.reads]
        return Layer(name=linear.name, weight=weight, gram=gram.matrix, mean=gram.mean)


def _loss(loss: float) -> float | None:
    return None if loss != loss else loss


def _pieces(of_linear: Mapping[str, Cluster]) -> Callable[[Sequence[LinearSpec]], int]:
    return lambda package: len({of_linear[linear.name] for linear in package})


def _by_input(linears: Sequence[LinearSpec]) -> list[list[LinearSpec]]:
    """The linears by the tensor they read, hence by gram, in forward order."""
    sharing: dict[str, list[LinearSpec]] = {}
    for linear in linears:
        sharing.setdefault(linear.reads, []).append(linear)
    return list(sharing.values())
