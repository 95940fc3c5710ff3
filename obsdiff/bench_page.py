"""A benchmark's report as one HTML page that asks nothing of the network."""

import datetime
import math
import statistics
from collections.abc import Mapping
from typing import Final

from markupsafe import Markup, escape

from obsdiff import charts
from obsdiff.templates import FOLDER, environment
from obsdiff_runtime.benchmark import text
from obsdiff_runtime.benchmark.report import END_TO_END, BenchReport, Candidate
from obsdiff_runtime.timing import Latency
from obsdiff_runtime.version import __version__

DOTS: Final = 400
"""In one row of a chart; of more, as many are shown, evenly spaced in time."""


def page(report: BenchReport, command: str) -> str:
    """The page; `command` is what was called, "" where it was Python."""
    letters = {name: text.letter(index) for index, name in enumerate(report.candidates)}
    rows = {name: text.figures_in_words(found) for name, found in report.candidates.items()}
    labels = list(dict.fromkeys(label for found in rows.values() for label in found))
    return (
        environment(escape=True)
        .get_template("bench.html.j2")
        .render(
            # Our own stylesheet, written for these pages: nothing of the user's is in it.
            style=Markup((FOLDER / "report.css").read_text(encoding="utf-8")),
            version=__version__,
            date=datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
            report=report,
            letters=letters,
            legend=_legend(letters),
            verdicts=[found[END_TO_END].verdict for found in report.comparisons.values()],
            speedups=_speedups(report),
            shares=_shares(report.candidates, letters),
            strips=_strips(report.candidates, letters),
            thinned=any(
                len(_runs(each, part)) > DOTS for each in report.candidates.values() for part in each.rounds_ms
            ),
            latencies=_latencies(report.candidates, letters),
            summary=[(label, [found.get(label, "") for found in rows.values()]) for label in labels],
            sources=list(text.sources_in_words(report.candidates)),
            asked=text.asked_in_words(report),
            conditions=list(text.conditions_in_words(report.conditions)),
            command=command,
        )
    )


def _legend(letters: Mapping[str, str]) -> Markup:
    keys = (
        f'<span class="k{i % charts.KINDS}">{escape(letter)} {escape(name)}</span>'
        for i, (name, letter) in enumerate(letters.items())
    )
    return Markup(f'<p class="legend">{"".join(keys)}</p>')


def _parts(candidates: Mapping[str, Candidate]) -> list[str]:
    return list(dict.fromkeys(part for found in candidates.values() for part in found.rounds_ms))


def _speedups(report: BenchReport) -> list[tuple[str, list[str]]]:
    """By part, a cell for each candidate but the baseline."""
    parts = dict.fromkeys(part for found in report.comparisons.values() for part in found)
    return [
        (
            text.part_in_words(part),
            [text.speedup_in_words(found[part]) if part in found else "" for found in report.comparisons.values()],
        )
        for part in parts
    ]


def _shares(candidates: Mapping[str, Candidate], letters: Mapping[str, str]) -> Markup:
    """Where a call's time goes."""
    parts = [part for part in _parts(candidates) if part != END_TO_END]
    series = {
        letters[name]: [
            *(statistics.median(map(sum, found.rounds_ms[part])) if part in found.rounds_ms else 0.0 for part in parts),
            max(found.outside.latency.p50_ms, 0.0),
        ]
        for name, found in candidates.items()
    }
    return Markup(charts.bars(series, labels=[*parts, "outside"], x="component", y="ms a call", named=True))


def _strips(candidates: Mapping[str, Candidate], letters: Mapping[str, str]) -> list[tuple[str, Markup]]:
    """Heading and chart of each part."""
    found = []
    for part in _parts(candidates):
        rows = [
            _strip(candidate, part, name=name, label=letters[name])
            for name, candidate in candidates.items()
            if part in candidate.rounds_ms
        ]
        what = "a call" if part == END_TO_END else "a run"
        found.append((text.part_in_words(part), Markup(charts.strips(rows, x=f"ms {what}"))))
    return found


def _strip(candidate: Candidate, part: str, *, name: str, label: str) -> charts.Strip:
    values, latency = _runs(candidate, part), _latency(candidate, part)
    interval = latency.p50_interval_ms
    return charts.Strip(
        name=name,
        label=label,
        values=values[:: math.ceil(len(values) / DOTS)],
        median=latency.p50_ms,
        interval=(interval.low, interval.high),
    )


def _runs(candidate: Candidate, part: str) -> list[float]:
    return [ms for round_ in candidate.rounds_ms[part] for ms in round_]


def _latency(found: Candidate, part: str) -> Latency:
    return found.end_to_end if part == END_TO_END else found.components[part]


def _latencies(candidates: Mapping[str, Candidate], letters: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Rows of cells, as `Latency` has its fields."""
    rows = []
    for part in _parts(candidates):
        for name, found in candidates.items():
            if part in found.rounds_ms:
                ms = _latency(found, part)
                plain = (text.number(value) for value in (ms.min_ms, ms.max_ms, ms.mean_ms))
                sure = (
                    text.with_interval(ms.p50_ms, ms.p50_interval_ms),
                    text.with_interval(ms.p90_ms, ms.p90_interval_ms),
                    text.number(ms.p95_ms),
                    text.with_interval(ms.p99_ms, ms.p99_interval_ms),
                )
                rows.append((text.part_in_words(part), letters[name], str(ms.count), *plain, *sure))
    return rows
