"""Small charts as inline SVG. Colours come from the page's stylesheet, so that they follow light and dark.

All are drawn in a box of WIDTH x HEIGHT user units and scale with their container; every point carries its value as a
tooltip.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Final

WIDTH: Final = 760
HEIGHT: Final = 260
LEFT: Final = 64
RIGHT: Final = 12
TOP: Final = 12
BOTTOM: Final = 44
KINDS: Final = 6


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


def bars(series: Mapping[str, Sequence[float]], *, labels: Sequence[str], x: str, y: str) -> str:
    """Bars from zero, side by side for each label, in the colours of classes k0, k1, ... (KINDS); 0 leaves a gap.

    Args:
        series: by name, values of equal number; none negative.
        labels: of the places; tooltips have them whole, the axis numbers them 1, 2, ...
        x: names the axis across.
        y: names the axis upwards.

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
            marks.append(_text(middle, HEIGHT - BOTTOM + 16, str(place + 1), "middle"))
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


def linear_ticks(highest: float) -> list[float]:
    """From 0 to at least `highest`, in 3 to 6 steps of 1, 2 or 5 times a power of ten; 0 to 1 where all is zero."""
    if highest <= 0:
        return [0.0, 0.5, 1.0]
    rough = highest / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [step * i for i in range(math.ceil(highest / step - 1e-9) + 1)]


def _check(values: Sequence[float], least: float) -> None:
    if not values or not all(math.isfinite(value) and value >= least for value in values):
        raise ValueError("a chart needs finite values, none of them negative")


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


def _svg(marks: Sequence[str], x: str, y: str) -> str:
    middle = (TOP + _up(0)) / 2
    axes = _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x, "middle")
    axes += f'<text transform="translate(14 {middle:.1f}) rotate(-90)" text-anchor="middle">{escape(y)}</text>'
    name = escape(f"{y} over {x}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}" xmlns="http://www.w3.org/2000/svg">'
        f"{''.join(marks)}{axes}</svg>"
    )
