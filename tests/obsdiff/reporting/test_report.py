import dataclasses
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from obsdiff import wording
from obsdiff.comparison import Evaluated
from obsdiff.evaluation import ImagePair, ScorePair
from obsdiff.guidance import GuidanceScore, summarise
from obsdiff.measurements import Counts, LatencyPair, NotMeasured, Report
from obsdiff.page import data_uri, render
from obsdiff.report import runs_table, summary_table, write_html, write_json, write_side_by_side
from obsdiff_runtime.timing import Timings

MakeReport = Callable[..., Report]
MakeTimings = Callable[[list[float], list[float]], Timings]
Pairs = tuple[ImagePair, ...]
VOID = {"meta", "img", "br"}


class Elements(HTMLParser):
    """Checks that elements nest, and gathers attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(page)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def latency(timings: Timings) -> LatencyPair:
    return LatencyPair.of(timings, what="one denoiser call", backend="ONNX Runtime on the CPU", shape="2 rows")


def test_json_says_everything_and_only_finite_numbers(make_report: MakeReport, tmp_path: Path) -> None:
    report = make_report(engines=NotMeasured(why="--trt was not given"))
    write_json(report, tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert data["dense"]["parameters"] == report.dense.parameters
    assert data["evaluation"]["sampling"]["num_inference_steps"] == 20
    assert data["engines"] == {"not_measured": "--trt was not given"}
    assert data["components"][2]["max_error"] == {"not_measured": "the day is short"}
    assert data["latency"][0]["verdict"] == "no different"
    assert len(data["layers"]) == len(report.layers)


def test_the_page_asks_nothing_of_the_network(make_report: MakeReport, pairs: Pairs, tmp_path: Path) -> None:
    write_html(make_report(), pairs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    elements = Elements(page)
    links = [value for _, name, value in elements.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert len(links) == 3 * len(pairs)
    assert all(link.startswith("data:image/") for link in links)
    assert "url(" not in page
    assert "@import" not in page
    assert "<script" not in page
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in elements.attributes


def test_the_page_shows_every_pair_layer_and_engine(make_report: MakeReport, pairs: Pairs) -> None:
    report = make_report()
    text = Elements(render(report, pairs)).text
    for pair in pairs:
        assert pair.prompt in text
        assert f"seed {pair.seed}" in text
    for layer in report.layers:
        assert layer.name in text
    assert "ignores the sparse flag" in text
    assert "obsdiff export --sparsity 2:4 --trt -o out" in text
    assert text.count("✗ disobeys") == 1
    assert "both models obey 7, only the dense one 1, only the pruned one 0, neither 0" in text


def test_what_users_write_is_text_not_markup(make_report: MakeReport, pairs: Pairs) -> None:
    evil = "<script>alert('x')</script> & \"quotes\""
    first = pairs[0]
    nasty = ImagePair(prompt=evil, seed=first.seed, dense=first.dense, pruned=first.pruned)
    report = make_report(model=evil, notes=(evil,), command=evil, recipe={"prompt": evil})
    object.__setattr__(report.evaluation.per_prompt[0], "prompt", evil)  # type: ignore[union-attr]
    object.__setattr__(report.layers[0], "name", evil)
    page = render(report, (nasty, *pairs[1:]))
    assert "<script" not in page
    assert Elements(page).text.count(evil) >= 4


@pytest.mark.parametrize("missing", ["components", "engines", "latency", "evaluation"])
def test_what_is_absent_is_said_to_be_absent_and_why(make_report: MakeReport, missing: str) -> None:
    report = make_report(**{missing: NotMeasured(why="nobody asked for it")})
    text = Elements(render(report, ())).text
    assert re.search(r"[Nn]ot measured[:,] nobody asked for it", text)
    assert any("nobody asked for it" in line for line in wording.absences(report))
    assert "nan" not in text.lower().replace("nanoseconds", "")


def test_nothing_measured_is_a_page_without_numbers_made_up(make_report: MakeReport) -> None:
    absent = NotMeasured(why="the run stopped after pruning")
    counts = Counts(parameters=10, nonzero=10, macs=absent, bytes_on_disk=absent)
    values = dict.fromkeys(("components", "engines", "latency", "evaluation"), absent)
    report = make_report(**values, dense=counts, pruned=counts, layers=(), stages=(), notes=(), command=None)
    Elements(render(report, ()))
    rows = wording.summary(report)
    assert [row.pruned for row in rows if row.label not in ("parameters of the denoiser", "of these not zero")] == [
        "not measured"
    ] * 4
    json.dumps(report.to_json(), allow_nan=False)


def test_no_judge_leaves_obedience_out(make_report: MakeReport, pairs: Pairs) -> None:
    text = Elements(render(make_report(judged=False), pairs)).text
    assert "obeys" not in text
    assert "prompts obeyed" not in text


def test_faster_and_slower_are_said_only_beyond_the_noise(make_report: MakeReport, make_timings: MakeTimings) -> None:
    steady = [10.0 + i % 3 for i in range(20)]
    verdicts = {factor: latency(make_timings(steady, [factor * t for t in steady])) for factor in (0.5, 1.0, 2.0)}
    assert [pair.verdict for pair in verdicts.values()] == ["faster", "no different", "slower"]
    assert latency(make_timings(steady[:3], steady[:3])).verdict == "unknown"
    said = [wording.headline(make_report(latency=(pair,)))[1] for pair in verdicts.values()]
    assert said[0].startswith("Faster here")
    assert "2.00x the dense speed" in said[0]
    assert said[1].startswith("No faster here")
    assert said[2].startswith("Slower here")


def test_zeros_on_a_cpu_are_said_to_give_no_speed(make_report: MakeReport) -> None:
    assert "no speed-up on a CPU" in wording.headline(make_report())[1]
    assert "no speed-up on a CPU" not in wording.headline(make_report(sparsity="structured:0.25"))[1]
    assert "no smaller" in wording.headline(make_report())[0]


def test_the_table_has_a_line_for_size_speed_and_quality(make_report: MakeReport) -> None:
    console = Console(width=120, file=io.StringIO())
    with console.capture() as capture:
        console.print(summary_table(make_report()))
    text = capture.get()
    for label in ("parameters", "on disk", "one denoiser call", "prompts obeyed", "velocity error", "SSIM"):
        assert label in text


def test_the_table_says_what_was_done_or_that_nothing_was(make_report: MakeReport) -> None:
    assert str(summary_table(make_report()).title).endswith("2:4  obsdiff")
    assert str(summary_table(make_report(sparsity="structured:0", layers=())).title).endswith("  dense")


def test_numbers_are_worded_with_units() -> None:
    assert wording.size(0) == "0 B"
    assert wording.size(1536) == "1.5 KiB"
    assert wording.size(9.4 * 2**30) == "9.4 GiB"
    assert wording.count(8_060_000_000) == "8.06 G"
    assert wording.count(999_600) == "1 M"
    assert wording.seconds(0.5) == "0.50 s"
    assert wording.seconds(119.7) == "2 min 0 s"
    assert wording.seconds(7260) == "2 h 1 min"
    assert wording.milliseconds(12.34) == "12.3 ms"
    assert wording.milliseconds(2500) == "2.50 s"


def test_small_pictures_are_embedded_to_the_last_bit_and_large_ones_reduced() -> None:
    rng = np.random.default_rng(0)
    assert data_uri(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).startswith("data:image/png;base64,")
    large = data_uri(np.zeros((1024, 1024, 3), np.uint8))
    assert large.startswith("data:image/jpeg;base64,")
    assert len(large) < 20_000


def test_rtx_engines_are_said_to_ignore_zeros(make_report: MakeReport) -> None:
    report = make_report(notes=("a note of the run",))
    notes = wording.notes(report)
    assert notes[0] == "a note of the run"
    assert any("TensorRT-RTX ignores" in note for note in notes)
    assert not any("TensorRT-RTX" in note for note in wording.notes(make_report(sparsity="structured:0.3", notes=())))


def test_engines_count_their_linears_and_say_each_sentence_once(make_report: MakeReport, pairs: Pairs) -> None:
    report = make_report()
    assert [wording.proven(engine) for engine in report.engines] == [
        "40 active, 12 not chosen, 4 unknown",
        "none looked at",
        "none looked at",
    ]
    said = wording.engine_sparsity(report)
    assert said == (
        "transformer: not supported by this backend: it ignores the sparse flag",
        "vae_decoder, text_encoder: The engine was built without the sparse flag and runs dense kernels.",
    )
    html = render(report, pairs)
    for words in (*said, "40 active, 12 not chosen, 4 unknown"):
        assert html.count(words) == 1
    assert wording.engine_sparsity(make_report(engines=NotMeasured(why="none were asked for"))) == ()


def test_linears_left_dense_are_counted_with_their_reason(make_report: MakeReport) -> None:
    assert "1 linear stayed dense: 6 inputs are no multiple of 4." in wording.notes(make_report())


def test_nothing_pruned_is_said_plainly(make_report: MakeReport) -> None:
    assert wording.headline(make_report(layers=()))[0] == "Nothing was pruned: the model is as it was given."


def side_by_side(make_report: MakeReport, **changes: object) -> tuple[list[Path], list[Report]]:
    folders = [Path("runs/seed 0"), Path("runs/<seed>&1")]
    first = make_report(**changes)
    if isinstance(first.evaluation, NotMeasured):
        return folders, [first, first]
    worse = dataclasses.replace(first.evaluation, velocity_error=first.evaluation.velocity_error + 0.02, psnr_db=None)
    return folders, [first, dataclasses.replace(first, evaluation=worse)]


def test_runs_side_by_side_have_a_row_each_and_their_mean_and_deviation(make_report: MakeReport) -> None:
    folders, reports = side_by_side(make_report)
    spread = Evaluated(folders=tuple(folders), reports=tuple(reports)).spread
    headings, rows = wording.runs(folders, reports, spread)
    assert [row[0] for row in rows] == ["dense", *map(str, folders), "mean", "std", "least", "most"]
    assert all(len(row) == 1 + len(headings) for row in rows)
    column = {row[0]: row[1 + headings.index("PSNR, dB")] for row in rows}
    assert column[str(folders[1])] == "identical"
    assert column["mean"] == ""  # an infinite ratio has no mean
    velocity = {row[0]: row[1 + headings.index("velocity")] for row in rows}
    assert velocity["std"] == f"{0.02 / 2**0.5:#.3g}"
    assert velocity["dense"] == ""
    obeyed = {row[0]: row[1 + headings.index("obeyed")] for row in rows}
    assert obeyed["dense"].endswith(" %")


def test_the_table_of_runs_fits_a_terminal(make_report: MakeReport) -> None:
    folders, reports = side_by_side(make_report)
    console = Console(width=80, file=io.StringIO())
    console.print(runs_table(folders, reports, {}))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in said
    assert "runs/seed 0" in said


def test_the_page_of_runs_is_one_whole_file_that_asks_nothing_of_the_network(
    make_report: MakeReport, pairs: Pairs, tmp_path: Path
) -> None:
    folders, reports = side_by_side(make_report)
    write_side_by_side(folders, reports, {}, [pairs[:2], pairs[:2]], tmp_path / "page.html")
    page = Elements((tmp_path / "page.html").read_text(encoding="utf-8"))
    sources = [value for _, name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 2 * 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "runs/<seed>&1" in page.text
    assert [value for tag, name, value in page.attributes if (tag, name) == ("g", "class")] == ["k0", "k1"] * 2


def test_runs_that_measured_nothing_make_a_page_without_curves(make_report: MakeReport, tmp_path: Path) -> None:
    folders, reports = side_by_side(make_report, evaluation=NotMeasured(why="nothing was pruned"))
    write_side_by_side(folders, reports, {}, [(), ()], tmp_path / "page.html")
    assert "<svg" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_guidance_and_judges_are_on_the_page_with_their_cautions(make_report: MakeReport, pairs: Pairs) -> None:
    report = make_report()
    evaluation = report.evaluation
    assert not isinstance(evaluation, NotMeasured)
    fixed, high = (GuidanceScore(guidance_scale=scale, dense=0.5, pruned=scale / 10) for scale in (3.5, 6.0))
    judged = dataclasses.replace(
        evaluation,
        lpips=0.0625,
        scores={"clip_score": ScorePair(dense=31.25, pruned=30.5)},
        fid_clip=ScorePair(dense=1.5, pruned=2.5),
        guidance=summarise("obedience", fixed, [high]),
    )
    report = dataclasses.replace(report, evaluation=judged)
    text = Elements(render(report, pairs)).text
    for said in (
        "clip_score",
        "31.25",
        "LPIPS",
        "60.0 % at 6",
        "bias of a small sample",
        "chosen on the same 8 prompts",
    ):
        assert said in text
    json.dumps(report.to_json(), allow_nan=False)
