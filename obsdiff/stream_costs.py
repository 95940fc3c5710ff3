"""What a streamed method costs: block calls, memory for streams, sums and gradients, seconds; from sizes alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from torch import nn

from obsdiff import costs, estimates, gradients, replays
from obsdiff.core import metric
from obsdiff.core.gram import BYTES_PER_ENTRY
from obsdiff.core.solver import LEAN
from obsdiff.estimates import Estimates, Streams, Workload
from obsdiff.groups import LinearSpec
from obsdiff.residuals import block_modules
from obsdiff.sensitivities import PROBES

STREAM_COPIES: Final = 2
"""Of a kept call's hidden states: one in each stream."""

PART_COPIES: Final = 2
"""Of what a part of a block gave that is not run again: one in each stream."""

SKIP_COPIES: Final = 2
"""Of what a skip connection holds: one in each stream."""

WIDE_PRODUCTS: Final = 8
"""Products of float64 around a solve, counted twice: the best dense weight, and losses."""

PASSING_COPIES: Final = 3
"""Matrices of a gram's size beside those of `estimates.SOLVER_COPIES`; measured, as no tensor shows them."""

WEIGHT_COPIES: Final = 8
"""Of the weights that are solved for together, as float64: the target, the solution, and what the solver goes by."""


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """What a streamed method does: one walk through the denoiser's blocks, all kept calls in step.

    Attributes:
        blocks: that the denoiser has.
        linears, grams: that are solved for, and distinct inputs of theirs.
        kept_calls: denoiser calls whose inputs both streams begin with.
        block_calls: runs of a block: for each kept call one of the dense and one of the pruned block for each tier that
            is solved for, as far as it must go, and one past it.
        moment_bytes: of the largest tier: grams, and the products with what the linears should compute.
        waiting_bytes: most that waits at once, in a file or a host's memory: of all kept calls at a block hidden states
            and what parts of it gave, or what every block was called with or gave; see parking.
        call_bytes: held of it in memory: one call's, and the texts that the calls were recorded with.
        gradient_calls: what differentiating some of the kept calls comes to in whole denoiser calls.
        gradient_bytes: held while that is done: sums of gradients, and one block's activations in one call.
        metric_bytes: of what it leaves.
        denoiser_calls: of the trajectories, of the gradients, and what the blocks' runs come to in whole ones.
    """

    blocks: int
    linears: int
    grams: int
    kept_calls: int
    block_calls: int
    moment_bytes: int
    waiting_bytes: int
    call_bytes: int
    gradient_calls: int
    gradient_bytes: int
    metric_bytes: int
    denoiser_calls: float


def plan_streams(
    everything: Sequence[LinearSpec],
    solved: Sequence[LinearSpec],
    workload: Workload,
    streams: Streams,
    *,
    positions: Mapping[str, int],
    element: int,
    waiting_bytes: int | None = None,
) -> StreamPlan:
    """What the streams take.

    Args:
        everything: the linears of all blocks.
        solved: those that are pruned.
        workload: whose `streams` these are.
        streams: how much is looked at.
        positions: costs.positions.
        element: bytes of an activation's entry.
        waiting_bytes: what a row of a call that waits at a block holds, where it is most; None: an estimate.
    """
    tiers = _tiers(solved)
    blocks = walks(everything, solved, replay=streams.replay)
    kept = max((PART_COPIES * block.kept_entries(positions) for block in blocks), default=0)
    hidden = _hidden(everything, positions) if waiting_bytes is None else STREAM_COPIES * waiting_bytes // element
    held = hidden + kept
    called = sum(_called(everything, positions).values())
    waiting = (PROBES if streams.measuring_calls else bool(streams.metric)) * workload.rows * called
    rows = round(workload.evaluations * workload.kept_share)
    work = sum(block.work(positions) for block in blocks) / max(sum(block.whole(positions) for block in blocks), 1)
    differentiated = gradients.COST * gradients.count(workload.kept_calls) if streams.metric else 0
    return StreamPlan(
        blocks=len(blocks),
        linears=len(solved),
        grams=len({linear.reads for tier in tiers for linear in tier}),
        kept_calls=workload.kept_calls,
        block_calls=workload.kept_calls * sum(block.runs for block in blocks),
        moment_bytes=max((moment_bytes(tier) for tier in tiers), default=0),
        waiting_bytes=element * max(rows * held, waiting),
        call_bytes=element * (workload.rows * held + rows * _texts(everything, positions)),
        gradient_calls=differentiated,
        gradient_bytes=_gradient_bytes(everything, workload.rows, positions, element) if streams.metric else 0,
        metric_bytes=sum(metric.metric_bytes(each.out_features) for each in everything) if streams.metric else 0,
        denoiser_calls=workload.calls + streams.measuring_calls + differentiated + workload.kept_calls * work,
    )


