import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from obsdiff_export import children
from obsdiff_export.build import BUILDERS, build
from obsdiff_export.builders.request import Flags
from obsdiff_export.caches import Cache, default_folder, open_cache
from obsdiff_export.proof.receipt import load
from obsdiff_runtime.errors import ConfigError, ResourceError
from obsdiff_runtime.shapes import Range

PROFILES = ({"x": Range(min=(1, 4), opt=(2, 4), max=(8, 4))},)
COUNTED = """
from pathlib import Path
runs = Path(__file__).with_name("runs")
runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
return b'a plan of ' + request.onnx.split('/')[-2].encode()
"""
TIMED = """
from pathlib import Path
cache = request.timing_cache
seen = Path(cache).read_bytes() if cache and Path(cache).exists() else b''
if cache:
    Path(cache).write_bytes(seen + b'+')
return b'saw ' + (b'nothing' if cache is None else seen)
"""


@pytest.fixture
def graph(tmp_path: Path):
    def make(name: str, value: float = 1.0) -> Path:
        x, y = (helper.make_tensor_value_info(port, TensorProto.FLOAT, ["batch", 4]) for port in "xy")
        weight = numpy_helper.from_array(np.full((4, 4), value, np.float32), "w")
        body = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        opset = helper.make_opsetid("", 20)
        onnx.save(helper.make_model(body, opset_imports=[opset], ir_version=10), folder / "model.onnx")
        return folder / "model.onnx"

    return make


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def runs_of(builder) -> int:
    return len((builder.folder / "runs").read_text())


def test_two_bundles_share_an_engine(graph, scripted, cache, tmp_path):
    builder = scripted(COUNTED)
    first = build(graph("transformer"), tmp_path / "one", builder=builder, profiles=PROFILES, cache=cache)
    again = build(graph("transformer"), tmp_path / "two", builder=builder, profiles=PROFILES, cache=cache)
    assert (first.reused, again.reused, runs_of(builder)) == (False, True, 1)
    assert again.path.read_bytes() == first.path.read_bytes() == b"a plan of transformer"
    assert again.path != first.path
    assert again.log_path.exists()
    assert load(again.receipt_path) == load(first.receipt_path)


def test_a_changed_vae_does_not_rebuild_the_denoiser(graph, scripted, cache, tmp_path):
    builder = scripted(COUNTED)

    def both(folder, value):
        return [
            build(model, tmp_path / folder, builder=builder, profiles=PROFILES, cache=cache).reused
            for model in (graph("transformer"), graph("vae_decoder", value))
        ]

    assert both("one", 1.0) == [False, True]  # as yet they are the same graph
    assert both("two", 2.0) == [True, False]
    assert runs_of(builder) == 2


def test_repeats_are_built_anew_for_every_bundle(graph, scripted, cache, tmp_path):
    builder = scripted(COUNTED)
    for folder in ("one", "two", "two"):
        build(graph("transformer"), tmp_path / folder, builder=builder, profiles=PROFILES, cache=cache, repeat=1)
    assert runs_of(builder) == 2  # in the same folder one that is there counts
    assert not (cache.root / "engines").exists()


@pytest.mark.parametrize("name", ["plan", "log", "entry.json"])
def test_a_damaged_entry_is_noticed_told_and_built_again(graph, scripted, cache, tmp_path, caplog, name):
    builder = scripted(COUNTED)
    engine = build(graph("transformer"), tmp_path / "one", builder=builder, profiles=PROFILES, cache=cache)
    damaged = cache.root / "engines" / engine.key / name
    damaged.unlink()
    damaged.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        again = build(graph("transformer"), tmp_path / "two", builder=builder, profiles=PROFILES, cache=cache)
    assert not again.reused
    assert again.path.read_bytes() == b"a plan of transformer"
    assert "damaged engine in the cache is built again" in caplog.text
    assert cache.find(engine.key) is not None


def test_a_plan_altered_in_a_bundle_is_not_handed_on(graph, scripted, cache, tmp_path):
    builder = scripted(COUNTED)
    engine = build(graph("transformer"), tmp_path / "one", builder=builder, profiles=PROFILES, cache=cache)
    with engine.path.open("r+b") as file:  # a link of the entry: it changes too
        file.write(b"X")
    again = build(graph("transformer"), tmp_path / "two", builder=builder, profiles=PROFILES, cache=cache)
    assert again.path.read_bytes() == b"a plan of transformer"


def test_a_cache_that_cannot_be_written_costs_no_engine(graph, scripted, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        engine = build(
            graph("transformer"),
            tmp_path / "one",
            builder=scripted(COUNTED),
            profiles=PROFILES,
            cache=Cache(tmp_path / "file" / "cache"),
        )
    assert engine.path.exists()
    assert "was built and not kept" in caplog.text


def test_many_that_store_the_same_engine_at_once_leave_one_whole_entry(cache, tmp_path):
    (tmp_path / "plan").write_bytes(b"p" * 100_000)
    (tmp_path / "log").write_bytes(b"l")
    files = {"plan": tmp_path / "plan", "log": tmp_path / "log"}

    def use(_):
        cache.store("key", files, seconds=1.0, notes=("a note",))
        return cache.find("key")

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(use, range(40)))
    assert all(entry is not None and entry.notes == ("a note",) for entry in found)
    assert [path.name for path in (cache.root / "engines").iterdir()] == ["key"]


