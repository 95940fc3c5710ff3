"""A latency table timed anew: which products are timed together, and what is said of those that are not."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from obsdiff_export import latency_table
from obsdiff_export.latency_table import Entry, LatencyTable
from obsdiff_export.linears import Shape
from obsdiff_export.measuring import Product, Variant
from obsdiff_export.retiming import retime
from obsdiff_runtime.errors import RunError

FULL, NARROW, SHORT, OTHER = Shape(8, 64, 32), Shape(8, 64, 16), Shape(8, 32, 32), Shape(4, 16, 16)


def entry(shape: Shape, variant: str = "dense") -> Entry:
    bound = 1e-9
    return Entry(
        m=shape.m,
        k=shape.k,
        n=shape.n,
        dtype="float16",
        variant=variant,
        ms=bound,
        low_ms=bound,
        high_ms=bound,
        rounds=0,
    )


ESTIMATE = LatencyTable(
    what="estimate",
    device="Orin",
    backend="roofline",
    date="2026-12-01T00:00:00+00:00",
    model="a model",
    call={"height": 512, "width": 512, "rows": 2, "text_tokens": 77},
    entries=tuple(entry(*each) for each in ((OTHER,), (NARROW,), (FULL, "2:4"), (SHORT,), (FULL,))),
)


class Sleeping:
    """Sparse products take half of the time."""

    backend = "TensorRT"
    dtype = "float16"

    def __init__(self, refusal: str = "", slow: Shape | None = None) -> None:
        self.prepared: list[tuple[Shape, str]] = []
        self._refusal, self._slow = refusal, slow

    def device(self) -> str:
        return "a GPU"

    def versions(self) -> dict[str, str]:
        return {"tensorrt": "10.3"}

    def without_sparse(self) -> str:
        return self._refusal

    @contextmanager
    def prepare(self, shape: Shape, variant: Variant) -> Iterator[Product]:
        self.prepared.append((shape, variant))
        seconds = 0.5 if shape == self._slow else 2e-3 if variant == "dense" else 1e-3
        yield Product(run=lambda: time.sleep(seconds))


def test_widths_that_an_allocation_compares_are_timed_by_turns() -> None:
    measurer = Sleeping()
    found = retime(ESTIMATE, measurer, seconds=20)
    assert measurer.prepared == [(FULL, "dense"), (FULL, "2:4"), (SHORT, "dense"), (NARROW, "dense"), (OTHER, "dense")]
    assert {(each.m, each.k, each.n, each.variant) for each in found.table.entries} == {
        (each.m, each.k, each.n, each.variant) for each in ESTIMATE.entries
    }
    assert all(each.rounds and each.ms > 0.9 for each in found.table.entries)
    assert (found.table.what, found.table.device, found.table.backend) == ("measured", "a GPU", "TensorRT")
    assert (found.table.model, found.table.call) == (ESTIMATE.model, ESTIMATE.call)
    assert found.to_json()["verdicts"] == {"8 x 64 x 32": "worth it"}
    title, headings, first, *_ = found.lines()
    assert title == "a model on a GPU, TensorRT, float16: measured"
    assert len(headings) == len(first)
    assert first.split()[:3] == ["8", "64", "32"]
    assert first.endswith("worth it")


def test_a_measured_table_is_one_that_allocation_reads(tmp_path: Path) -> None:
    found = retime(ESTIMATE, Sleeping(), seconds=20).table
    found.save(tmp_path / "table.json")
    assert latency_table.load(tmp_path / "table.json") == found
    found.require_widths(8, 64, 32, along="k")
    found.require_widths(8, 64, 32, along="n")


def test_without_sparse_kernels_the_rest_is_timed() -> None:
    measurer = Sleeping("no sparse kernels")
    found = retime(ESTIMATE, measurer, seconds=20)
    assert all(variant == "dense" for _, variant in measurer.prepared)
    assert found.failures == {(FULL, "2:4"): "no sparse kernels"}
    assert list(found.lines())[-1] == "note: 1 products were not timed, such as 8 x 64 x 32, 2:4: no sparse kernels"


def test_what_comes_too_late_is_told() -> None:
    with pytest.raises(RunError, match="no product could be timed on a GPU: the time was up"):
        retime(ESTIMATE, Sleeping(), seconds=0)
    both = dataclasses.replace(ESTIMATE, entries=(entry(FULL), entry(OTHER)))
    found = retime(both, Sleeping(slow=OTHER), seconds=3)
    assert [Shape(each.m, each.k, each.n) for each in found.table.entries] == [FULL]
    assert found.failures == {(OTHER, "dense"): "the time was up; give it more --minutes"}