def moment_bytes(tier: Sequence[LinearSpec]) -> int:
    """What the sums of one tier take: grams of distinct inputs, and a product of input and target for each linear.

    Linears that write to a residual stream have a second product, for the gap of the streams.
    """
    grams = sum(width * width for width in estimates.gram_widths(tier).values())
    crosses = sum(linear.out_features * linear.in_features * (1 if linear.writes is None else 2) for linear in tier)
    return BYTES_PER_ENTRY * (grams + crosses)


def estimate_streams(
    denoiser: nn.Module,
    workload: Workload,
    streams: Streams,
    found: StreamPlan,
    *,
    everything: Sequence[LinearSpec],
    solved: Sequence[LinearSpec],
    positions: Mapping[str, int],
    macs: int,
    parameters_after: int,
) -> Estimates:
    """`estimate` for a streamed method; `found` is what `plan_streams` gives of the same arguments.

    Beside what any method holds there are the largest block's dense copy, and the weights that are being solved for.
    """
    plain = estimates.estimate(
        denoiser,
        replace(workload, calibrates=False),
        packages=[solved],
        gram_bytes=found.moment_bytes + found.call_bytes,
        positions=positions,
        macs=macs,
        parameters_after=parameters_after,
    )
    rows = workload.evaluations * workload.kept_share
    measured = workload.evaluations / max(workload.calls, 1) * streams.measuring_calls
    differentiated = workload.evaluations / max(workload.calls, 1) * found.gradient_calls
    blocks = walks(everything, solved, replay=streams.replay)
    walked = rows * sum(block.work(positions) for block in blocks)
    networks = ((workload.evaluations + measured + differentiated) * macs + walked) * estimates.NETWORK_SLOWDOWN * 2
    called = workload.calls + streams.measuring_calls + found.gradient_calls
    products = 0.0
    modules = len(positions) * called + workload.kept_calls * sum(block.runs * len(block.linears) for block in blocks)
    for tier in _tiers(solved):
        for linear in tier:
            tokens = rows * min(positions[linear.name], streams.tokens)
            sides = linear.out_features * (1 if linear.writes is None else 2)
            products += 2 * tokens * linear.in_features * sides
        products += sum(
            2 * rows * min(positions[each.name], streams.tokens) * each.in_features**2
            for each in {linear.reads: linear for linear in tier}.values()
        )
    copied = max(block_bytes(denoiser, everything), default=0)  # a dense one runs beside the pruned one
    walking = copied + _solved_bytes(solved) + _passing_bytes(solved)
    still = estimates.WORKSPACE_BYTES + costs.weight_bytes(denoiser) + workload.other_bytes
    return replace(
        plain,
        memory_bytes=max(plain.memory_bytes + walking + found.metric_bytes, still + found.gradient_bytes),
        calibration_seconds=(networks + products) / workload.flops_per_second + modules * estimates.MODULE_SECONDS,
        scratch_bytes=found.waiting_bytes,
        solver_seconds=sum(_solver_operations(tier) for tier in _tiers(solved)) / workload.flops_per_second,
    )


