"""The building process killed, starved, hanging, or answering nonsense; files damaged before a build and during it.

Each leaves one clear error and nothing else. Interrupted and orphaned builds, and damaged caches, are in
test_engine_caches.py.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from obsdiff_export import children
from obsdiff_export.build import BUILDERS, Engine, build
from obsdiff_export.builders.rtx import Rtx
from obsdiff_export.caches import Cache
from obsdiff_runtime.errors import BuildError, ExportError, ObsdiffError, ResourceError
from obsdiff_runtime.shapes import Range

needs_rtx = pytest.mark.skipif(
    bool(BUILDERS["tensorrt_rtx"].missing()), reason=f"TensorRT-RTX: {BUILDERS['tensorrt_rtx'].missing()}"
)
PROFILES = ({"x": Range(min=(1, 64), opt=(2, 64), max=(4, 64))},)
Building = Callable[..., Engine]


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Two linears, their weights in a file beside."""
    weights = [np.random.default_rng(seed).standard_normal((64, 64)).astype(np.float16) for seed in (0, 1)]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", 64]) for name in "xy")
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"], name="first"),
        helper.make_node("MatMul", ["h", "w1"], ["y"], name="second"),
    ]
    constants = [numpy_helper.from_array(weight, f"w{index}") for index, weight in enumerate(weights)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], constants), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    path = tmp_path / "transformer" / "model.onnx"
    path.parent.mkdir()
    onnx.save(model, path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    return path


@pytest.fixture
def building(graph: Path, scripted: Callable[[str], Any], tmp_path: Path) -> Building:
    """building(script): one build whose `compile` is the script, into the folder "engines"."""

    def run(script: str, **options: Any) -> Engine:
        return build(graph, tmp_path / "engines", builder=scripted(script), profiles=PROFILES, **options)

    return run


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """After every test: no half-written file, no folder of a build, no plan without its receipt."""
    yield
    left = list(tmp_path.rglob(".building-*")) + list(tmp_path.rglob(".storing-*"))
    assert not left
    for plan in (tmp_path / "engines").glob("*.plan"):
        assert plan.with_suffix(".json").exists()


def fails(building: Building, script: str, kind: type[ObsdiffError], words: str, **options: Any) -> str:
    with pytest.raises(ObsdiffError, match=words) as raised:
        building(script, **options)
    assert type(raised.value) is kind or (kind is ResourceError and isinstance(raised.value, ResourceError))
    return str(raised.value)


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (signal.SIGKILL, ResourceError, "ran out of memory \\(or was killed\\); build for fewer targets"),
        (signal.SIGSEGV, BuildError, "ended by signal SIGSEGV"),
    ],
)
def test_a_signal_is_named(building: Building, number: int, kind: type[ObsdiffError], words: str) -> None:
    script = f"log('INFO', 'so far, so good')\nimport os\nos.kill(os.getpid(), {int(number)})"
    text = fails(building, script, kind, words)
    assert "so far, so good" in text or kind is ResourceError


def test_the_log_of_what_failed_is_where_the_message_says(building: Building) -> None:
    text = fails(building, "log('INFO', 'a last word')\nimport os\nos._exit(7)", BuildError, "exit code 7")
    log = Path(text.partition("The last lines of ")[2].partition(":\n")[0])
    assert "a last word" in log.read_text()


@pytest.mark.parametrize(
    "script",
    [
        # Python's own, inside of what it may take.
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\nreturn bytes(1 << 40)",
        # A C++ library that nobody caught.
        "import os\nos.write(1, b\"terminate called after throwing an instance of 'std::bad_alloc'\\n\")\nos.abort()",
        # Before there was anybody to answer.
        "import os\nos.write(1, b'MemoryError\\n')\nos._exit(1)",
    ],
)
def test_a_starved_build_says_what_to_lower(building: Building, script: str) -> None:
    fails(building, script, ResourceError, "out of memory.*fewer targets, for smaller sizes")


class Starved(Rtx):
    """TensorRT-RTX with little more memory than it has taken for being loaded."""

    def compile(self, request: Any, log: Any) -> bytes | memoryview:
        import resource

        import tensorrt_rtx  # noqa: F401

        with open("/proc/self/statm") as file:  # noqa: PTH123
            taken = int(file.read().split()[0]) * resource.getpagesize()
        allowed = taken + (int(os.environ["STARVED_MEGABYTES"]) << 20)
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
        return super().compile(request, log)


