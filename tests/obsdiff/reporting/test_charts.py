import xml.etree.ElementTree as ET

import pytest

from obsdiff import charts

SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def test_a_curve_has_a_point_and_a_tooltip_for_every_value() -> None:
    root = parsed(charts.line([0.1, 0.2, 0.0], x="step", y="error"))
    dots = list(root.iter(f"{SVG}circle"))
    assert [dot.findtext(f"{SVG}title") for dot in dots] == ["step 1: 0.1", "step 2: 0.2", "step 3: 0"]
    heights = [float(dot.get("cy", "nan")) for dot in dots]
    assert heights[1] < heights[0] < heights[2] == pytest.approx(charts.HEIGHT - charts.BOTTOM)


def test_curves_share_their_axes_and_name_their_points() -> None:
    root = parsed(charts.lines({"a": [1.0, 2.0], "b": [4.0, 0.0, 2.0]}, x="block", y="error", first=0))
    groups = root.findall(f"{SVG}g")
    assert [group.get("class") for group in groups] == ["k0", "k1"]
    dots = [group.findall(f"{SVG}circle") for group in groups]
    assert [dot.findtext(f"{SVG}title") for dot in dots[0]] == ["a, block 0: 1", "a, block 1: 2"]
    assert dots[0][1].get("cy") == dots[1][2].get("cy")
    assert dots[0][1].get("cx") == dots[1][1].get("cx")


def test_a_field_has_a_cell_for_every_value_the_stronger_the_larger() -> None:
    cells = parsed(charts.heat([[0.0, 0.01], [0.1, 1.0]], labels=["low", "high"], x="step", y="block"))
    rects = cells.findall(f"{SVG}rect")
    assert [rect.findtext(f"{SVG}title") for rect in rects][1] == "low, step 2: 0.01"
    strength = [float(rect.get("fill-opacity", "nan")) for rect in rects]
    assert strength == sorted(strength)
    assert strength[0] == 0
    assert strength[3] == 1
    assert float(rects[0].get("y", "nan")) > float(rects[2].get("y", "nan"))  # the first row is at the bottom


def test_points_on_a_logarithmic_axis_are_evenly_spaced_for_powers_of_ten() -> None:
    svg = charts.dots([0.001, 0.01, 0.1], labels=["a", "b", "c"], groups=["0", "0", "1"], x="block", y="loss")
    heights = [float(dot.get("cy", "nan")) for dot in parsed(svg).findall(f"{SVG}circle")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.1)
    assert len(parsed(svg).findall(f"{SVG}rect")) == 1


def test_everything_drawn_stays_inside_the_box() -> None:
    values = [10.0 ** (-i % 7) for i in range(300)] + [0.0]
    labels = [str(i) for i in range(301)]
    for svg in (charts.line(values, x="x", y="y"), charts.dots(values, labels=labels, groups=labels, x="x", y="y")):
        for dot in parsed(svg).iter(f"{SVG}circle"):
            assert charts.LEFT <= float(dot.get("cx", "nan")) <= charts.WIDTH
            assert 0 <= float(dot.get("cy", "nan")) <= charts.HEIGHT - charts.BOTTOM + 0.1


def test_names_are_escaped() -> None:
    svg = charts.dots([1.0], labels=["<b>&"], groups=["<i>"], x="<x>", y="<y>")
    assert parsed(svg).findtext(f"{SVG}circle/{SVG}title") == "<b>&: 1"


@pytest.mark.parametrize("highest", [0.0, 1e-9, 0.0437, 1.0, 7.0, 12345.6])
def test_ticks_cover_the_values_in_few_steps(highest: float) -> None:
    ticks = charts.linear_ticks(highest)
    assert ticks[0] == 0
    assert ticks[-1] >= highest * (1 - 1e-9)
    assert 3 <= len(ticks) <= 7


@pytest.mark.parametrize("values", [[], [float("nan")], [-1.0]])
def test_a_chart_of_nonsense_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        charts.line(values, x="x", y="y")