@dataclass(frozen=True)
class Walk:
    """How a block is walked through, tier by tier; see replays.

    Attributes:
        linears: of the block.
        tiers: that are solved for, in their order.
        parts: of those linears that lie in a part of the block which need not run again, its name.
        settled: the last tier that is solved for in a part, by its name.
    """

    linears: Sequence[LinearSpec]
    tiers: Sequence[int]
    parts: Mapping[str, str]
    settled: Mapping[str, int]

    @property
    def runs(self) -> int:
        """Of the dense and the pruned block for a kept call."""
        return 2 * len(self.tiers) + 1 if self.tiers else 2

    def whole(self, positions: Mapping[str, int]) -> int:
        """MACs of one run for a row."""
        return _macs(self.linears, positions)

    def work(self, positions: Mapping[str, int]) -> int:
        """MACs of all its runs for a row."""
        if not self.tiers:
            return 2 * self.whole(positions)
        *_, last = self.tiers
        found = 0
        for tier in self.tiers:
            dense = [each for each in self.linears if tier == last or each.tier <= tier or self._part(each) == tier]
            found += _macs((each for each in dense if self._part(each) >= tier), positions)
            pruned = (each for each in self.linears if each.tier < tier and not self._ran(each, tier))
            found += _macs(pruned, positions)
        return found + _macs((each for each in self.linears if self._part(each) >= last), positions)

    def kept_entries(self, positions: Mapping[str, int]) -> int:
        """Numbers that its parts give for a row, of those that are run but once."""
        ends = [
            each
            for each in self.linears
            if each.tier == self._part(each) and any(tier > each.tier for tier in self.tiers)
        ]
        return sum(positions[each.name] * each.out_features for each in ends)

    def _part(self, linear: LinearSpec) -> float:
        """The tier behind which what it lies in runs no more in the dense block."""
        return self.settled.get(self.parts.get(linear.name, ""), math.inf)

    def _ran(self, linear: LinearSpec, tier: int) -> bool:
        """Whether, before that tier, the pruned block has run what it lies in as it will stay."""
        return any(self._part(linear) < each < tier for each in self.tiers)


def walks(everything: Sequence[LinearSpec], solved: Sequence[LinearSpec], *, replay: bool) -> list[Walk]:
    """Of all blocks, in their order.

    Args:
        everything: the linears of all blocks.
        solved: those that are pruned.
        replay: whether parts of a block that need not run again do not.
    """
    found = []
    for index, name in zip(sorted({each.block for each in everything}), block_modules(everything), strict=True):
        own = [each for each in everything if each.block == index]
        lying = {each.name: replays.part_of(name, each) for each in own} if replay else {}
        parts = {linear: part for linear, part in lying.items() if part is not None}
        changing = [each for each in solved if each.block == index]
        settled: dict[str, int] = {}
        for each in changing:
            if each.name in parts:
                settled[parts[each.name]] = max(settled.get(parts[each.name], 0), each.tier)
        tiers = sorted({each.tier for each in changing})
        found.append(Walk(own, tiers, parts, settled))
    return found


def _macs(linears: Iterable[LinearSpec], positions: Mapping[str, int]) -> int:
    return sum(positions[each.name] * each.in_features * each.out_features for each in linears)


def check_budget(linears: Sequence[LinearSpec], budget_bytes: int | None) -> None:
    """Raises ResourceError where the sums of one tier take more than this; a streamed method holds one tier's."""
    for tier in _tiers(linears) if budget_bytes is not None else ():
        estimates.check_fits(tier, moment_bytes(tier), budget_bytes or 0)


def _solver_operations(tier: Sequence[LinearSpec]) -> float:
    """d^3 / 3 for a factor, d^3 for an inverse, 2 out d^2 for a product; what is in float64 counts twice."""
    rounds = len(LEAN.penalties) * LEAN.iterations + LEAN.refits
    factors = sum((2 / 3 + len(LEAN.penalties)) * width**3 for width in estimates.gram_widths(tier).values())
    products = sum(2 * (rounds + WIDE_PRODUCTS) * linear.out_features * linear.in_features**2 for linear in tier)
    return factors + products


