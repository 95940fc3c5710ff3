"""Prunes a denoiser block by block along two streams: the dense model and the model as pruned so far.

Both run on the inputs of the dense model's own trajectories. When block b is pruned, one stream waits at it with what
the dense blocks before it computed, the other with what the pruned ones did. So every linear sees the inputs that it
will get, and is fitted to what the dense model computes at that place; nothing is run twice but the block at hand.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff import calibration, glances, moments, offloading, pausing, pointwise, replays, trajectories
from obsdiff.assignments import Assignment
from obsdiff.core.metric import Metric
from obsdiff.families import Family
from obsdiff.groups import LinearSpec
from obsdiff.methods import Layer, Method, Options
from obsdiff.parking import Lot
from obsdiff.pausing import PausedPass
from obsdiff.recipe import Recipe
from obsdiff.replays import Replay
from obsdiff.residuals import block_modules
from obsdiff.results import Journal, PackageResult, merged
from obsdiff.solving import TierSolver
from obsdiff.trajectories import Call, Guidance
from obsdiff_runtime.progress import Progress


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
    lot: Lot,
    stored: torch.dtype,
    journal: Journal | None,
    progress: Progress,
) -> PackageResult:
    """Prunes the denoiser in place along recorded calls; removed units are zero columns, not yet cut.

    `metrics` is what errors of a linear's output cost, by name (see gradients); `lot` takes the calls that wait.

    Returns:
        what was done, without the weights: the denoiser has them.

    Raises:
        CalibrationError: statistics that cannot be used; names the layer.
        ModelError: the denoiser does not run its blocks once each, in order.
    """
    run = _Run(denoiser, family, recipe, method, options, assignment, calls, metrics, lot, stored)
    results: list[PackageResult] = []
    with torch.no_grad(), pausing.gated([denoiser.get_submodule(name) for name in run.blocks]):
        run.start()
        for done in range(len(run.blocks)):
            index, name = run.next()
            progress("prune blocks", done, len(run.blocks), name)
            known = journal.read(f"block-{index}") if journal is not None else None
            result = run.block(index, name, known)
            if journal is not None and known is None:
                journal.write(f"block-{index}", result)
            results.append(replace(result, weights={}))
        run.finish()
        progress("prune blocks", len(run.blocks), len(run.blocks))
    return merged(results)


class _Side:
    """A block as one of the streams runs it.

    Args:
        block: dense, or being pruned.
        name: of it in the denoiser.
        linears: parts that hold one of them need not run again.
    """

    def __init__(self, block: nn.Module, name: str, linears: Sequence[LinearSpec]) -> None:
        self.block, self._name = block, name
        self._parts = replays.parts(block, name, linears)

    def modules(self, names: Collection[str]) -> list[nn.Module]:
        """Modules of the denoiser, those that lie in the block."""
        inside = [name for name in names if f"{name}.".startswith(f"{self._name}.")]
        return [replays.within(self.block, self._name, name) for name in inside]

    def replay(self, waiting: PausedPass, unsettled: Collection[nn.Module] = ()) -> Replay:
        """For a run of a pass's call before these modules of the block change."""
        return Replay(self._parts, waiting.results, unsettled)


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
        lot: Lot,
        stored: torch.dtype,
    ) -> None:
        self._denoiser, self._family = denoiser, family
        self._calls, self._metrics, self._lot = calls, metrics, lot
        self._linears = family.linears(denoiser)
        self.blocks = block_modules(self._linears)
        self._weights = trajectories.weights(calls, recipe)
        self._recipe = recipe
        self._guidance = Guidance.of(family, denoiser, recipe.sampling)
        self._groups = family.groups(denoiser)
        self._solver = TierSolver(
            denoiser, self._linears, self._groups, method, options, assignment, permutes=recipe.permute, stored=stored
        )

    def start(self) -> None:
        self._dense: list[PausedPass] = []
        self._pruned: list[PausedPass] = []
        for call in self._calls:
            twins = [PausedPass(self._denoiser, call.arguments) for _ in range(2)]
            self._lot.take(twins)
            for stream, waiting in zip((self._dense, self._pruned), twins, strict=True):
                stream.append(waiting)
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
        linears = [linear for linear in self._linears if linear.block == index and self._solver.changes(linear.name)]
        if known is None and linears:
            return self._solve(block, name, linears)
        self._move(self._dense, block)
        known = known or PackageResult()
        self._write(known.weights)
        self._move(self._pruned, block)
        return known

    def _move(self, stream: Sequence[PausedPass], block: nn.Module) -> None:
        for waiting in stream:
            with self._lot.here(waiting):
                waiting.resume(pausing.run(block, waiting.arguments))

    def finish(self) -> None:
        for stream in (self._dense, self._pruned):
            pausing.check_over(stream, self.blocks[-1])

    def _solve(self, block: nn.Module, name: str, linears: Sequence[LinearSpec]) -> PackageResult:
        """Prunes a block tier by tier, and moves both streams past it."""
        replayed = linears if self._recipe.replay else ()
        dense, pruned = (_Side(each, name, replayed) for each in (copy.deepcopy(block), block))
        found: list[PackageResult] = []
        tiers = [list(tier) for _, tier in groupby(sorted(linears, key=_tier_of), key=_tier_of)]
        for place, tier in enumerate(tiers):
            behind = [linear.name for each in tiers[place + 1 :] for linear in each]
            found.append(self._tier(tier, behind, name, dense, pruned))
            self._write(found[-1].weights)
        for waiting in self._pruned:
            with self._lot.here(waiting):
                with pruned.replay(waiting).on():
                    output = pausing.run(block, waiting.arguments)
                waiting.resume(output)
        return merged(found)

    def _tier(
        self, tier: Sequence[LinearSpec], behind: Sequence[str], name: str, dense: _Side, pruned: _Side
    ) -> PackageResult:
        """Collects a tier's moments over all calls and solves it, on several ranks part by part.

        Where no linears are left to change `behind` it in the block, the dense stream moves past the block.
        """
        sums = moments.TierMoments(
            tier, pointwise.weight(self._denoiser, tier[0].name).device, self._guidance, self._recipe.guided
        )
        repair = self._recipe.repair
        later = [each for each in self._linears if each.block == tier[0].block and each.tier > tier[0].tier]
        idle = later if self._family.described else []  # else tiers may not be in the order in which they run
        skipped = idle if behind else []
        want: glances.Wanted = "outputs" if behind else "result"
        ahead = dense.modules([*behind, *(linear.name for linear in skipped)])
        unsettled = pruned.modules(self._with_producers([*(linear.name for linear in (*tier, *idle)), *behind]))
        for call, weight, before, after in zip(self._calls, self._weights, self._dense, self._pruned, strict=True):
            look = partial(glances.glance, name=name, linears=tier, streams=repair > 0, masks=call.masks)
            with self._lot.here(before, after):
                again = dense.replay(before, ahead)
                wanted, output = look(dense.block, arguments=before.arguments, want=want, idle=skipped, replay=again)
                again = pruned.replay(after, unsettled)
                seen, _ = look(pruned.block, arguments=after.arguments, want="inputs", idle=idle, replay=again)
                sums.add(wanted, seen, weight, paired=call.paired)
                if not behind:
                    before.resume(output)
        grams, targets = sums.finish(repair)
        layers = {
            linear.name: Layer(
                name=linear.name,
                weight=pointwise.weight(self._denoiser, linear.name),
                gram=grams[linear.reads].matrix,
                mean=grams[linear.reads].mean,
                bias=pointwise.bias(self._denoiser, linear.name),
                target=targets[linear.name] if self._recipe.dense_targets else None,
                metric=self._metrics.get(linear.name),
            )
            for linear in tier
        }
        return self._solver.solve(tier, layers)

    def _with_producers(self, names: Collection[str]) -> set[str]:
        """These linears, and those whose rows change places when they are pruned."""
        groups = [group for group in self._groups if not set(group.readers).isdisjoint(names)]
        return {*names, *(producer.name for group in groups for producer in group.producers)}

    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in weights.items():
            pointwise.write(self._denoiser.get_parameter(name), value)


def _tier_of(linear: LinearSpec) -> int:
    return linear.tier
