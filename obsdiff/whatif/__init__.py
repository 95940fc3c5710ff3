"""Is 2:4 worth it here, on which linears, and which widths are? Minutes instead of hours: before any calibration.

Single linears are timed on what is here, dense, 2:4 and narrower, with random weights: their values do not matter to
kernels. Where nothing can be timed on the GPU that is meant, published peaks give an estimate, labelled as one.

    share     of the time of all linears that can be pruned
    verdict   see measuring.Verdict
"""

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, Final

from obsdiff.measurements import NotMeasured
from obsdiff.whatif.subject import CutPlan, Subject
from obsdiff_export import roofline
from obsdiff_export.latency_table import DENSE, SPARSE, Entry, LatencyTable, What
from obsdiff_export.linears import Shape
from obsdiff_export.measuring import LATE, Measurer, Timed, Variant, Verdict, measure, verdict
from obsdiff_export.roofline import Gpu
from obsdiff_runtime.errors import RunError
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.timing import Comparison
from obsdiff_runtime.version import __version__

LEAST_SECONDS: Final = 0.5
"""Of the budget, for a shape and what it could become."""

REPORTED: Final = (
    "what was reported of 2:4 on the linears of transformers in practice is "
    f"{roofline.REPORTED[0]:.1f} to {roofline.REPORTED[1]:.1f}x, whatever the peaks allow"
)


@dataclass(frozen=True, kw_only=True)
class ShapeRow:
    """Linears of one shape.

    Attributes:
        shape: tokens, inputs and outputs.
        linears: how many run it in a call, `example` among them; see Linear.often.
        dense_ms, sparse_ms: one of them; None where it was not timed.
        ratio: dense / 2:4; low and high are its 95 % interval, None in an estimate.
        share: of the time of all these linears.
        verdict: on 2:4.
        reason: why something is not measured, or what bounds an estimate.
    """

    shape: Shape
    linears: float
    example: str
    dense_ms: float | None
    sparse_ms: float | None
    ratio: float | None
    low: float | None
    high: float | None
    share: float | None
    verdict: Verdict
    reason: str


@dataclass(frozen=True, kw_only=True)
class CutRow:
    """All groups of a kind cut alike, without 2:4.

    Attributes:
        kind: "heads" or "ffn".
        share: of the units that go.
        rounding: "aligned", "paper" or "whole"; see subject.CutPlan.
        dense_ms, cut_ms: of all linears that change, together; None where one of them was not timed.
        ratio: dense / cut.
        macs_ratio: the same if time went like multiply-accumulates.
    """

    kind: str
    share: float
    rounding: str
    dense_ms: float | None
    cut_ms: float | None
    ratio: float | None
    macs_ratio: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """One denoiser call, end to end.

    Attributes:
        name: "dense", "2:4 forced", "structured:0.25 by magnitude".
        ms: median, or why it was not timed.
        comparison: with dense, where both were timed.
        note: what is to be known of it.
    """

    name: str
    ms: float | NotMeasured
    comparison: Comparison | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """What was found; everything in it is of `what` kind: measured here, or an estimate.

    Attributes:
        table: the latencies, as allocation reads them.
        rows: by shape, what costs most first.
        cuts: by kind and share.
        steps: end to end; measured always, or not at all.
        verdict: on 2:4, of all linears.
        sentence: the same, with how much.
        notes: what to know of it.
    """

    table: LatencyTable
    rows: tuple[ShapeRow, ...]
    cuts: tuple[CutRow, ...]
    verdict: Verdict
    sentence: str
    notes: tuple[str, ...]
    steps: tuple[Step, ...] = field(default=())

    @property
    def what(self) -> What:
        return self.table.what

    @property
    def estimate(self) -> bool:
        return self.what == "estimate"

    @property
    def title(self) -> str:
        """Says first of all whether it is an estimate."""
        call = self.table.call
        what = "ESTIMATE from published peaks, not a measurement" if self.estimate else "measured"
        where = f"{self.table.device}, {self.table.backend}, {self.table.entries[0].dtype}"
        size = f"{call['height']} x {call['width']}, {call['rows']} images a call"
        return f"{self.table.model} at {size}, on {where}: {what}"

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, "estimate": self.estimate, "title": self.title, **asdict(self)}


