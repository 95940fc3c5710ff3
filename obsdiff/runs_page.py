"""Several runs on one HTML page: their figures, curves and pictures side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup, escape

from obsdiff import charts, wording
from obsdiff.evaluation import Evaluation, ImagePair
from obsdiff.measurements import NotMeasured, Report
from obsdiff.page import PIXELATED_BELOW, data_uri
from obsdiff.spread import Spread
from obsdiff.templates import FOLDER, environment


def render(
    folders: Sequence[Path],
    reports: Sequence[Report],
    spread: Mapping[str, Spread],
    images: Sequence[Sequence[ImagePair]],
) -> str:
    """The page; asks nothing of the network.

    Args:
        folders: of the runs.
        reports: of the runs, on one dense model.
        spread: over the runs, by figure.
        images: picture pairs of each run, of the same prompts in the same order; none where nothing was measured.
    """
    headings, rows = wording.runs(folders, reports, spread)
    names = [str(folder) for folder in folders]
    found = {
        name: report.evaluation
        for name, report in zip(names, reports, strict=True)
        if not isinstance(report.evaluation, NotMeasured)
    }
    return (
        environment(escape=True)
        .get_template("runs.html.j2")
        .render(
            model=reports[0].model,
            version=reports[0].obsdiff_version,
            date=reports[0].environment.date,
            command=reports[0].command,
            style=Markup((FOLDER / "report.css").read_text(encoding="utf-8")),
            runs=reports,
            spread=spread,
            headings=headings,
            rows=rows,
            pictures=_pictures(names, images),
            pixelated=any(max(pair.dense.shape[:2]) < PIXELATED_BELOW for pairs in images for pair in pairs),
            **_charts(found),
        )
    )


def _charts(found: Mapping[str, Evaluation]) -> dict[str, Markup | None]:
    if not found:
        return {"velocity_chart": None}
    velocities = {name: evaluation.velocity_error_per_step for name, evaluation in found.items()}
    blocks = {name: evaluation.block_errors for name, evaluation in found.items()}
    keys = (f'<span class="k{i % charts.KINDS}">{escape(name)}</span>' for i, name in enumerate(found))
    return {
        "velocity_chart": Markup(charts.lines(velocities, x="step", y="relative velocity error")),
        "block_chart": Markup(charts.lines(blocks, x="block", y="relative error", first=0)),
        "legend": Markup(f'<p class="legend">{"".join(keys)}</p>'),
    }


def _pictures(names: Sequence[str], images: Sequence[Sequence[ImagePair]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Prompts, and by name the dense picture and each run's."""
    drawn = [(name, pairs) for name, pairs in zip(names, images, strict=True) if pairs]
    if not drawn:
        return []
    return [
        (
            dense.prompt,
            [("dense", data_uri(dense.dense)), *((name, data_uri(pairs[i].pruned)) for name, pairs in drawn)],
        )
        for i, dense in enumerate(drawn[0][1])
    ]
