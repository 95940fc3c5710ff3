"""What `whatif` says: shapes and cuts against shrunk models, verdicts from known times, estimates that say so."""

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from obsdiff import whatif
from obsdiff.cli import main
from obsdiff.families import Family
from obsdiff.job import open_job
from obsdiff.measurements import NotMeasured
from obsdiff.settings import Settings
from obsdiff.shrinking import shrink
from obsdiff.whatif import backends as whatif_backends
from obsdiff.whatif import report as whatif_report
from obsdiff.whatif import run as whatif_run
from obsdiff.whatif import steps as whatif_steps
from obsdiff.whatif.subject import CutPlan, Subject, subject_of
from obsdiff_export import measuring, roofline
from obsdiff_export.build import BUILDERS
from obsdiff_export.forcing import write_linear
from obsdiff_export.latency_table import load
from obsdiff_export.linears import Shape
from obsdiff_export.measuring import Product, Variant
from obsdiff_runtime import timing
from obsdiff_runtime.bundle import Defaults
from obsdiff_runtime.errors import CompatibilityError, ConfigError, RunError

SIZE: dict[str, Any] = {"height": 32, "width": 32, "align": 8}


@pytest.fixture(scope="module")
def subject(sd3_folder: Path) -> Subject:
    return subject_of(Settings(model=str(sd3_folder), **SIZE))


class Fake:
    """Times by a formula, on a clock of its own."""

    backend, dtype = "fake", "float16"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, time: Callable[[Shape, str], float], refusal: str = "") -> None:
        self.now, self._time, self._refusal = 0.0, time, refusal
        monkeypatch.setattr(timing, "time", self)
        monkeypatch.setattr(measuring, "perf_counter", self.perf_counter)

    def perf_counter(self) -> float:
        return self.now

    def device(self) -> str:
        return "a GPU"

    def versions(self) -> dict[str, str]:
        return {"fake": "1"}

    def without_sparse(self) -> str:
        return self._refusal

    @contextmanager
    def prepare(self, shape: Shape, variant: Variant) -> Iterator[Product]:
        def run() -> None:
            self.now += self._time(shape, variant)

        yield Product(run=run)


def test_shapes_are_those_of_the_linears_at_all_images_of_a_call(subject: Subject) -> None:
    job = open_job(Settings(model=subject.model, **SIZE), sparsity_required=False)
    positions = job.positions(job.denoiser)
    assert subject.call["rows"] == 2
    for name, shape in subject.shapes.items():
        linear: Any = job.denoiser.get_submodule(name)
        assert shape == Shape(2 * positions[name], linear.in_features, linear.out_features)
    assert set(subject.shapes) == {linear.name for linear in job.family.linears(job.denoiser)}


@pytest.mark.parametrize("kind", ["sd3", "sd15"])
def test_cuts_have_the_widths_of_a_model_cut_so(kind: str, request: pytest.FixtureRequest) -> None:
    found = subject_of(Settings(model=str(request.getfixturevalue(f"{kind}_folder")), **SIZE))
    assert {cut.kind for cut in found.cuts} == {"heads", "ffn"}
    assert {cut.rounding for cut in found.cuts} == {"aligned", "paper", "whole"}
    job = open_job(Settings(model=found.model, **SIZE), sparsity_required=False)
    for cut in found.cuts:
        denoiser = copy.deepcopy(job.denoiser)
        _shrink_alike(denoiser, job.family, cut)
        for name, shape in found.shapes.items():
            linear: Any = denoiser.get_submodule(name)
            expected = cut.shapes.get(name, shape)
            assert (linear.in_features, linear.out_features) == (expected.k, expected.n)


