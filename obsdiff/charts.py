"""Small charts as inline SVG. Colours come from the page's stylesheet, so that they follow light and dark.

All are drawn in a box of WIDTH x HEIGHT user units and scale with their container; every point carries its value as a
tooltip.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Final

WIDTH: Final = 760
HEIGHT: Final = 260
LEFT: Final = 64
RIGHT: Final = 12
TOP: Final = 12
BOTTOM: Final = 44
ROW: Final = 44
KINDS: Final = 6


@dataclass(frozen=True, kw_only=True)
class Strip:
    """A row of `strips`.

    Attributes:
        name: for tooltips.
        label: short, beside the row.
        values: a dot each.
        median: a line.
        interval: where the median lies, as a band; an end that is None is open.
    """

    name: str
    label: str
    values: Sequence[float]
    median: float
    interval: tuple[float | None, float | None]


def line(values: Sequence[float], *, x: str, y: str) -> str:
    """A curve over 1, 2, ... from zero upwards; `x` and `y` name the axes.

    Raises:
        ValueError: no values, or one that is negative or not finite.
    """
    return lines({"": values}, x=x, y=y)


def lines(curves: Mapping[str, Sequence[float]], *, x: str, y: str, first: int = 1) -> str:
    """Curves by name over first, first + 1, ... from zero upwards, in the colours of classes k0, k1, ... (KINDS).

    Raises:
        ValueError: no values, or one that is negative or not finite.
    """
    for values in curves.values():
        _check(values, least=0.0)
    longest = max(curves.values(), key=len)
    ticks = linear_ticks(max(max(values) for values in curves.values()))
    marks = [_grid(tick / ticks[-1], f"{tick:g}") for tick in ticks]
    every = max(1, math.ceil(len(longest) / 20))
    for i in range(0, len(longest), every):
        marks.append(_text(_across(i, len(longest)), HEIGHT - BOTTOM + 16, str(i + first), "middle"))
    for index, (name, values) in enumerate(curves.items()):
        places = [(_across(i, len(longest)), _up(value / ticks[-1])) for i, value in enumerate(values)]
        path = " ".join(f"{'L' if i else 'M'}{px:.1f} {py:.1f}" for i, (px, py) in enumerate(places))
        label = f"{name}, {x}" if name else x
        marks.append(f'<g class="k{index % KINDS}"><path class="curve" d="{path}"/>')
        marks += [_dot(px, py, f"{label} {i + first}: {values[i]:.3g}") for i, (px, py) in enumerate(places)]
        marks.append("</g>")
    return _svg(marks, x, y)


def bars(series: Mapping[str, Sequence[float]], *, labels: Sequence[str], x: str, y: str, named: bool = False) -> str:
    """Bars from zero, side by side for each label, in the colours of classes k0, k1, ... (KINDS); 0 leaves a gap.

    Args:
        series: by name, values of equal number; none negative.
        labels: of the places; tooltips have them whole, the axis numbers them 1, 2, ...
        x: names the axis across.
        y: names the axis upwards.
        named: write the labels below the axis instead of numbers; there is room for a few short ones.

    Raises:
        ValueError: no values, or one that is negative or not finite.
    """
    for values in series.values():
        _check(values, least=0.0)
    ticks = linear_ticks(max(max(values) for values in series.values()))
    marks = [_grid(tick / ticks[-1], f"{tick:g}") for tick in ticks]
    slot = (WIDTH - LEFT - RIGHT) / len(labels)
    width = min(slot * 0.8 / len(series), 40.0)
    for place, label in enumerate(labels):
        middle = LEFT + (place + 0.5) * slot
        if place % max(1, math.ceil(len(labels) / 20)) == 0:
            marks.append(_text(middle, HEIGHT - BOTTOM + 16, label if named else str(place + 1), "middle"))
        for index, (name, values) in enumerate(series.items()):
            left, top = middle + (index - len(series) / 2) * width, _up(values[place] / ticks[-1])
            title = escape(f"{label}, {name}: {values[place]:.3g}")
            marks.append(
                f'<g class="k{index % KINDS}"><rect class="cell" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" '
                f'height="{_up(0) - top:.1f}"><title>{title}</title></rect></g>'
            )
    return _svg(marks, x, y)


def heat(rows: Sequence[Sequence[float]], *, labels: Sequence[str], x: str, y: str) -> str:
    """A field of cells, the darker the larger, on a logarithmic scale; the first row is at the bottom.

    Args:
        rows: of equal length; no value negative.
        labels: name of each row, for tooltips.
        x: names the columns 1, 2, ...
        y: names the rows 0, 1, ...

    Raises:
        ValueError: no values, or one that is negative or not finite.
    """
    values = [value for row in rows for value in row]
    _check(values, least=0.0)
    positive = [value for value in values if value > 0] or [1.0]
    low, high = math.log10(min(positive)), math.log10(max(positive))
    width, height = (WIDTH - LEFT - RIGHT) / len(rows[0]), (HEIGHT - TOP - BOTTOM) / len(rows)
    marks: list[str] = []
    for i, row in enumerate(rows):
        top = _up((i + 1) / len(rows))
        if i % max(1, math.ceil(len(rows) / 12)) == 0:
            marks.append(_text(LEFT - 8, top + height / 2 + 4, str(i), "end"))
        for j, value in enumerate(row):
            share = (
                0.0 if value == 0 else 1.0 if high == low else 0.06 + 0.94 * (math.log10(value) - low) / (high - low)
            )
            label = escape(f"{labels[i]}, {x} {j + 1}: {value:.3g}")
            marks.append(
                f'<rect class="cell" x="{LEFT + j * width:.1f}" y="{top:.1f}" width="{width:.2f}" height="{height:.2f}"'
                f' fill-opacity="{share:.3f}"><title>{label}</title></rect>'
            )
    for j in range(0, len(rows[0]), max(1, math.ceil(len(rows[0]) / 20))):
        marks.append(_text(LEFT + (j + 0.5) * width, HEIGHT - BOTTOM + 16, str(j + 1), "middle"))
    return _svg(marks, x, y)


def dots(values: Sequence[float], *, labels: Sequence[str], groups: Sequence[str], x: str, y: str) -> str:
    """Points on a logarithmic axis, side by side; neighbours of one group stand on one band.

    Args:
        values: none negative; a zero stands on the axis.
        labels: tooltip of each point.
        groups: name of each point's band.
        x: names the axis across.
        y: names the axis upwards.

    Raises:
        ValueError: no values, or one that is negative or not finite.
    """
    _check(values, least=0.0)
    positive = [value for value in values if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)
    slot = (WIDTH - LEFT - RIGHT) / len(values)
    marks: list[str] = []
    first = 0
    names = [(name, len(list(members))) for name, members in groupby(groups)]
    every = max(1, math.ceil(len(names) / 16))
    for i, (name, members) in enumerate(names):
        left, width = LEFT + first * slot, members * slot
        if i % 2:
            marks.append(f'<rect class="band" x="{left:.1f}" y="{TOP}" width="{width:.1f}" height="{_up(0) - TOP}"/>')
        if i % every == 0:
            marks.append(_text(left + width / 2, HEIGHT - BOTTOM + 16, name, "middle"))
        first += members
    step = max(1, math.ceil((high - low) / 6))
    marks += [_grid((power - low) / (high - low), f"{10.0**power:g}") for power in range(low, high + 1, step)]
    for i, value in enumerate(values):
        height = (math.log10(value) - low) / (high - low) if value > 0 else 0.0
        marks.append(_dot(LEFT + (i + 0.5) * slot, _up(height), f"{labels[i]}: {value:.3g}"))
    return _svg(marks, x, y)


def strips(rows: Sequence[Strip], *, x: str) -> str:
    """Values side by side on a linear axis that need not begin at zero, a row each, in the colours of k0, k1, ...

    Args:
        rows: from the top; each has at least one value.
        x: names the axis.

    Raises:
        ValueError: no values, or one that is negative or not finite.
    """
    _check([value for row in rows for value in row.values], least=0.0)
    ends = [end for row in rows for end in (*row.values, *row.interval) if end is not None]
    ticks, bottom = _ticks_between(min(ends), max(ends)), TOP + ROW * len(rows)
    marks = []
    for tick in ticks:
        across = _between(tick, ticks)
        marks.append(f'<line class="grid" x1="{across:.1f}" x2="{across:.1f}" y1="{TOP}" y2="{bottom}"/>')
        marks.append(_text(across, bottom + 16, f"{tick:.6g}", "middle"))
    for index, row in enumerate(rows):
        middle = TOP + ROW * (index + 0.5)
        marks.append(_text(LEFT - 8, middle + 4, row.label, "end"))
        marks.append(f'<g class="k{index % KINDS}">{"".join(_strip(row, middle, ticks))}</g>')
    return _svg(marks, x, "", bottom + BOTTOM)


def _strip(row: Strip, middle: float, ticks: Sequence[float]) -> Iterator[str]:
    top, bottom, median = middle - ROW * 0.4, middle + ROW * 0.4, _between(row.median, ticks)
    low, high = (
        _between(ticks[end] if value is None else value, ticks)
        for end, value in zip((0, -1), row.interval, strict=True)
    )
    yield f'<rect class="sure" x="{low:.1f}" y="{top:.1f}" width="{high - low:.1f}" height="{bottom - top:.1f}"/>'
    for number, value in enumerate(row.values):
        spread = (number * 0.618034 % 1 - 0.5) * ROW * 0.6  # golden section: neighbours do not lie on one another
        yield _dot(_between(value, ticks), middle + spread, f"{row.name}: {value:.4g}")
    title = escape(f"{row.name}, median: {row.median:.4g}")
    line = f'x1="{median:.1f}" x2="{median:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"'
    yield f'<line class="middle" {line}><title>{title}</title></line>'


def linear_ticks(highest: float) -> list[float]:
    """From 0 to at least `highest`, in 3 to 6 steps of 1, 2 or 5 times a power of ten; 0 to 1 where all is zero."""
    if highest <= 0:
        return [0.0, 0.5, 1.0]
    rough = highest / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [step * i for i in range(math.ceil(highest / step - 1e-9) + 1)]


def _ticks_between(low: float, high: float) -> list[float]:
    """Round numbers that enclose both, in 2 to 6 steps."""
    step = linear_ticks(max(high - low, high * 0.01, 1e-9))[1]
    first = math.floor(low / step + 1e-9)
    return [step * i for i in range(first, max(math.ceil(high / step - 1e-9), first + 1) + 1)]


def _check(values: Sequence[float], least: float) -> None:
    if not values or not all(math.isfinite(value) and value >= least for value in values):
        raise ValueError("a chart needs finite values, none of them negative")


def _between(value: float, ticks: Sequence[float]) -> float:
    """Where a value stands on an axis from the first tick to the last."""
    share = (value - ticks[0]) / (ticks[-1] - ticks[0])
    return LEFT + (WIDTH - LEFT - RIGHT) * (0.02 + 0.96 * share)


def _across(i: int, count: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (0.5 if count == 1 else 0.02 + 0.96 * i / (count - 1))


def _up(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _grid(share: float, label: str) -> str:
    y = _up(share)
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _text(LEFT - 8, y + 4, label, "end")


def _dot(x: float, y: float, label: str) -> str:
    return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(label)}</title></circle>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(marks: Sequence[str], x: str, y: str, height: float = HEIGHT) -> str:
    middle = (TOP + height - BOTTOM) / 2
    axes = _text((LEFT + WIDTH - RIGHT) / 2, height - 6, x, "middle")
    axes += f'<text transform="translate(14 {middle:.1f}) rotate(-90)" text-anchor="middle">{escape(y)}</text>'
    name = escape(f"{y} over {x}" if y else x)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{name}" xmlns="http://www.w3.org/2000/svg">'
        f"{''.join(marks)}{axes}</svg>"
    )