@needs_rtx
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize("megabytes", [0, 10])
def test_a_starved_vendors_library_is_told_as_one(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, megabytes: int
) -> None:
    monkeypatch.setattr("obsdiff_export.build.place_of", lambda builder: "starved:Starved")
    (tmp_path / "starved.py").write_text(
        f"import runpy\nStarved = runpy.run_path({str(Path(__file__))!r})['Starved']\n"
    )
    builder = Starved()
    builder.environment = {
        **Rtx.environment, "PYTHONPATH": str(tmp_path), "STARVED_MEGABYTES": str(megabytes)
    }  # fmt: skip
    with pytest.raises(ResourceError, match="out of memory"):
        build(graph, tmp_path / "engines", builder=builder, profiles=PROFILES, targets=["8.6"])


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("not json", "its answer cannot be read"),
        ("[]", "its answer cannot be read"),
        ('{"failure": 3, "message": "", "seconds": 1.0}', "its answer cannot be read"),
        ('{"failure": "", "message": "", "seconds": 1.0, "notes": 5}', "its answer cannot be read"),
        ('{"failure": "", "message": "", "seconds": 1.0}', "says that it built one, but the plan is empty"),
        ('{"failure": "refused", "message": "because", "seconds": 1.0}', "because"),
        ('{"failure": "unheard-of", "message": "for a reason", "seconds": 1.0}', "for a reason"),
    ],
)
def test_a_nonsensical_answer_is_a_build_error(building: Building, written: str, words: str) -> None:
    script = f"from pathlib import Path\nimport os\nPath(request.answer).write_text({written!r})\nos._exit(0)"
    fails(building, script, BuildError, words)


def test_no_answer_from_a_process_that_ended_well_is_a_build_error(building: Building) -> None:
    fails(building, "import os\nos._exit(0)", BuildError, "ended without an answer")


def test_an_empty_plan_is_a_build_error(building: Building) -> None:
    fails(building, "return b''", BuildError, "the plan is empty")


def test_a_plan_that_is_no_bytes_is_a_build_error(building: Building) -> None:
    fails(building, "return None", BuildError, "exit code 1(.|\n)*TypeError")


def test_a_plan_that_is_a_folder_is_a_build_error(building: Building) -> None:
    script = "from pathlib import Path\nPath(request.plan).mkdir()\nreturn b'a plan'"
    fails(building, script, BuildError, "exit code 1(.|\n)*IsADirectoryError")


def test_an_inspection_that_is_nonsense_costs_no_engine(building: Building) -> None:
    engine = building("from pathlib import Path\nPath(request.layers).write_bytes(b'\\xff{')\nreturn b'a plan'")
    assert engine.path.read_bytes() == b"a plan"


def test_what_a_builder_says_in_no_encoding_costs_no_engine(building: Building) -> None:
    engine = building("import os\nos.write(1, b'\\xff\\xfe(Sparsity) Found\\n')\nreturn b'a plan'")
    assert b"(Sparsity) Found" in engine.log_path.read_bytes()


@pytest.mark.parametrize("bytes_allowed", [0, 1000])
def test_a_disk_that_fills_in_the_building_process_is_told(building: Building, bytes_allowed: int) -> None:
    script = (
        f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_allowed}, {bytes_allowed}))\n"
        "log('INFO', 'a line')\nreturn bytes(10_000)"
    )
    fails(building, script, ResourceError, "is full")


