"""What it costs the denoiser's velocity to prune one thing and nothing else, measured.

candidate    a change inside one block: fewer units of a group, or a pattern in the linears that read one tensor
moment call  a recorded denoiser call whose activations the candidates' weights are solved on
probe        a recorded denoiser call on which their effect is measured, from the block at hand to the end
error        |v - v_dense|^2 / |v_dense|^2 of the denoiser's output, guided where it is; mean over prompts and probes
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from obsdiff import glances, offloading, padding, pausing, pointwise, ranks
from obsdiff.clusters import cluster
from obsdiff.core.gram import Gram, GramAccumulator
from obsdiff.core.metric import Metric
from obsdiff.core.solver import FAST
from obsdiff.groups import Group, LinearSpec
from obsdiff.methods import Layer, Method, Options
from obsdiff.methods import Pruned as PrunedLayer
from obsdiff.padding import Masks
from obsdiff.parking import STAYING, Kept, Lot
from obsdiff.pausing import PausedPass
from obsdiff.residuals import block_modules
from obsdiff.sampling import velocity_of
from obsdiff.sparsity import Pattern
from obsdiff.trajectories import Call, Guidance
from obsdiff_runtime.errors import CalibrationError
from obsdiff_runtime.progress import Progress, silent

MOMENT_CALLS: Final = 4
"""Recorded calls that the candidates are solved on, at most."""

PROBES: Final = 4
"""Recorded calls that a candidate's effect is measured on, at most."""

EARLY: Final = 0.25
"""Where in its part of the steps a probe lies. Early ones make the picture: of 70 % the middle picture's error is a
third less than with probes in the middle, and the velocity's a sixteenth."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One change to measure.

    Attributes:
        key: names it.
        block: index of its block.
        linears: whose weights it changes.
        group, removed: the units that go; None where it is a pattern.
        pattern: of single weights; None where it removes units.
    """

    key: str
    block: int
    linears: tuple[str, ...]
    group: Group | None = None
    removed: int = 0
    pattern: Pattern | None = None


def cost(candidates: Sequence[Candidate], blocks: int) -> float:
    """Denoiser calls that one probe costs: a dense one, and for each candidate from its block on."""
    return 1 + sum(blocks - candidate.block for candidate in candidates) / blocks


def spaced(calls: Sequence[Call], number: int, place: float = 0.5) -> list[int]:
    """Indices of calls, evenly spaced over the steps: of each part of them the one at `place`, 0 to 1.

    They are spaced over the calls of all ranks; those of this rank are given.
    """
    parts = ranks.gather([call.step for call in calls])
    steps = [step for part in parts for step in part]
    first = sum(len(part) for part in parts[: ranks.rank()])
    order = sorted(range(len(steps)), key=lambda index: (steps[index], index))
    number = min(number, len(steps))
    picked = [order[int((part + place) * len(order) / number)] - first for part in range(number)]
    return [index for index in picked if 0 <= index < len(calls)]