def explore(subject: Subject, measurer: Measurer, *, seconds: float, progress: Progress = silent) -> WhatIf:
    """Times every distinct shape, dense, 2:4 and narrower, within a budget; what costs most comes first.

    Args:
        subject: what to time.
        measurer: on what.
        seconds: to spend; shapes that would come too late are reported as not measured.
        progress: told of stage "time linears".

    Raises:
        RunError: nothing could be timed; says why.
    """
    started = perf_counter()
    groups, refusal = subject.grouped, measurer.without_sparse()
    timed: dict[Shape, Timed] = {}
    costs = {shape: _cost(shape, subject, refusal) for shape in groups}
    for index, shape in enumerate(groups):
        progress("time linears", index, len(groups), str(shape))
        left = seconds - (perf_counter() - started)
        if left <= 0:
            timed[shape] = Timed(entries=(), comparisons={}, failures={(shape, DENSE): LATE})
            continue
        own = left * costs[shape] / sum(list(costs.values())[index:])
        timed[shape] = measure(measurer, _products(shape, subject, refusal), seconds=max(own, LEAST_SECONDS))
    progress("time linears", len(groups), len(groups))
    entries = _distinct([entry for found in timed.values() for entry in found.entries])
    if not entries:
        why = next((reason for found in timed.values() for reason in found.failures.values()), "there are no linears")
        raise RunError(f"no linear of {subject.model} could be timed on {measurer.device()}: {why}")
    table = _table(subject, "measured", measurer.device(), measurer.backend, measurer.versions(), entries)
    rows = _rows(subject, table, {shape: _judge(shape, found, refusal) for shape, found in timed.items()})
    return _conclude(subject, table, rows, [])


def estimate(subject: Subject, card: Gpu, dtype: str) -> WhatIf:
    """The same from published peaks; every verdict is "not measured".

    Args:
        subject: what is asked about.
        card: the GPU.
        dtype: "float16", "bfloat16", "int8" or "float8".

    Raises:
        ConfigError: the GPU has no published figure for the precision that is certain.
    """
    peak, everything = roofline.peak(card, dtype), []
    for shape in subject.grouped:
        everything += [(full, DENSE) for full in (shape, *subject.narrower.get(shape, ()))]
        everything += [(shape, SPARSE)] if shape.k % 4 == 0 else []
    entries = [_estimated(card, shape, dtype, variant) for shape, variant in everything]
    table = _table(subject, "estimate", card.name, "roofline", {"obsdiff": __version__}, _distinct(entries))
    judged: dict[Shape, tuple[Verdict, Comparison | None, str]] = {
        shape: ("not measured", None, "memory is the limit" if roofline.memory_bound(card, shape, dtype) else "")
        for shape in subject.grouped
    }
    notes = [
        f"every time here is a lower bound from {card.source}: {peak.dense:g} dense and {peak.sparse:g} sparse TFLOP/s "
        f"in {dtype}, {card.bandwidth:g} GB/s; real kernels take longer",
        "to measure, run this on that GPU without --gpu",
    ]
    if peak.derived:
        notes.append(f"the peak in {dtype} is not printed in that source but derived: {peak.derived}")
    return _conclude(subject, table, _rows(subject, table, judged), notes)


def _products(shape: Shape, subject: Subject, refusal: str) -> list[tuple[Shape, Variant]]:
    found: list[tuple[Shape, Variant]] = [(shape, DENSE)]
    if not refusal and shape.k % 4 == 0:
        found.append((shape, SPARSE))
    return found + [(narrow, DENSE) for narrow in subject.narrower.get(shape, ())]


def _cost(shape: Shape, subject: Subject, refusal: str) -> float:
    """What timing a shape may cost beside the others: its arithmetic, and as much for being one."""
    products = _products(shape, subject, refusal)
    return math.sqrt(sum(each.macs for each, _ in products)) * len(products)


def _judge(shape: Shape, found: Timed, refusal: str) -> tuple[Verdict, Comparison | None, str]:
    comparison = found.comparisons.get((shape, SPARSE))
    if comparison is None:
        why = refusal or found.failures.get((shape, SPARSE)) or found.failures.get((shape, DENSE))
        return "not measured", None, why or f"{shape.k} inputs are no multiple of 4"
    return verdict(comparison), comparison, ""


def _rows(
    subject: Subject, table: LatencyTable, judged: Mapping[Shape, tuple[Verdict, Comparison | None, str]]
) -> tuple[ShapeRow, ...]:
    times = {(Shape(entry.m, entry.k, entry.n), entry.variant): entry.ms for entry in table.entries}
    groups = subject.grouped
    counts = {shape: subject.count(shape) for shape in groups}
    whole = sum(times.get((shape, DENSE), 0.0) * count for shape, count in counts.items())
    rows = []
    for shape, names in groups.items():
        verdict, comparison, reason = judged[shape]
        dense, sparse = times.get((shape, DENSE)), times.get((shape, SPARSE))
        ratio = dense / sparse if dense is not None and sparse is not None else None
        rows.append(
            ShapeRow(
                shape=shape,
                linears=counts[shape],
                example=names[0],
                dense_ms=dense,
                sparse_ms=sparse,
                ratio=comparison.speedup if comparison is not None else ratio,
                low=comparison.low if comparison is not None else None,
                high=comparison.high if comparison is not None else None,
                share=dense * counts[shape] / whole if dense is not None else None,
                verdict=verdict,
                reason=reason,
            )
        )
    return tuple(rows)


