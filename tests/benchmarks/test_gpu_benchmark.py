"""benchmarks/gpu on toy shapes and the CPU: every part runs, fails alone, and prints what it measured and no more."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu import checks, clock, denoisers, engines, linears, models, part, pruning, solving  # noqa: E402
from gpu.rows import Options, Row, Sheet, read  # noqa: E402
from gpu.table import number, table  # noqa: E402

TINY = Options(device="cpu", seconds=100, tiny=True)


@pytest.fixture
def sheet(tmp_path: Path) -> Sheet:
    return Sheet(tmp_path / "rows", "tried", 100)


def rows_of(sheet: Sheet) -> list[Row]:
    return read(sheet._path)


def kept(weight: Tensor, algorithm: int) -> Tensor:
    """In place of a compressed weight, for which a CPU has no kernels."""
    return weight


def printed(rows: list[Row]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(rows))
    return console.export_text()


def test_linears_are_timed_beside_dense_ones(sheet: Sheet) -> None:
    linears.run(sheet, TINY, kept)
    rows = rows_of(sheet)
    assert [(row.case["tokens"], row.case["k"]) for row in rows[:2]] == [(8, 32), (8, 64)]
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        assert {"dense_us", "sparse_us", "sparse_speedup", "sparse_low", "sparse_high"} <= row.figures.keys()
        assert row.figures["max_relative_difference"] == 0
        assert row.error.startswith("default: CompatibilityError"), (
            "torch has no such kernel on a CPU, and that is told"
        )
        assert "default_us" not in row.figures


def test_the_real_shapes_are_those_of_three_models() -> None:
    found = list(linears.cases(Options(device="cuda", seconds=1)))
    assert len(found) == (3 + 4 + 6) * 5 * 2
    assert {case.shape.m for case in found} == {1024, 2048, 4096, 8192, 16384}
    assert all(case.shape.k % 64 == case.shape.n % 64 == 0 for case in found)
    assert len(list(linears.cases(Options(device="cuda", seconds=1, quick=True)))) == 13


def test_the_solve_is_measured_and_compared_with_the_cpu_s(sheet: Sheet) -> None:
    solving.run(sheet, TINY)
    agreement, *solves = rows_of(sheet)
    assert agreement.case["what"] == "cpu against cpu"
    assert agreement.figures["lean_max_difference"] == 0
    assert agreement.figures["sweep_loss_ratio"] == 1
    assert [row.case["solver"] for row in solves] == list(solving.SOLVERS)
    assert all(row.figures["seconds"] > 0 and row.error == "" for row in solves)
    losses = {row.case["solver"]: row.figures["relative_loss"] for row in solves}
    assert losses["full"] < losses["sweep"] == pytest.approx(losses["plain"], rel=1e-3)


def test_the_shipped_and_a_large_pipeline_are_pruned(sheet: Sheet) -> None:
    pruning.run(sheet, TINY)
    large, shipped = rows_of(sheet)
    assert (large.error, shipped.error) == ("", "")
    assert large.figures["linears"] == 12 + 9  # the last block gives no text
    assert {"calibrate_seconds", "prune_blocks_seconds", "planned_bytes", "mean_loss"} <= large.figures.keys()
    assert 0 < shipped.figures["velocity_error"] < 0.5


def test_denoisers_are_raced_in_every_mode(sheet: Sheet) -> None:
    denoisers.run(sheet, TINY, kept)
    rows = rows_of(sheet)
    assert len(rows) == 3 * 2 * 4
    for row in rows:
        if "graph" in str(row.case["mode"]):
            assert row.error == "CompatibilityError: a CUDA graph needs a GPU"
        else:
            assert {"dense_ms", "pruned_ms", "pruned_speedup"} <= row.figures.keys(), row
    shares = {row.case["variant"]: row.figures["parameters_share"] for row in rows if row.figures}
    assert shares["2:4"] == 1
    assert 0.5 < shares["25% smaller, unaligned"] < 0.9


def test_a_variant_that_cannot_be_made_is_told_once(sheet: Sheet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoisers, "PASSES", ((("block",), ("eager",)), (("denoiser",), ("eager",))))

    def refuse(weight: Tensor, algorithm: int) -> Tensor:
        raise RuntimeError("no kernel\nand more")

    denoisers.run(sheet, TINY, refuse)
    rows = rows_of(sheet)
    assert [row.error for row in rows if row.case["variant"] == "2:4"] == ["RuntimeError: no kernel"]
    assert any(row.figures for row in rows)


def test_variants_are_as_wide_as_they_say() -> None:
    dense = models.dense(TINY)
    for align, width in ((8, 104), (1, 102)):
        shrunk = models.shrunk(dense, 0.2, align)
        block: Any = shrunk.get_submodule("transformer_blocks.0")
        assert block.ff.net[0].proj.out_features == width
        assert block.attn.heads == 3
    made = models.two_of_four(dense, models.inputs(dense, TINY), kept, None)
    weight = made.get_submodule("transformer_blocks.0.attn.to_q").weight
    assert isinstance(weight, Tensor)
    assert int((weight.view(-1, 4) == 0).sum(-1).min()) == 2
    assert not (dense.get_submodule("transformer_blocks.0.attn.to_q").weight == 0).any()  # type: ignore[operator, union-attr]


def test_compiled_blocks_compute_the_same_and_share_a_graph() -> None:
    graphs: list[object] = []

    def backend(graph: Any, example: object) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    dense = models.dense(TINY, 4)
    compiled = models.compiled(dense, backend)
    example = models.inputs(dense, TINY)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**example).sample, dense(**example).sample)
    assert len(graphs) == 2, "one for all blocks but the last, which drops its text"


def test_engines_without_a_gpu_are_built_and_not_measured(sheet: Sheet) -> None:
    pytest.importorskip("tensorrt_rtx")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the benchmark itself is the test")
    engines.run(sheet, TINY)
    (row,) = rows_of(sheet)
    assert row.error == ""
    assert "not measured: TensorRT-RTX" in row.note
    assert row.figures.keys() == {"builds", "build_seconds"}


def test_gpu_tests_are_run_and_counted(sheet: Sheet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "repository" / "tests"
    folder.mkdir(parents=True)
    (folder / "conftest.py").write_text('def pytest_configure(config): config.addinivalue_line("markers", "gpu: x")')
    body = "import pytest\n"
    for name, what in (("passes", "pass"), ("fails", "assert 0"), ("skips", "pytest.skip('x')")):
        body += f"@pytest.mark.gpu\ndef test_{name}():\n    {what}\n"
    (folder / "test_some.py").write_text(body + "def test_plain(): assert 0\n")
    (folder / "test_none.py").write_text("def test_plain(): assert 0\n")
    monkeypatch.setattr(checks, "REPOSITORY", folder.parent)
    checks.run(sheet, TINY)
    (row,) = rows_of(sheet)
    assert row.case == {"files": 1}
    assert row.figures == {"passed": 1, "failed": 1, "skipped": 1}
    assert "test_fails" in row.note


def test_the_repository_has_tests_that_need_a_gpu() -> None:
    paths = [path for path in (checks.REPOSITORY / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    assert len(paths) >= 3


def test_a_part_whose_time_is_over_says_what_it_left(tmp_path: Path) -> None:
    sheet = Sheet(tmp_path / "rows", "linears", -1)
    linears.run(sheet, TINY, kept)
    (row,) = rows_of(sheet)
    assert row.case == {"not reached": 8}
    assert "the time was up" in row.error


def test_a_part_that_fails_leaves_its_error(tmp_path: Path) -> None:
    options = json.dumps({"device": "cpu", "seconds": 1})
    with pytest.raises(ModuleNotFoundError):
        part.main("absent", str(tmp_path / "rows"), options)
    (row,) = read(tmp_path / "rows")
    assert row.error == "ModuleNotFoundError: No module named 'gpu.absent'"


def test_a_cut_off_line_leaves_the_rows_before_it(tmp_path: Path) -> None:
    sheet = Sheet(tmp_path / "rows", "a", 1)
    with sheet.case(n=1) as row:
        row.figures["x_ms"] = 2.0
    with (tmp_path / "rows").open("a") as file:
        file.write('{"part": "a", "ca')
    assert [row.figures for row in read(tmp_path / "rows")] == [{"x_ms": 2.0}]
    assert read(tmp_path / "none") == []


def test_the_table_holds_what_was_measured_and_errors_beside_it() -> None:
    figures = {"dense_us": 10.0, "sparse_us": 8.0, "sparse_speedup": 1.25, "sparse_low": 1.2, "sparse_high": 1.3}
    case: dict[str, Any] = {"model": "FLUX", "dtype": "float16", "tokens": 4096}
    rows = [
        Row(part="machine", case={"gpu": "A GPU"}),
        Row(part="linears", case={**case, "k": 1}, figures=figures),
        Row(part="linears", case={**case, "k": 2}, figures={**figures, "sparse_speedup": 0.75, "sparse_low": 0.7}),
        Row(part="linears", case={**case, "k": 3}, error="no kernel"),
        Row(part="denoisers", case={"variant": "2:4", "what": "block", "mode": "eager"}, figures={
            "dense_ms": 2.0, "pruned_ms": 1.0, "pruned_speedup": 2.0, "pruned_low": 1.9, "pruned_high": 2.1}),
        Row(part="denoisers", case={"variant": "2:4", "what": "block", "mode": "graph"}, error="none"),
        Row(part="solving", case={"solver": "lean"}, figures={"seconds": 0.123456}),
        Row(part="engines", case={}, error="its process ended with -11: it said nothing"),
    ]  # fmt: skip
    text = printed(rows)
    for words in (
        "gpu A GPU",
        "2:4 1.00x dense in the middle, 0.75 to 1.25; surely faster at 1 of 3 shapes",
        "error: no kernel",
        "eager: 2 to 1 ms, 2.00x (1.90 to 2.10)",
        "graph: error: none",
        "seconds 0.123",
        "its process ended with -11",
    ):
        assert words in text


def test_numbers_are_short() -> None:
    values = (0.0, 1.0, 0.0123456, 1234.5, 123456.0, 1e-5)
    assert [number(value) for value in values] == ["0", "1", "0.0123", "1234", "1.23e+05", "1.00e-05"]


def test_times_take_turns_and_pair_their_windows() -> None:
    order: list[str] = []
    found = clock.times({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", 0)
    assert {name: len(values) for name, values in found.items()} == {"a": 9, "b": 9}
    figures = clock.figures({"a": [1.0] * 9, "b": [0.5] * 9}, "a")
    assert figures == {"a_ms": 1000, "b_ms": 500, "b_speedup": 2, "b_low": 2, "b_high": 2}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu" / "run.py"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so_and_how_to_try_it() -> None:
    ran = run()
    assert ran.returncode == 1
    assert "no NVIDIA GPU is visible to torch here; --dry-run" in ran.stderr
    assert ran.stdout == ""


def test_a_dry_run_prints_a_table_last_and_writes_every_row(tmp_path: Path) -> None:
    ran = run("--dry-run", "--parts", "linears", "--out", str(tmp_path / "gpu.json"))
    assert ran.returncode == 0, ran.stderr
    assert "a dry run on the CPU: no figure here says anything of a GPU" in ran.stdout
    assert ran.stdout.strip().splitlines()[-1].startswith("└")
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert data["dry_run"] is True
    assert [row["part"] for row in data["rows"]] == ["machine", *["linears"] * 8]


def test_an_unknown_part_lists_the_known() -> None:
    ran = run("--parts", "lineras")
    assert ran.returncode == 2
    assert "lineras" in ran.stderr
