"""The products of a latency table timed anew on what is here: of an estimate, or of another device.

So a device without torch measures what `obsdiff whatif MODEL --gpu orin -o shapes.json` listed elsewhere, and
`--allocation latency:FILE` prunes by it there.
"""

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final

from obsdiff_export.latency_table import DENSE, SPARSE, LatencyTable
from obsdiff_export.linears import Shape
from obsdiff_export.measuring import LATE, Measurer, Timed, Variant, measure, verdict
from obsdiff_runtime.errors import RunError
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.timing import Comparison
from obsdiff_runtime.version import __version__

HEADINGS: Final = ("tokens", "inputs", "outputs", "dense, ms", "2:4, ms", "gain", "2:4 is")


@dataclass(frozen=True, kw_only=True)
class Retimed:
    """Attributes:
    table: of what was timed.
    comparisons: of 2:4 with the dense product, by shape.
    failures: why a product was not timed, by shape and variant.
    """

    table: LatencyTable
    comparisons: Mapping[Shape, Comparison]
    failures: Mapping[tuple[Shape, str], str]

    def to_json(self) -> dict[str, Any]:
        return {
            "table": self.table.to_json(),
            "verdicts": {str(shape): verdict(found) for shape, found in self.comparisons.items()},
            "failures": {f"{shape} {variant}": why for (shape, variant), why in self.failures.items()},
        }

    def lines(self) -> Iterator[str]:
        """For a person: a line a shape, what costs most first."""
        found = self.table
        yield f"{found.model} on {found.device}, {found.backend}, {found.entries[0].dtype}: measured"
        times = {(Shape(entry.m, entry.k, entry.n), entry.variant): entry.ms for entry in found.entries}
        rows = [HEADINGS, *(self._row(shape, times) for shape in dict.fromkeys(shape for shape, _ in times))]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
        for row in rows:
            yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        if self.failures:
            (shape, variant), why = next(iter(self.failures.items()))
            yield f"note: {len(self.failures)} products were not timed, such as {shape}, {variant}: {why}"

    def _row(self, shape: Shape, times: Mapping[tuple[Shape, str], float]) -> tuple[str, ...]:
        dense, sparse = (times.get((shape, variant)) for variant in (DENSE, SPARSE))
        compared = self.comparisons.get(shape)
        gain = said = ""
        if compared is not None:
            said, gain = verdict(compared), f"{compared.speedup:.2f}x"
            if compared.low is not None and compared.high is not None:
                gain += f" ({compared.low:.2f} to {compared.high:.2f})"
        milliseconds = ("" if ms is None else f"{ms:.4g}" for ms in (dense, sparse))
        return (str(shape.m), str(shape.k), str(shape.n), *milliseconds, gain, said)


def retime(table: LatencyTable, measurer: Measurer, *, seconds: float, progress: Progress = silent) -> Retimed:
    """Times the table's products.

    Args:
        table: which they are; its times do not matter.
        measurer: on what.
        seconds: to spend, what costs most first; making engines takes from it too.
        progress: told of stage "time linears".

    Raises:
        RunError: nothing could be timed; says why.
    """
    started, refusal = perf_counter(), measurer.without_sparse()
    groups = _groups(table)
    timed: list[Timed] = []
    failures: dict[tuple[Shape, str], str] = {}
    for index, group in enumerate(groups):
        progress("time linears", index, len(groups), str(group[0][0]))
        products = [(shape, variant) for shape, variant in group if variant == DENSE or not refusal]
        failures.update(dict.fromkeys(set(group) - set(products), refusal))
        left = seconds - (perf_counter() - started)
        if left > 0:
            timed.append(measure(measurer, products, seconds=left / (len(groups) - index)))
        else:
            failures.update(dict.fromkeys(products, LATE))
    progress("time linears", len(groups), len(groups))
    entries = tuple(entry for found in timed for entry in found.entries)
    for found in timed:
        failures.update(found.failures)
    if not entries:
        raise RunError(f"no product could be timed on {measurer.device()}: {next(iter(failures.values()))}")
    return Retimed(
        table=LatencyTable(
            what="measured",
            device=measurer.device(),
            backend=measurer.backend,
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            model=table.model,
            call=table.call,
            entries=entries,
            versions={"obsdiff": __version__, **measurer.versions()},
        ),
        comparisons={
            shape: compared
            for found in timed
            for (shape, variant), compared in found.comparisons.items()
            if variant == SPARSE
        },
        failures=failures,
    )


def _groups(table: LatencyTable) -> list[list[tuple[Shape, Variant]]]:
    """Products that are timed by turns, what costs most first: a full shape, the same in 2:4, and narrower ones.

    Clocks drift in minutes, so that widths which an allocation compares belong together. The full shapes are those of
    which the table has 2:4, or which no other is wider than.
    """
    asked = {(Shape(entry.m, entry.k, entry.n), entry.variant) for entry in table.entries}
    shapes = sorted({shape for shape, _ in asked}, key=lambda shape: (-shape.macs, shape))
    groups: dict[Shape, list[tuple[Shape, Variant]]] = {
        shape: [(shape, DENSE), (shape, SPARSE)] for shape in shapes if (shape, SPARSE) in asked
    }
    for shape in shapes:
        if shape not in groups:
            wider = [full for full in groups if _is_part(shape, full)]
            full = min(wider, key=lambda each: each.macs, default=shape)
            groups.setdefault(full, []).append((shape, DENSE))
    return sorted(groups.values(), key=lambda group: -group[0][0].macs)


def _is_part(shape: Shape, full: Shape) -> bool:
    """Whether the shape is the full one with fewer inputs or fewer outputs."""
    return shape.m == full.m and ((shape.k == full.k and shape.n < full.n) or (shape.n == full.n and shape.k < full.k))
