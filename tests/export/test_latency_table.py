"""Latency tables: interpolation against numpy's, what is refused, and estimates against the formula."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsdiff_export import roofline
from obsdiff_export.latency_table import Entry, LatencyTable, load
from obsdiff_export.linears import Shape
from obsdiff_runtime.errors import ConfigError

CALL = {"height": 64, "width": 64, "rows": 2, "text_tokens": 77}


def entry(m: int, k: int, n: int, ms: float, variant: str = "dense", **changes: Any) -> Entry:
    given = {"dtype": "float16", "low_ms": ms, "high_ms": ms, "rounds": 9} | changes
    return Entry(m=m, k=k, n=n, ms=ms, variant=variant, **given)


def table(*entries: Entry, **changes: Any) -> LatencyTable:
    given = {"what": "measured", "device": "a GPU", "backend": "fake", "date": "today", "model": "tiny", "call": CALL}
    return LatencyTable(entries=entries, **(given | changes))


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = table(entry(8, 16, 32, 1.5), entry(8, 16, 32, 1.0, "2:4"), versions={"torch": "2"})
    written.save(tmp_path / "table.json")
    assert load(tmp_path / "table.json") == written


@given(
    st.dictionaries(st.integers(1, 400), st.floats(0.01, 9), min_size=1, max_size=6),
    st.floats(0, 1),
    st.sampled_from(["k", "n"]),
)
def test_between_widths_a_time_is_a_straight_line(curve: dict[int, float], place: float, along: Any) -> None:
    def shape(width: int) -> tuple[int, int, int]:
        return (4, width, 99) if along == "k" else (4, 99, width)

    found = table(*(entry(*shape(width), ms) for width, ms in curve.items()), entry(5, 7, 7, 100.0))
    width = round(1 + place * (max(curve) - 1))
    widths = sorted(curve)
    # below the narrowest numpy goes on at its value too
    expected = np.interp(width, widths, [curve[each] for each in widths])
    assert found.ms(*shape(width), along=along) == pytest.approx(expected, rel=1e-12)


def test_2_of_4_is_not_taken_for_a_dense_time() -> None:
    found = table(entry(4, 8, 8, 2.0), entry(4, 8, 8, 1.0, "2:4"))
    assert found.ms(4, 8, 8, along="n") == 2.0


def test_a_shape_that_is_absent_is_named_with_what_the_table_is_of() -> None:
    found = table(entry(4, 8, 8, 2.0))
    for shape in ((3, 8, 8), (4, 8, 9)):
        with pytest.raises(
            ConfigError, match=rf"no linear of {shape[0]} x 8 x {shape[2]} .* tiny, 64 x 64 px, 2 images"
        ):
            found.ms(*shape, along="n")
    with pytest.raises(ConfigError, match="4 x 8 x 8 at no smaller number of outputs"):
        found.require_widths(4, 8, 8, along="n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema 2, this obsdiff reads 1"),
        ({"kind": "x"}, "is no latency table"),
        ({"what": "guess"}, "what should be one of measured, estimate"),
        ({"call": {"height": 1, "width": 1, "rows": 0, "text_tokens": 1}}, "call.rows"),
        ({"call": {"height": 1, "width": 1, "rows": 1}}, "call.text_tokens is absent"),
        ({"entries": []}, "the table is empty"),
        ({"surprise": 1}, "unknown field surprise"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table(entry(4, 8, 8, 2.0)).to_json() | changes))
    with pytest.raises(ConfigError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ms": 0.0, "low_ms": 0.0}, "times should be"),
        ({"low_ms": 3.0}, "times should be"),
        ({"ms": float("nan")}, "not a finite number"),
        ({"variant": "sparse"}, "no such product"),
        ({"k": 0}, "no such product"),
        ({"dtype": "int8"}, "mixes precisions"),
        ({"n": 9}, "is there twice"),
    ],
)
def test_an_entry_that_cannot_be_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    data = table(entry(4, 8, 8, 2.0), entry(4, 8, 9, 2.0)).to_json()
    data["entries"] = [data["entries"][1], {**data["entries"][0], **changes}]
    path = tmp_path / "table.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        load(tmp_path / "table.json")


def test_a_large_product_takes_its_arithmetic() -> None:
    shape = Shape(8192, 4096, 4096)
    a100 = roofline.gpu("A100")
    assert roofline.estimate_ms(a100, shape, "float16", sparse=False) == pytest.approx(2 * shape.macs / 312e12 * 1e3)
    assert roofline.estimate_ms(a100, shape, "float16", sparse=True) == pytest.approx(2 * shape.macs / 624e12 * 1e3)
    assert not roofline.memory_bound(a100, shape, "float16")


def test_a_product_with_few_tokens_waits_for_its_weights() -> None:
    shape, l4 = Shape(1, 4096, 4096), roofline.gpu("l4")
    assert roofline.memory_bound(l4, shape, "float16")
    weights = 4096 * 4096 * 2
    activations = (4096 + 4096) * 2
    assert roofline.estimate_ms(l4, shape, "float16", sparse=False) == pytest.approx((weights + activations) / 300e6)
    # a kept weight of 16 bits and two bits of where it was, for every two
    assert roofline.estimate_ms(l4, shape, "float16", sparse=True) == pytest.approx(
        (weights * 9 / 16 + activations) / 300e6
    )


@given(st.sampled_from(sorted(roofline.GPUS)), st.tuples(*[st.integers(1, 9000)] * 3))
def test_an_estimate_never_promises_more_than_twice(name: str, sizes: tuple[int, int, int]) -> None:
    card = roofline.gpu(name)
    for dtype, peak in card.peaks.items():
        assert peak.sparse == pytest.approx(2 * peak.dense, rel=1e-3)
        dense, sparse = (roofline.estimate_ms(card, Shape(*sizes), dtype, sparse=kind) for kind in (False, True))
        assert 1 <= dense / sparse <= 2.001


def test_names_are_taken_as_people_write_them() -> None:
    assert roofline.gpu("NVIDIA GeForce RTX 4090") is roofline.GPUS["rtx4090"]
    with pytest.raises(ConfigError, match="did you mean rtx4090"):
        roofline.gpu("rtx 4080")
    with pytest.raises(ConfigError, match="no published peak of float8 is known here for certain"):
        roofline.peak(roofline.gpu("a100"), "float8")