def _shrink_alike(denoiser: nn.Module, family: Family, cut: CutPlan) -> None:
    keep = {}
    for group in family.groups(denoiser):
        consumer = group.consumers[0].name
        if group.kind == cut.kind and consumer in cut.shapes:
            keep[group.name] = range(cut.shapes[consumer].k // group.width)
    shrink(denoiser, family, keep)


def test_2_of_4_is_worth_it_where_it_was_faster(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def time(shape: Shape, variant: str) -> float:
        return shape.macs * 1e-9 / (1.25 if variant == "2:4" and shape.n == 128 else 1.0)

    found = whatif.explore(subject, Fake(monkeypatch, time), seconds=60)
    verdicts = {row.shape.n == 128: row.verdict for row in found.rows}
    assert verdicts == {True: "worth it", False: "not worth it"}
    assert found.verdict == "worth it"
    assert sum(row.share or 0 for row in found.rows) == pytest.approx(1)
    # a third of the heads' and feed-forwards' time, of which a fifth goes
    dense = sum(row.linears * row.shape.macs for row in found.rows)
    won = sum(row.linears * row.shape.macs for row in found.rows if row.verdict == "worth it")
    assert f"{dense / (dense - won * 0.2):.2f}x as fast" in found.sentence
    for cut in found.cuts:
        assert cut.ratio == pytest.approx(cut.macs_ratio)


def test_nothing_gained_is_said(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    found = whatif.explore(subject, Fake(monkeypatch, lambda shape, _: shape.macs * 1e-9), seconds=60)
    assert found.verdict == "not worth it"
    assert "not worth it here" in found.sentence


def test_noise_decides_nothing(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.Generator().manual_seed(0)

    def time(shape: Shape, variant: str) -> float:
        return float(torch.empty(()).uniform_(0.5, 1.5, generator=noise))

    found = whatif.explore(subject, Fake(monkeypatch, time), seconds=600)
    assert found.verdict == "within noise"
    assert {row.verdict for row in found.rows} <= {"within noise", "not worth it"}


def test_a_device_without_sparse_kernels_times_the_widths(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch, lambda shape, _: shape.macs * 1e-9, refusal="no sparse kernels")
    found = whatif.explore(subject, fake, seconds=60)
    assert found.verdict == "not measured"
    assert {row.reason for row in found.rows} == {"no sparse kernels"}
    assert all(cut.ratio is not None for cut in found.cuts)
    assert {entry.variant for entry in found.table.entries} == {"dense"}


def test_shapes_that_come_too_late_are_named(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch, lambda shape, _: 1.0 if shape.m > 100 else 1e-4)
    found = whatif.explore(subject, fake, seconds=20)
    late = [row for row in found.rows if row.dense_ms is None]
    assert late
    assert all("--minutes" in row.reason for row in late)
    assert any("were not timed" in note for note in found.notes)
    with pytest.raises(RunError, match=r"no linear of .* could be timed on a GPU: .*--minutes"):
        whatif.explore(subject, Fake(monkeypatch, lambda *_: 1.0), seconds=1)


def test_an_estimate_says_so_everywhere(subject: Subject) -> None:
    found = whatif.estimate(subject, roofline.gpu("h100"), "float16")
    assert found.to_json()["what"] == "estimate"
    assert found.to_json()["estimate"] is True
    assert found.table.what == "estimate"
    assert found.verdict == "not measured"
    assert {row.verdict for row in found.rows} == {"not measured"}
    assert "1.0 to 1.3x" in found.sentence
    assert all("ESTIMATE" in text for text in (found.title, found.sentence))
    assert all("ESTIMATE" in str(table.title) for table in whatif_report.tables(found))
    html = whatif_report.page(found, None)
    assert "<title>ESTIMATE" in html
    assert html.count("ms, ESTIMATE") == 4  # axis and name of either chart
    assert all(f"{name} at least" in html for name in ("dense", "2:4", "before", "after"))


def test_derived_peaks_are_called_that(subject: Subject) -> None:
    found = whatif.estimate(subject, roofline.gpu("thor"), "float8")
    assert any("not printed in that source but derived" in note for note in found.notes)
    with pytest.raises(ConfigError, match="int8 is known here for certain"):
        whatif.estimate(subject, roofline.gpu("thor"), "int8")


def test_the_page_asks_nothing_of_the_network(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    found = whatif.explore(subject, Fake(monkeypatch, lambda shape, _: shape.macs * 1e-9), seconds=60)
    html = whatif_report.page(found, "obsdiff whatif <model>")
    assert "obsdiff whatif &lt;model&gt;" in html
    assert "ESTIMATE" not in html
    assert not re.findall(r"(?:src|href)=|@import|https?://(?!www\.w3\.org)", html)


@dataclass(frozen=True)
class Runner:
    """Remembers what it was to run."""

    opened: list[tuple[str, bool]]
    sparse: str = ""
    dtype: torch.dtype = torch.float32

    @contextmanager
    def open(
        self, name: str, graph: Path, sizes: Mapping[str, Any], inputs: Mapping[str, Any], *, sparse: bool
    ) -> Iterator[Callable[[], object]]:
        self.opened.append((name, sparse))
        if sparse:
            raise CompatibilityError("built in 3 s, but not timed: no GPU")
        yield lambda: None


@dataclass(frozen=True)
class Exported:
    path: Path


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The width of the middle block's feed-forward in each denoiser that is exported; the graphs are single linears."""
    widths: list[int] = []

    def export(component: Any, folder: Path, **_: Any) -> Exported:
        widths.append(component.module.transformer_blocks[1].ff.net[2].in_features)
        return Exported(write_linear(folder, Shape(4, 32, 32), "float32"))

    monkeypatch.setattr(whatif_steps.onnx, "export", export)
    return widths


def test_whole_calls_are_timed_dense_and_cut_for_real(subject: Subject, exported: list[int]) -> None:
    runner = Runner(opened=[], sparse="it has no sparse kernels")
    steps = whatif_steps.time_steps(subject, Settings(model=subject.model, **SIZE), runner, seconds=2)
    found = {step.name: step for step in steps}
    assert list(found) == ["dense", "structured:0.25 by magnitude", "2:4 forced"]
    assert exported == [128, 96]
    assert found["2:4 forced"].ms == NotMeasured(why="it has no sparse kernels")
    assert isinstance(found["dense"].ms, float)
    comparison = found["structured:0.25 by magnitude"].comparison
    assert comparison is not None
    assert comparison.against == "dense"


def test_where_heads_stay_neurons_are_cut(
    build_pipeline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build_pipeline("wan", num_layers=3).save_pretrained(tmp_path)
    widths: list[int] = []

    def export(component: Any, folder: Path, **_: Any) -> Exported:
        widths.append(component.module.blocks[1].ffn.net[2].in_features)
        return Exported(write_linear(folder, Shape(4, 32, 32), "float32"))

    monkeypatch.setattr(whatif_steps.onnx, "export", export)
    settings = Settings(model=str(tmp_path), num_frames=5, max_sequence_length=8, **SIZE)
    runner = Runner(opened=[], sparse="it has no sparse kernels")
    steps = whatif_steps.time_steps(subject_of(settings), settings, runner, seconds=2)
    assert [step.name for step in steps] == ["dense", "ffn:0.25 by magnitude", "2:4 forced"]
    assert widths == [96, 72]


@pytest.mark.usefixtures("exported")
def test_what_cannot_be_run_says_why_and_leaves_the_others(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[tuple[int, int]] = []
    monkeypatch.setattr(whatif_steps.forcing, "force", lambda model, folder, n, m, **_: forced.append((n, m)))
    runner = Runner(opened=[])
    settings = Settings(model=subject.model, **(SIZE | {"align": 512}))
    steps = {step.name: step.ms for step in whatif_steps.time_steps(subject, settings, runner, seconds=2)}
    assert forced == [(2, 4)]
    assert ("2:4 forced", True) in runner.opened
    assert steps["2:4 forced"] == NotMeasured(why="built in 3 s, but not timed: no GPU")
    assert isinstance(steps["dense"], float)


def test_engines_that_nothing_here_can_run_are_built_all_the_same(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = write_linear(tmp_path, Shape(4, 32, 32), "float16")
    runner = whatif_backends.EngineRunner(
        builder=BUILDERS["tensorrt_rtx"],
        dtype=torch.float16,
        folder=tmp_path / "engines",
        obstacle="no GPU",
        targets=("8.6",),
    )
    opened = runner.open("2:4 forced", graph, {}, {}, sparse=True)
    with pytest.raises(CompatibilityError, match=r"built by tensorrt_rtx .* MiB, but not timed: no GPU"):
        opened.__enter__()
    assert list((tmp_path / "engines" / "2-4-forced").glob("*.plan"))


def test_onnx_runtime_runs_a_whole_graph(tmp_path: Path) -> None:
    graph = write_linear(tmp_path, Shape(4, 32, 32), "float32")
    inputs = {"x": np.ones((4, 32), np.float32)}
    with whatif_steps.OrtRunner(threads=1).open("dense", graph, {}, inputs, sparse=False) as run:
        assert run()["y"].shape == (4, 32)  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 0.0}, "--minutes 0: must be more than 0"),
        ({"gpu": "gtx 280"}, "no published figures of it are known here"),
        ({"backend": "abacus"}, "unknown; there are auto, tensorrt, torch, cpu"),
        ({"gpu": "a100", "dtype": "fp8"}, "no published peak of float8 is known here for certain"),
        ({"backend": "cpu", "dtype": "int8"}, "--dtype int8: what is here times fp32"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_model_is_opened(options: dict[str, Any], message: str) -> None:
    settings = Settings(model="no/such/model", dtype=options.pop("dtype", None))
    with pytest.raises(ConfigError, match=message):
        whatif_run.run(settings, **options)


def test_the_verb_writes_a_table_that_allocation_reads(
    sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, html = tmp_path / "new" / "table.json", tmp_path / "page.html"
    flags = ["--shapes-only", "--backend", "cpu", "--minutes", "5", "--threads", "1", "--json"]
    size = ["--height", "32", "--width", "32", "--align", "8"]
    monkeypatch.setattr(
        sys, "argv", ["obsdiff", "whatif", str(sd3_folder), *flags, *size, "-o", str(table), "--html", str(html)]
    )
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    written = load(table)
    assert printed["what"] == written.what == "measured"
    assert printed["verdict"] == "not measured"
    assert written.backend == "ONNX Runtime"
    settings = Settings(
        model=str(sd3_folder), sparsity="structured:0.5", allocation=f"latency:{table}", height=32, width=32, align=8
    )
    assert open_job(settings).recipe.allocation.startswith(f"latency:{table}#")
    with pytest.raises(ConfigError, match=r"to_q: the latency table has no linear of .* 32 x 32 px, 2 images"):
        open_job(
            Settings(
                model=str(sd3_folder), sparsity="structured:0.5", allocation=f"latency:{table}", height=16, width=16
            )
        )


def test_a_bundle_s_widths_are_those_of_its_graph(
    sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from obsdiff.whatif import subject as subject_module
    from obsdiff_export.linears import Weight

    defaults = Defaults(height=48, width=32, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=None)

    class Bundle:
        root, manifest = tmp_path, SimpleNamespace(defaults=defaults)

        def onnx(self, component: str) -> Path:
            return tmp_path / component

    whole = subject_of(Settings(model=str(sd3_folder), **SIZE))
    narrow = {
        name: Weight(initializer=name, k=shape.k, n=shape.n // (4 if shape.n == 128 else 1), axis=1)
        for name, shape in whole.shapes.items()
    }
    monkeypatch.setattr(subject_module, "_bundle", lambda model: Bundle())
    monkeypatch.setattr(subject_module, "weights_of", lambda path: narrow)
    found = subject_of(Settings(model=str(sd3_folder), align=8))
    assert {shape.n for shape in found.shapes.values()} == {32}
    assert (found.call["height"], found.call["width"], found.call["rows"]) == (48, 32, 1)  # as it is served
    assert found.cuts == ()  # which units are left is not known
    narrow.popitem()
    with pytest.raises(ConfigError, match="Give the model instead"):
        subject_of(Settings(model=str(sd3_folder), **SIZE))