def test_a_disk_that_fills_while_the_receipt_is_written_leaves_no_engine(
    building: Building, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("obsdiff_export.proof.receipt.Receipt.save", full)
    with pytest.raises(OSError, match="No space left"):
        building("return b'a plan'", cache=Cache(tmp_path / "cache"))
    assert not list((tmp_path / "engines").glob("*.plan"))
    monkeypatch.undo()


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2}', "\xff"])
def test_a_damaged_receipt_is_built_again(building: Building, text: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = building("return b'a plan'")
    engine.receipt_path.write_text(text, encoding="latin-1")
    again = building("return b'a plan'")
    assert not again.reused
    assert str(engine.receipt_path.name) in caplog.text
    assert building("return b'a plan'").reused


def test_an_absent_log_of_a_reused_engine_is_no_obstacle(building: Building) -> None:
    engine = building("return b'a plan'")
    engine.log_path.unlink()
    assert building("return b'a plan'").path == engine.path


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_graph_is_an_export_error_that_names_it(building: Building, graph: Path, share: float) -> None:
    whole = graph.read_bytes()
    graph.write_bytes(whole[: int(len(whole) * share)])
    text = fails(building, "return b'a plan'", ExportError, "cannot be read|is no graph")
    assert str(graph) in text


@pytest.mark.parametrize("length", [0, 1000, 64 * 64 * 2 * 2 - 1])
def test_truncated_weights_are_an_export_error_that_names_the_file(
    building: Building, graph: Path, length: int
) -> None:
    weights = graph.with_name("model.onnx_data")
    weights.write_bytes(weights.read_bytes()[:length])
    fails(building, "return b'a plan'", ExportError, r"model\.onnx_data is cut short: w\d ends at \d+ of its \d+ bytes")


@needs_rtx
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda node: setattr(node, "op_type", "NoSuchOperator"), "node second.*NoSuchOperator"),
        (lambda node: node.input.__setitem__(1, "nowhere"), "node second.*not registered"),
        (lambda node: node.input.pop(), "node second"),
    ],
)
def test_what_the_parser_refuses_is_told_with_node_and_reason(
    graph: Path, tmp_path: Path, change: Callable[[Any], None], words: str
) -> None:
    model = onnx.load(graph, load_external_data=False)
    change(model.graph.node[1])
    onnx.save(model, graph)
    with pytest.raises(BuildError, match=words) as raised:
        build(graph, tmp_path / "engines", builder=BUILDERS["tensorrt_rtx"], profiles=PROFILES, targets=["8.6"])
    assert "Traceback" not in str(raised.value)


def test_a_hanging_build_ends_with_ctrl_c_and_leaves_nothing(
    graph: Path, scripted: Callable[[str], Any], tmp_path: Path
) -> None:
    """In a terminal both processes get the signal; here only the caller does, and must end the other."""
    builder = scripted(
        "import os, time\nopen(__file__ + '.pid', 'w').write(str(os.getpid()))\n"
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: time.sleep(1)"
    )
    code = f"""
import sys
sys.path.insert(0, {str(builder.folder)!r})
from pathlib import Path
from types import SimpleNamespace
from obsdiff_export import build
from obsdiff_runtime.shapes import Range
build.place_of = lambda builder: "scripted_builder:Scripted"
builder = SimpleNamespace(name="b", version=lambda: "1", device=lambda: "", targets=lambda asked: ("8.6",),
    check=lambda flags, targets: None, environment={{"PYTHONPATH": {str(builder.folder)!r}}}, times_tactics=False)
profile = {{"x": Range(min=(1, 64), opt=(1, 64), max=(1, 64))}}
try:
    build.build(Path({str(graph)!r}), Path({str(tmp_path / "engines")!r}), builder=builder, profiles=[profile])
except KeyboardInterrupt:
    sys.exit(130)
"""
    caller = subprocess.Popen([sys.executable, "-c", code], env=children.environment(builder.environment))
    pid_file = builder.folder / "scripted_builder.py.pid"
    until(lambda: pid_file.exists() and bool(pid_file.read_text()))
    worker = int(pid_file.read_text())
    caller.send_signal(signal.SIGINT)
    assert caller.wait(timeout=30) == 130
    until(lambda: not psutil.pid_exists(worker))
    assert not (tmp_path / "engines").exists()


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_that_build_the_same_at_once_both_have_it(building: Building, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    script = "import time\ntime.sleep(0.3)\nreturn b'a plan'"
    with ThreadPoolExecutor(3) as pool:
        engines = list(pool.map(lambda _: building(script), range(3)))
    assert {engine.path.read_bytes() for engine in engines} == {b"a plan"}
    assert building(script).reused


def test_a_folder_that_is_a_file_is_told(building: Building, tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("")
    with pytest.raises((ObsdiffError, OSError), match="engines"):
        building("return b'a plan'")
    (tmp_path / "engines").unlink()