def _gradient_bytes(linears: Sequence[LinearSpec], rows: int, positions: Mapping[str, int], element: int) -> int:
    """Of the sums; of what the largest block is called with, for one call, and of what it computes from it."""
    sums = sum(metric.sum_bytes(linear.out_features) for linear in linears)
    held = _called(linears, positions)
    for linear in linears:
        entries = positions[linear.name] * (linear.in_features + linear.out_features)
        held[linear.block] += estimates.ACTIVATION_COPIES * entries
    return sums + element * rows * max(held.values(), default=0)


def _called(linears: Sequence[LinearSpec], positions: Mapping[str, int]) -> dict[int, int]:
    """Entries of a row that each block is called with, which is about what it gives, by its index."""
    read: dict[tuple[int, str], int] = {}
    for linear in linears:
        read.setdefault((linear.block, linear.tokens), positions[linear.name] * linear.in_features)
    found: dict[int, int] = {}
    for (block, _), entries in read.items():
        found[block] = found.get(block, 0) + entries
    return found


def _texts(linears: Sequence[LinearSpec], positions: Mapping[str, int]) -> int:
    """Entries of a row's text, as blocks read it: about what the denoiser does."""
    sizes = {linear.tokens: positions[linear.name] * linear.in_features for linear in reversed(linears)}
    return sizes.get("text", 0)


def block_bytes(denoiser: nn.Module, linears: Sequence[LinearSpec]) -> list[int]:
    """What the weights of each block take."""
    return [costs.weight_bytes(denoiser.get_submodule(name)) for name in block_modules(linears)]


def _solved_bytes(solved: Sequence[LinearSpec]) -> int:
    """Of the weights that read one tensor, where they are most."""
    sizes: dict[str, int] = {}
    for linear in solved:
        sizes[linear.reads] = sizes.get(linear.reads, 0) + linear.in_features * linear.out_features
    return WEIGHT_COPIES * BYTES_PER_ENTRY * max(sizes.values(), default=0)


def _passing_bytes(solved: Sequence[LinearSpec]) -> int:
    """Of matrices of a gram's size that last as long as one operation of the solver."""
    widest = max(estimates.gram_widths(solved).values(), default=0)
    return PASSING_COPIES * BYTES_PER_ENTRY * widest * widest


def _hidden(linears: Sequence[LinearSpec], positions: Mapping[str, int]) -> int:
    """Entries of a row's hidden states, all copies, at the block where they are most.

    A sequence is held from the first block that reads it to the last, so that a UNet's skip connections are counted;
    those between blocks of one sequence are held for the linears that say `since` when.
    """
    sizes = {linear.tokens: positions[linear.name] * linear.in_features for linear in reversed(linears)}
    first = {linear.tokens: linear.block for linear in reversed(linears)}
    last = {linear.tokens: linear.block for linear in linears}
    skips = [
        (linear.since, linear.block, positions[linear.name] * linear.in_features // 2)
        for linear in linears
        if linear.since is not None
    ]

    def held(block: int) -> int:
        sequences = sum(size for key, size in sizes.items() if first[key] <= block <= last[key])
        skipped = sum(size for start, end, size in skips if start < block <= end)
        return STREAM_COPIES * sequences + SKIP_COPIES * skipped

    return max((held(linear.block) for linear in linears), default=0)


def _tiers(linears: Sequence[LinearSpec]) -> list[tuple[LinearSpec, ...]]:
    """The linears by block and tier, in forward order."""
    found: dict[tuple[int, int], list[LinearSpec]] = {}
    for linear in linears:
        found.setdefault((linear.block, linear.tier), []).append(linear)
    return [tuple(tier) for _, tier in sorted(found.items())]
