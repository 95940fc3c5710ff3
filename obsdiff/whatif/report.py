"""What `whatif` found, as tables on a terminal and as a page with charts that asks nothing of the network."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Final

from markupsafe import Markup

from obsdiff import charts
from obsdiff.measurements import NotMeasured
from obsdiff.templates import FOLDER, environment
from obsdiff.whatif import CutRow, ShapeRow, Step, WhatIf
from obsdiff.wording import ABSENT, milliseconds, percent
from obsdiff_runtime.version import __version__

if TYPE_CHECKING:
    from rich.table import Table

Cells = tuple[str, ...]

SHAPES: Final[Cells] = ("#", "linears such as", "tokens x in x out", "dense", "2:4", "2:4 gains", "share", "2:4 is")
CUTS: Final[Cells] = ("#", "cut", "rounded", "before", "after", "gain", "by MACs")
BOUNDS: Final = {
    "dense": "dense at least",
    "2:4": "2:4 at least",
    "2:4 gains": "2:4 gains at most",
    "before": "before at least",
    "after": "after at least",
}
"""What headings are called in an estimate."""

WHOLE: Final = ("#", "tokens x in x out", "dense", "2:4", "share", "before", "after")
"""Headings of what stays on one line, and they with it."""

STEPS: Final[Cells] = ("one denoiser call", "median", "gain", "95 %")
STYLES: Final = {"worth it": "green", "not worth it": "red", "within noise": "yellow", "not measured": "dim"}


def shape_cells(found: WhatIf) -> list[Cells]:
    """A line for each shape, under SHAPES."""
    return [(str(i), *_shape(row)) for i, row in enumerate(found.rows, 1)]


def cut_cells(found: WhatIf) -> list[Cells]:
    """A line for each cut, under CUTS."""
    return [(str(i), *_cut(row)) for i, row in enumerate(found.cuts, 1)]


def step_cells(found: WhatIf) -> list[Cells]:
    """A line for each whole call, under STEPS."""
    return [_step(step) for step in found.steps]


def tables(found: WhatIf) -> "list[Table]":
    """For a terminal; the title of the first says what was measured or that it is an estimate."""
    from rich import box
    from rich.table import Table

    made = []
    for title, headings, rows in _blocks(found):
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for heading in headings:
            text = heading in ("linears such as", "cut", "rounded", "2:4 is", "one denoiser call")
            table.add_column(heading, justify="left" if text else "right", overflow="fold", no_wrap=heading in WHOLE)
        for row in rows:
            styled = f"[{STYLES[row[-1]]}]{row[-1]}[/]" if row[-1] in STYLES else row[-1]
            table.add_row(*row[:-1], styled)
        made.append(table)
    return made


def page(found: WhatIf, command: str | None) -> str:
    """The same as one HTML page.

    Args:
        found: what to show.
        command: that made it; None from Python.
    """
    table = found.table
    return (
        environment(escape=True)
        .get_template("whatif.html.j2")
        .render(
            style=Markup((FOLDER / "report.css").read_text(encoding="utf-8")),
            version=__version__,
            found=found,
            table=table,
            command=command,
            blocks=_blocks(found),
            shape_chart=_shape_chart(found.rows, found),
            sparse=any(row.sparse_ms is not None for row in found.rows),
            cut_chart=_cut_chart(found.cuts, found),
        )
    )


def _blocks(found: WhatIf) -> list[tuple[str, Cells, list[Cells]]]:
    """Title, headings and lines of the tables that have any."""
    mark = "ESTIMATE: " if found.estimate else ""
    blocks = [
        (found.title, *_known(SHAPES, shape_cells(found))),
        (f"{mark}all linears that a cut changes, in a call, without 2:4", CUTS, cut_cells(found)),
        ("end to end", STEPS, step_cells(found)),
    ]
    return [
        (title, tuple(BOUNDS.get(name, name) for name in headings) if found.estimate else headings, rows)
        for title, headings, rows in blocks
        if rows
    ]


def _known(headings: Cells, rows: list[Cells]) -> tuple[Cells, list[Cells]]:
    """Without the columns in which nothing is known of any line."""
    kept = [place for place in range(len(headings)) if any(row[place] != ABSENT for row in rows)]
    return tuple(headings[place] for place in kept), [tuple(row[place] for place in kept) for row in rows]


def _shape(row: ShapeRow) -> Cells:
    gain = ABSENT
    if row.ratio is not None:
        gain = f"{row.ratio:.2f}x"
        gain += f" ({row.low:.2f} to {row.high:.2f})" if row.low is not None and row.high is not None else ""
    return (
        f"{row.linears:.4g} {re.sub(r'^.*blocks[.][0-9]+[.]', '', row.example)}",
        str(row.shape),
        _ms(row.dense_ms),
        _ms(row.sparse_ms),
        gain,
        ABSENT if row.share is None else percent(row.share),
        row.verdict,
    )


def _cut(row: CutRow) -> Cells:
    return (
        f"{percent(row.share)} of {'heads' if row.kind == 'heads' else 'FFN neurons'}",
        {"aligned": "to aligned widths", "paper": "as the paper", "whole": "whole heads"}[row.rounding],
        _ms(row.dense_ms),
        _ms(row.cut_ms),
        ABSENT if row.ratio is None else f"{row.ratio:.2f}x",
        f"{row.macs_ratio:.2f}x",
    )


def _step(step: Step) -> Cells:
    if isinstance(step.ms, NotMeasured):
        return step.name, f"{ABSENT}: {step.ms.why}", "", ""
    comparison = step.comparison
    if comparison is None:
        return step.name, milliseconds(step.ms), "", ""
    low, high = comparison.low, comparison.high
    interval = "too few rounds" if low is None or high is None else f"{low:.2f} to {high:.2f}"
    if comparison.outcome == "no different":
        interval += ", no difference beyond noise"
    return step.name, milliseconds(step.ms), f"{comparison.speedup:.2f}x", interval


def _ms(value: float | None) -> str:
    if value is None:
        return ABSENT
    return milliseconds(value) if value >= 0.1 else f"{1000 * value:.3g} us"


def _shape_chart(rows: Sequence[ShapeRow], found: WhatIf) -> Markup:
    bars = {"dense": [row.linears * (row.dense_ms or 0.0) for row in rows]}
    if any(row.sparse_ms is not None for row in rows):
        bars["2:4"] = [row.linears * (row.sparse_ms or 0.0) for row in rows]
    return _chart(bars, [f"{row.linears:.4g} of {row.shape}" for row in rows], "linears of a shape", found)


def _cut_chart(rows: Sequence[CutRow], found: WhatIf) -> Markup | None:
    if not rows:
        return None
    bars = {
        "after the cut": [row.cut_ms or 0.0 for row in rows],
        "if it went like MACs": [(row.dense_ms or 0.0) / row.macs_ratio for row in rows],
    }
    return _chart(bars, [f"{row.kind} {percent(row.share)} {row.rounding}" for row in rows], "cut", found)


def _chart(bars: Mapping[str, Sequence[float]], labels: Sequence[str], x: str, found: WhatIf) -> Markup:
    """Bars with a legend; the axis says whether it is an estimate."""
    y = "ms, ESTIMATE" if found.estimate else "ms in a call"
    drawn = charts.bars(bars, labels=labels, x=x, y=y)
    legend = "".join(f'<span class="k{index}">{escape(name)}</span>' for index, name in enumerate(bars))
    return Markup(f'<p class="legend">{legend}</p><div class="scroll">{drawn}</div>')