def _conclude(subject: Subject, table: LatencyTable, rows: Sequence[ShapeRow], notes: Sequence[str]) -> WhatIf:
    verdict, sentence = _verdict(table, rows)
    late = [row for row in rows if row.dense_ms is None]
    told = [*notes, *subject.notes]
    if late:
        told.append(f"{len(late)} of {len(rows)} shapes were not timed, such as {late[0].shape}: {late[0].reason}")
    told.append("linears alone: attention, norms and convolutions take the rest of a call")
    return WhatIf(
        table=table,
        rows=tuple(rows),
        cuts=tuple(_cut_row(subject, cut, table) for cut in subject.cuts),
        verdict=verdict,
        sentence=sentence,
        notes=tuple(told),
    )


def _verdict(table: LatencyTable, rows: Sequence[ShapeRow]) -> tuple[Verdict, str]:
    both = [row for row in rows if row.dense_ms is not None and row.sparse_ms is not None]
    if not both:
        reasons = [row.reason for row in rows if row.reason]
        return "not measured", f"2:4 was not measured: {reasons[0] if reasons else 'no shape fits it'}"
    if table.what == "estimate":
        return "not measured", (
            f"ESTIMATE: the peaks of a {table.device} would allow the linears {_gain(both, both):.2f}x by 2:4, "
            f"but {REPORTED}"
        )
    won = [row for row in both if row.verdict == "worth it"]
    if won:
        share = sum(row.share or 0.0 for row in won)
        return "worth it", (
            f"2:4 is worth it on {len(won)} of {len(rows)} shapes, {share:.0%} of the linears' time: with those sparse "
            f"and the others dense, the linears are {_gain(both, won):.2f}x as fast"
        )
    if all(row.verdict == "not worth it" for row in both):
        return "not worth it", (
            f"2:4 is not worth it here: none of {len(both)} shapes gains more than noise; cut widths instead"
        )
    unsure = sum(row.verdict == "within noise" for row in both)
    return "within noise", f"2:4 gains nothing that can be told from noise here; on {unsure} shapes it is undecided"


def _gain(timed: Sequence[ShapeRow], sparse: Sequence[ShapeRow]) -> float:
    """How much faster all timed linears are together if some are sparse."""
    chosen = {row.shape for row in sparse}
    dense = sum(row.linears * (row.dense_ms or 0.0) for row in timed)
    mixed = sum(row.linears * ((row.sparse_ms if row.shape in chosen else row.dense_ms) or 0.0) for row in timed)
    return dense / mixed


def _cut_row(subject: Subject, cut: CutPlan, table: LatencyTable) -> CutRow:
    times = {(entry.m, entry.k, entry.n): entry.ms for entry in table.entries if entry.variant == DENSE}

    def together(shapes: Sequence[Shape]) -> float | None:
        found = [times.get((shape.m, shape.k, shape.n)) for shape in shapes]
        return None if None in found else sum(ms for ms in found if ms is not None)

    before, after = [subject.shapes[name] for name in cut.shapes], list(cut.shapes.values())
    dense, narrow = together(before), together(after)
    return CutRow(
        kind=cut.kind,
        share=cut.share,
        rounding=cut.rounding,
        dense_ms=dense,
        cut_ms=narrow,
        ratio=dense / narrow if dense is not None and narrow is not None else None,
        macs_ratio=sum(shape.macs for shape in before) / sum(shape.macs for shape in after),
    )


def _estimated(card: Gpu, shape: Shape, dtype: str, variant: str) -> Entry:
    ms = roofline.estimate_ms(card, shape, dtype, sparse=variant == SPARSE)
    return Entry(m=shape.m, k=shape.k, n=shape.n, dtype=dtype, variant=variant, ms=ms, low_ms=ms, high_ms=ms, rounds=0)


def _distinct(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """One entry of each product, the one timed most often: a width of one shape may be another shape's full one."""
    found: dict[tuple[int, int, int, str], Entry] = {}
    for entry in entries:
        key = (entry.m, entry.k, entry.n, entry.variant)
        if key not in found or entry.rounds > found[key].rounds:
            found[key] = entry
    return tuple(found.values())


def _table(
    subject: Subject, what: What, device: str, backend: str, versions: Mapping[str, str], entries: Sequence[Entry]
) -> LatencyTable:
    return LatencyTable(
        what=what,
        device=device,
        backend=backend,
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        model=subject.model,
        call=dict(subject.call),
        entries=tuple(entries),
        versions=dict(versions),
    )
