"""What a run will do and cost, from the configuration alone: nothing here looks at a weight's value.

tier       linears of one block that do not read one another's outputs; always calibrated together
package    consecutive tiers whose grams are collected in one calibration pass
streams    the dense model and the one pruned so far, walked through block by block; such a method has no packages
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from obsdiff import costs, estimates, stream_costs, turns
from obsdiff.decoding import Decoding
from obsdiff.estimates import Estimates, Streams, Workload
from obsdiff.families import HELP, Family
from obsdiff.groups import Group, LinearSpec
from obsdiff.packages import gram_bytes, split_packages
from obsdiff.sparsity import NM, Pattern, Sparsity
from obsdiff.stream_costs import StreamPlan
from obsdiff.unit_costs import lost, removals, savings


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A group and what is left of it; `kept` equals `units` where rounding leaves it whole."""

    name: str
    kind: str
    block: int
    units: int
    kept: int
    width: int


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """A linear before and after.

    Attributes:
        inputs, outputs: its widths today.
        kept_inputs, kept_outputs: its widths after the cut.
        positions: tokens it runs over for one image.
        pattern: "2:4", "0.5", or None where its weights are not pruned one by one.
        reason: why a pattern was wanted and does not apply.
    """

    name: str
    block: int
    inputs: int
    outputs: int
    kept_inputs: int
    kept_outputs: int
    positions: int
    pattern: str | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class PackagePlan:
    """One calibration pass: what it is for ("units" or "weights"), its linears and its distinct grams."""

    kind: str
    linears: int
    grams: int
    gram_bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do.

    Attributes:
        parameters_before, parameters_after: of the whole denoiser; a pattern removes none.
        zeros: weights that a pattern sets to zero, of those that are left.
        macs_before, macs_after: of one denoiser call on one image (see costs); a pattern's zeros count.
        cuts: every group whose units may go.
        layers: every linear that is selected for a pattern, or loses rows or columns.
        packages: the calibration passes, in order; none where the method does not calibrate, or is streamed.
        streams: what a streamed method does; None for the others.
        gram_bytes: the most memory that grams (and a streamed method's other sums) take at a time.
        denoiser_calls: calls that calibration makes, over all passes; of a streamed method, of its trajectories.
        notes: what may surprise: groups that rounding leaves whole, linears that stay dense.
        estimates: labelled as such.
        turns: the plan of each denoiser where several take turns, by name; the others' numbers are then of all of them.
        decoding: what decoding will take; None where nobody asked, or it is not known.
    """

    sparsity: str
    parameters_before: int
    parameters_after: int
    zeros: int
    macs_before: int
    macs_after: int
    cuts: tuple[Cut, ...]
    layers: tuple[LayerPlan, ...]
    packages: tuple[PackagePlan, ...]
    streams: StreamPlan | None = None
    gram_bytes: int
    denoiser_calls: int
    notes: tuple[str, ...]
    estimates: Estimates
    turns: "Mapping[str, Plan]" = field(default_factory=dict)
    decoding: Decoding | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    denoiser: nn.Module,
    family: Family,
    sparsity: Sparsity,
    *,
    linears: Sequence[LinearSpec],
    groups: Sequence[Group],
    positions: Mapping[str, int],
    align: int,
    workload: Workload,
    allocation: str = "uniform",
    waiting_bytes: int | None = None,
) -> Plan:
    """Plans a run.

    Args:
        denoiser: on any device; the meta device is enough.
        family: of the denoiser.
        sparsity: what is removed.
        linears: those whose weights a pattern prunes: after include, exclude and block ranges.
        groups: those whose units may go: after the same, and without protected blocks.
        positions: of the denoiser, from costs.positions.
        align: kept FFN widths are rounded to a multiple of this; 1 is the paper's.
        workload: how much calibration there is, and what it runs on.
        allocation: "uniform"; "measured": units that save as many MACs will be chosen from what is measured; or by a
            latency table: units that save as much time.
        waiting_bytes: see `plan_streams`.

    Raises:
        ResourceError: the byte budget is smaller than one tier's grams.
    """
    removed = removals(groups, sparsity, align=align)
    rows, columns = lost(groups, removed)
    specs = family.linears(denoiser)
    layers = _layers(specs, linears, rows, columns, positions, sparsity.pattern)
    parameters = costs.parameters(denoiser)
    parameters_lost, macs_lost = savings(denoiser, rows, columns, positions)
    macs = costs.macs(denoiser, positions)
    packages = _packages(specs, groups, removed, layers, sparsity.pattern, workload)
    described = tuple(_describe(kind, package) for kind, package in packages)
    sizes: dict[str, Any] = {"positions": positions, "macs": macs, "parameters_after": parameters - parameters_lost}
    solved = _solved(specs, groups, removed, layers) if workload.streams is not None else []
    found = None
    if workload.streams is not None and solved:
        found = _streams(denoiser, specs, solved, workload, workload.streams, positions, waiting_bytes)
        estimated = stream_costs.estimate_streams(
            denoiser, workload, workload.streams, found, everything=specs, solved=solved, **sizes
        )
        gram_bytes, calls = found.moment_bytes, workload.calls
    else:
        gram_bytes = max((package.gram_bytes for package in described), default=0)
        calls = len(described) * workload.calls
        estimated = estimates.estimate(
            denoiser, workload, packages=[package for _, package in packages], gram_bytes=gram_bytes, **sizes
        )
    return Plan(
        sparsity=str(sparsity),
        parameters_before=parameters,
        parameters_after=parameters - parameters_lost,
        zeros=sum(_zeros(layer, sparsity.pattern) for layer in layers),
        macs_before=macs,
        macs_after=macs - macs_lost,
        cuts=tuple(_cut(group, removed[group.name]) for group in groups) if sparsity.structured else (),
        layers=layers,
        packages=described,
        streams=found,
        gram_bytes=gram_bytes,
        denoiser_calls=calls,
        notes=(*_undescribed(family), *_notes(groups, removed, layers, sparsity, align, allocation)),
        estimates=estimated,
    )


def together(plans: Mapping[str, Plan]) -> Plan:
    """The plan of denoisers that take turns and are pruned one after another: names say whose something is.

    Sizes and work add up, MACs to those of one call of each; memory is that of the one that needs most.
    """
    first, *others = plans.values()
    if not others:
        return first
    every = (first, *others)

    def named(kind: str) -> tuple[Any, ...]:
        return turns.told_apart({name: getattr(plan, kind) for name, plan in plans.items()})

    estimated = [plan.estimates for plan in every]
    streams = [plan.streams for plan in every if plan.streams is not None]
    return replace(
        first,
        **_sums(every, "parameters_before", "parameters_after", "zeros", "macs_before", "macs_after", "denoiser_calls"),
        cuts=named("cuts"),
        layers=named("layers"),
        packages=tuple(package for plan in every for package in plan.packages),
        streams=replace(
            streams[0],
            **_sums(
                streams, "blocks", "linears", "grams", "kept_calls", "block_calls", "gradient_calls", "denoiser_calls"
            ),
            **{
                kind: max(getattr(each, kind) for each in streams)
                for kind in ("moment_bytes", "waiting_bytes", "call_bytes", "gradient_bytes", "metric_bytes")
            },
        )
        if streams
        else None,
        gram_bytes=max(plan.gram_bytes for plan in every),
        notes=tuple(dict.fromkeys(note for plan in every for note in plan.notes)),
        estimates=replace(
            estimated[0],
            **_sums(estimated, "checkpoint_bytes", "calibration_seconds", "solver_seconds"),
            memory_bytes=max(each.memory_bytes for each in estimated),
            scratch_bytes=max(each.scratch_bytes for each in estimated),
        ),
        turns=dict(plans),
    )


def offloaded(plan: Plan, denoisers: Mapping[nn.Module, Family], *, beside: int) -> Plan:
    """The plan where blocks lie in the host's memory and visit the GPU one at a time; see offloading.

    And so do the networks that are not pruned, with `beside` bytes.
    """
    sizes = [stream_costs.block_bytes(denoiser, family.linears(denoiser)) for denoiser, family in denoisers.items()]
    blocks = [size for each in sizes for size in each]
    estimates = plan.estimates
    away = sum(blocks) - max(blocks)
    return replace(
        plan,
        estimates=replace(
            estimates,
            memory_bytes=estimates.memory_bytes - away - beside,
            host_bytes=sum(blocks) + beside + estimates.scratch_bytes,
        ),
    )


def _sums(parts: Sequence[object], *names: str) -> dict[str, Any]:
    return {name: sum(getattr(part, name) for part in parts) for name in names}


def _layers(
    specs: Sequence[LinearSpec],
    selected: Sequence[LinearSpec],
    rows: Counter[str],
    columns: Counter[str],
    positions: Mapping[str, int],
    pattern: Pattern | None,
) -> tuple[LayerPlan, ...]:
    wanted = {linear.name for linear in selected} if pattern is not None else set()
    layers = []
    for spec in specs:
        if spec.name not in wanted and not rows[spec.name] and not columns[spec.name]:
            continue
        kept_inputs = spec.in_features - columns[spec.name]
        fits = not isinstance(pattern, NM) or kept_inputs % pattern.m == 0
        applies = spec.name in wanted and fits
        layers.append(
            LayerPlan(
                name=spec.name,
                block=spec.block,
                inputs=spec.in_features,
                outputs=spec.out_features,
                kept_inputs=kept_inputs,
                kept_outputs=spec.out_features - rows[spec.name],
                positions=positions.get(spec.name, 0),
                pattern=str(pattern) if applies else None,
                reason=f"{kept_inputs} inputs are no multiple of {pattern.m}"
                if isinstance(pattern, NM) and spec.name in wanted and not fits
                else None,
            )
        )
    return tuple(layers)


def _packages(
    specs: Sequence[LinearSpec],
    groups: Sequence[Group],
    removed: Mapping[str, int],
    layers: Sequence[LayerPlan],
    pattern: Pattern | None,
    workload: Workload,
) -> list[tuple[str, tuple[LinearSpec, ...]]]:
    """The calibration passes: for units first, then for weights at their widths after the cut."""
    if not workload.calibrates or workload.streams is not None:
        return []
    consumers = {name for group in groups if removed[group.name] for name in group.readers}
    units = [spec for spec in specs if spec.name in consumers]
    after = {layer.name: layer for layer in layers if layer.pattern is not None}
    weights = [
        replace(spec, in_features=after[spec.name].kept_inputs, out_features=after[spec.name].kept_outputs)
        for spec in specs
        if spec.name in after and pattern is not None and pattern.ratio > 0
    ]
    return [
        (kind, package)
        for kind, linears in (("units", units), ("weights", weights))
        for package in split_packages(linears, packages=workload.packages, budget_bytes=workload.budget_bytes)
    ]


def _solved(
    specs: Sequence[LinearSpec], groups: Sequence[Group], removed: Mapping[str, int], layers: Sequence[LayerPlan]
) -> list[LinearSpec]:
    """The linears that a streamed method solves for."""
    names = {name for group in groups if removed[group.name] for name in group.readers}
    names |= {layer.name for layer in layers if layer.pattern not in (None, "0")}
    return [spec for spec in specs if spec.name in names]


def _streams(
    denoiser: nn.Module,
    specs: Sequence[LinearSpec],
    solved: Sequence[LinearSpec],
    workload: Workload,
    streams: Streams,
    positions: Mapping[str, int],
    waiting_bytes: int | None,
) -> StreamPlan:
    stream_costs.check_budget(solved, workload.budget_bytes)
    element = max((parameter.element_size() for parameter in denoiser.parameters()), default=4)
    return stream_costs.plan_streams(
        specs, solved, workload, streams, positions=positions, element=element, waiting_bytes=waiting_bytes
    )


def _describe(kind: str, package: Sequence[LinearSpec]) -> PackagePlan:
    return PackagePlan(
        kind=kind,
        linears=len(package),
        grams=len(estimates.gram_widths(package)),
        gram_bytes=gram_bytes(package),
    )


def _cut(group: Group, removed: int) -> Cut:
    return Cut(
        name=group.name,
        kind=group.kind,
        block=group.block,
        units=group.units,
        kept=group.units - removed,
        width=group.width,
    )


def _zeros(layer: LayerPlan, pattern: Pattern | None) -> int:
    if pattern is None or layer.pattern is None:
        return 0
    return round(layer.kept_inputs * layer.kept_outputs * pattern.ratio)


def _undescribed(family: Family) -> tuple[str, ...]:
    if family.described:
        return ()
    return (
        "no family describes this denoiser: MACs are an estimate, those of its blocks' linears over the image's "
        f"tokens, and each linear has a gram of its own; {HELP}",
    )


def _notes(
    groups: Sequence[Group],
    removed: Mapping[str, int],
    layers: Sequence[LayerPlan],
    sparsity: Sparsity,
    align: int,
    allocation: str,
) -> tuple[str, ...]:
    notes = []
    if allocation != "uniform" and any(removed.values()):
        much = "as many MACs" if allocation == "measured" else "as much time by the latency table"
        notes.append(
            f"the cuts are the uniform rule's; measured allocation saves at least {much} where that costs least, "
            "so which units go is known once it has measured (--allocation uniform takes these)"
        )
    for kind, ratio in (("heads", sparsity.heads), ("ffn", sparsity.ffn)):
        whole = [group for group in groups if group.kind == kind and ratio > 0 and not removed[group.name]]
        if whole:
            advice = "ask for more" if kind == "heads" or align == 1 else f"ask for more, or lower --align {align}"
            notes.append(
                f"{kind}:{ratio:g} rounds to nothing in {len(whole)} groups, such as {whole[0].name} with "
                f"{whole[0].units} units; {advice}"
            )
    dense = [layer for layer in layers if layer.reason is not None]
    if dense:
        notes.append(f"{len(dense)} linears stay dense, such as {dense[0].name}: {dense[0].reason}")
    return tuple(notes)