@torch.no_grad()
def measure(
    denoiser: nn.Module,
    linears: Sequence[LinearSpec],
    candidates: Sequence[Candidate],
    method: Method,
    options: Options,
    calls: Sequence[Call],
    metrics: Mapping[str, Metric],
    *,
    weights: Sequence[float],
    probes: int,
    guidance: Guidance | None = None,
    lot: Lot = STAYING,
    progress: Progress = silent,
) -> dict[str, float]:
    """The error of each candidate, by its key.

    Args:
        denoiser: dense; its weights are changed on the way and are the same bits afterwards.
        linears: all of the denoiser's.
        candidates: what to measure.
        method: solves for their weights, each against what the dense layer computes.
        options: of the method; patterns are solved with little effort.
        calls: recorded, those of this rank.
        metrics: what errors of a linear's output cost, by name.
        weights: of each call's tokens.
        probes: how many calls of all ranks a candidate is measured on, at least 1.
        guidance: by which the sampler combines the rows of a call: it is the combination's error that makes pictures.
        lot: takes what the dense blocks gave until a candidate is measured.
        progress: told block by block.

    Raises:
        CalibrationError: a layer that no token reached, activations or outputs that are not finite (names the layer),
            or an output that is exactly zero.
        ModelError: the denoiser does not run its blocks once each, in order.
    """
    if not candidates:
        return {}
    names = block_modules(linears)
    by_block: dict[int, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        by_block[candidate.block].append(candidate)
    errors: dict[str, float] = {}
    blocks = [denoiser.get_submodule(name) for name in names]
    with pausing.gated(blocks):
        probed = spaced(calls, probes, EARLY)
        dense = [_Probe(denoiser, blocks, names, calls[index], guidance, lot) for index in probed]
        count = ranks.total(len(dense))
        chosen = spaced(calls, MOMENT_CALLS)
        stream = [PausedPass(denoiser, calls[index].arguments) for index in chosen]
        counts, masks = [weights[index] for index in chosen], [calls[index].masks for index in chosen]
        solver = _Solver(denoiser, linears, method, options, metrics)
        ahead = dict(enumerate(blocks))
        for done in range(len(blocks)):
            index = pausing.next_block(stream[0], ahead, names)
            progress("measure sensitivities", done, len(blocks), names[index])
            wanted = {name for candidate in by_block[index] for name in candidate.linears}
            found = torch.zeros(len(by_block[index]), dtype=torch.float64)
            with offloading.on_device(blocks[index]):
                grams = solver.grams(blocks[index], stream, counts, masks, wanted)
                for place, candidate in enumerate(by_block[index] if dense else ()):
                    with _changed(denoiser, solver.solve(candidate, grams)):
                        found[place] = _error(dense, blocks, index)
            ranks.add_up([found])
            del ahead[index]
            for candidate, error in zip(by_block[index], (found / count).tolist(), strict=True):
                if not error < float("inf"):
                    raise CalibrationError(f"{candidate.key}: the denoiser's output is not finite once it is pruned")
                errors[candidate.key] = error
            if not by_block.keys() & ahead.keys():
                break
        for probe in dense:
            probe.drop()
        progress("measure sensitivities", len(blocks), len(blocks))
    return errors


class _Probe:
    """A dense pass of a call, with what each block gave, so that others can join it at any block."""

    def __init__(
        self,
        denoiser: nn.Module,
        blocks: Sequence[nn.Module],
        names: Sequence[str],
        call: Call,
        guidance: Guidance | None,
        lot: Lot,
    ) -> None:
        self._denoiser, self._call = denoiser, call
        self._guidance = guidance if call.paired else None
        self.outputs: dict[int, Kept] = {}  # in the order in which the blocks run
        waiting, ahead = PausedPass(denoiser, call.arguments), dict(enumerate(blocks))
        while ahead:
            index = pausing.next_block(waiting, ahead, names)
            output = pausing.run(ahead.pop(index), waiting.arguments)
            self.outputs[index] = lot.keep(output)
            waiting.resume(output)
        self._dense = self._velocity(waiting)
        self._energy = self._dense.square().sum(1)  # (rows,)
        if not bool((self._energy > 0).all()):
            raise CalibrationError(f"{call.prompts}: the denoiser's output is exactly zero; is the model trained?")

    def at(self, index: int) -> PausedPass:
        """A pass that waits at block `index`, having been given what the dense blocks before it gave."""
        waiting = PausedPass(self._denoiser, self._call.arguments)
        for place, known in self.outputs.items():
            if place == index:
                break
            waiting.resume(known.tree())
        return waiting

    def error(self, ended: PausedPass) -> float:
        """Of a pass that has run to its end, mean over rows."""
        change = (self._velocity(ended) - self._dense).square().sum(1)
        return float((change / self._energy).mean())

    def drop(self) -> None:
        """Lets go of what the blocks gave."""
        for known in self.outputs.values():
            known.drop()

    def _velocity(self, ended: PausedPass) -> Tensor:
        """(rows, numbers) in float64; of rows that are guided, their combination."""
        found = velocity_of(self._denoiser, ended.output, self._call.arguments[1]).double().flatten(1)
        return found if self._guidance is None else self._guidance.combined(found)


def _error(probes: Sequence[_Probe], blocks: Sequence[nn.Module], index: int) -> float:
    """With the weights of block `index` as they are now, the sum over probes; they run side by side.

    So a block that comes from the host's memory comes once for all of them.
    """
    passes = [probe.at(index) for probe in probes]
    order = list(probes[0].outputs)
    for place in order[order.index(index) :]:
        with offloading.lent(blocks[place]):
            for waiting in passes:
                waiting.resume(pausing.run(blocks[place], waiting.arguments))
    return sum(probe.error(ended) for probe, ended in zip(probes, passes, strict=True))


class _Solver:
    """Solves for the weights of candidates on grams of the dense model."""

    def __init__(
        self,
        denoiser: nn.Module,
        linears: Sequence[LinearSpec],
        method: Method,
        options: Options,
        metrics: Mapping[str, Metric],
    ) -> None:
        self._metrics = metrics
        self._denoiser, self._method, self._options = denoiser, method, replace(options, effort=FAST)
        self._linears = {linear.name: linear for linear in linears}

    def grams(
        self,
        block: nn.Module,
        stream: Sequence[PausedPass],
        weights: Sequence[float],
        masks: Sequence[Masks],
        wanted: set[str],
    ) -> dict[str, Gram]:
        """Moves the stream past a block and gives the grams of what these linears read, by LinearSpec.reads."""
        leaders = {self._linears[name].reads: name for name in sorted(wanted)}
        sums = {
            name: GramAccumulator(
                self._linears[name].in_features, device=self._denoiser.get_parameter(f"{name}.weight").device
            )
            for name in leaders.values()
        }

        def add(name: str, weight: float, mask: Tensor | None) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                try:
                    sums[name].add(_tokens(pointwise.tokens(module, args[0]), mask), weight)
                except CalibrationError as error:
                    raise CalibrationError(f"{name}: {error}") from None

            return hook

        for waiting, weight, shown in zip(stream, weights, masks, strict=True):
            with ExitStack() as stack:
                for name in leaders.values():
                    module, mask = self._denoiser.get_submodule(name), shown.get(self._linears[name].tokens)
                    stack.callback(module.register_forward_pre_hook(add(name, weight, mask)).remove)
                waiting.resume(pausing.run(block, waiting.arguments))
        for each in sums.values():
            ranks.add_up(each.sums())
        missed = [name for name, each in sums.items() if not each.tokens]
        if missed:
            raise CalibrationError(f"{missed[0]}: no token reached this layer; leave it out with --exclude")
        return {reads: sums[name].gram() for reads, name in leaders.items()}

    def solve(self, candidate: Candidate, grams: Mapping[str, Gram]) -> dict[str, Tensor]:
        """New tensors by parameter name."""
        layers = [self._layer(name, grams) for name in candidate.linears]
        pruned: Sequence[PrunedLayer]
        if candidate.group is not None:
            removals = cluster([candidate.group]).removals({candidate.group.name: candidate.removed})
            _, pruned = self._method.prune_units(layers, removals, self._options)
        else:
            pattern: Any = candidate.pattern
            pruned = self._method.prune_weights(layers, pattern, self._options)
        found: dict[str, Tensor] = {}
        for layer, solution in zip(layers, pruned, strict=True):
            found[f"{layer.name}.weight"] = solution.weight
            if solution.bias is not None:
                found[f"{layer.name}.bias"] = solution.bias
        return found

    def _layer(self, name: str, grams: Mapping[str, Gram]) -> Layer:
        module = self._denoiser.get_submodule(name)
        gram = grams[self._linears[name].reads]
        bias = module.bias.data if isinstance(module.bias, Tensor) else None
        weight = pointwise.weight(self._denoiser, name)
        metric = self._metrics.get(name)
        return Layer(name=name, weight=weight, gram=gram.matrix, mean=gram.mean, bias=bias, metric=metric)


@contextmanager
def _changed(denoiser: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Until the end these parameters have these values."""
    before = {name: denoiser.get_parameter(name).data.clone() for name in tensors}
    try:
        for name, value in tensors.items():
            pointwise.write(denoiser.get_parameter(name), value)
        yield
    finally:
        for name, value in before.items():
            denoiser.get_parameter(name).data.copy_(value)


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """(rows, tokens, in) -> (those that count, in): as many as of a tier's moments, or those in the mask."""
    return glances.spaced(x).flatten(0, -2) if mask is None else padding.unpadded(x, mask)
