"""The report of a run: JSON for machines, a table for the terminal, one page for people."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from obsdiff import page, runs_page, wording
from obsdiff.evaluation import ImagePair
from obsdiff.measurements import Report
from obsdiff.spread import Spread


def write_json(report: Report, path: Path) -> None:
    """Writes the report as one JSON object."""
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_html(report: Report, images: Sequence[ImagePair], path: Path) -> None:
    """Writes the report as one self-contained page; `images` are the evaluation's picture pairs, or its first ones."""
    path.write_text(page.render(report, images), encoding="utf-8")


def summary_table(report: Report) -> Table:
    """Dense, pruned and their ratio, for the terminal."""
    what = f"{report.sparsity}  {report.method}" if report.layers else "dense"
    title = f"{report.model}  {what}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in ("dense", "pruned", "pruned / dense"):
        table.add_column(name, justify="right")
    for row in wording.summary(report):
        table.add_row(row.label, row.dense, row.pruned, row.ratio)
    return table


def write_side_by_side(
    folders: Sequence[Path],
    reports: Sequence[Report],
    spread: Mapping[str, Spread],
    images: Sequence[Sequence[ImagePair]],
    path: Path,
) -> None:
    """Writes several runs as one self-contained page; `images` are each run's picture pairs."""
    path.write_text(runs_page.render(folders, reports, spread, images), encoding="utf-8")


def runs_table(folders: Sequence[Path], reports: Sequence[Report], spread: Mapping[str, Spread]) -> Table:
    """A row for the dense model, for each run, and for what is over them; for the terminal."""
    title = f"{reports[0].model}, {len(reports)} pruned folders"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    headings, rows = wording.runs(folders, reports, spread)
    table.add_column("", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for label, *cells in rows:
        table.add_row(label, *cells, end_section=label == str(folders[-1]))
    return table