def test_what_a_killed_process_left_in_the_cache_is_swept_a_day_later(cache, tmp_path):
    old, young = (cache.root / "engines" / f".storing-{name}" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    cache.store("key", {}, seconds=0.0, notes=())
    assert (old.exists(), young.exists()) == (False, True)


def test_timings_are_handed_to_the_next_build_and_not_to_a_repeat(graph, scripted, cache, tmp_path):
    builder = scripted(TIMED)
    builder.times_tactics = True

    def saw(**options):
        return build(
            graph("transformer"), tmp_path / "one", builder=builder, profiles=PROFILES, cache=cache, **options
        ).path.read_bytes()

    assert saw() == b"saw "
    assert saw(flags=Flags(sparse=True)) == b"saw +"
    assert saw(repeat=1) == b"saw nothing"
    assert saw(flags=Flags(optimization_level=1)) == b"saw ++"
    builder.gpu = "another GPU"
    assert saw() == b"saw "


def test_damaged_timings_are_measured_again(cache, caplog):
    cache.store_timings("tensorrt 10/H100", b"timings")
    assert cache.timings("tensorrt 10/H100") == b"timings"
    (path,) = (cache.root / "timings").iterdir()
    path.write_bytes(path.read_bytes() + b"x")
    assert cache.timings("tensorrt 10/H100") is None
    assert "damaged timings" in caplog.text
    assert cache.timings("tensorrt 10/H100") is None


def test_rtx_keeps_no_timings_because_it_has_none():
    assert not BUILDERS["tensorrt_rtx"].times_tactics
    assert BUILDERS["tensorrt"].times_tactics


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("OBSDIFF_CACHE", str(tmp_path / "here"))
    assert default_folder() == tmp_path / "here"
    monkeypatch.delenv("OBSDIFF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "obsdiff"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "obsdiff"


def test_a_file_is_no_cache(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="must be a folder; name another with --cache-dir or OBSDIFF_CACHE"):
        open_cache(tmp_path / "file")


def test_the_folder_of_another_host_is_swept_when_nothing_was_written_for_a_day(graph, scripted, tmp_path):
    young, old = (tmp_path / "out" / f".building-container-{number}-abc" for number in (1, 2))
    for folder in (young, old):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    build(graph("transformer"), tmp_path / "out", builder=scripted(COUNTED), profiles=PROFILES)
    assert (young.exists(), old.exists()) == (True, False)


def test_a_full_disk_leaves_nothing_and_says_so(graph, scripted, cache, tmp_path):
    builder = scripted("import errno\nraise OSError(errno.ENOSPC, 'No space left on device')")
    with pytest.raises(ResourceError, match=r"is full \([\d,]+ bytes are free .*make room"):
        build(graph("transformer"), tmp_path / "b" / "engines", builder=builder, profiles=PROFILES, cache=cache)
    assert not (tmp_path / "b").exists()
    assert not cache.root.exists()


def test_an_interrupted_build_leaves_nothing(graph, scripted, cache, tmp_path):
    builder = scripted("import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)")
    with pytest.raises(KeyboardInterrupt):
        build(graph("transformer"), tmp_path / "b" / "engines", builder=builder, profiles=PROFILES, cache=cache)
    assert not (tmp_path / "b").exists()
    assert not cache.root.exists()


def test_a_build_ends_with_its_killed_caller(graph, scripted, tmp_path):
    builder = scripted("import os, time\nopen(__file__ + '.pid', 'w').write(str(os.getpid()))\ntime.sleep(120)")
    code = f"""
import sys
sys.path.insert(0, {str(builder.folder)!r})
from pathlib import Path
from types import SimpleNamespace
from obsdiff_export import build, process
from obsdiff_runtime.shapes import Range
build.place_of = lambda builder: "scripted_builder:Scripted"
builder = SimpleNamespace(name="b", version=lambda: "1", device=lambda: "", targets=lambda asked: ("8.6",),
    check=lambda flags, targets: None, environment={{"PYTHONPATH": {str(builder.folder)!r}}}, times_tactics=False)
profile = {{"x": Range(min=(1, 4), opt=(1, 4), max=(1, 4))}}
build.build(Path({str(graph("transformer"))!r}), Path({str(tmp_path / "out")!r}), builder=builder, profiles=[profile])
"""
    caller = subprocess.Popen([sys.executable, "-c", code], env=children.environment(builder.environment))
    pid_file = builder.folder / "scripted_builder.py.pid"
    _wait_for(lambda: pid_file.exists() and pid_file.read_text())
    worker = int(pid_file.read_text())
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    _wait_for(lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE)
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert all(name.startswith(".building-") for name in left)
    build(graph("transformer"), tmp_path / "out", builder=scripted("return b'a plan'"), profiles=PROFILES)
    assert not list((tmp_path / "out").glob(".building-*"))


def _wait_for(happened):
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)
