import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from obsdiff_runtime.backends.trt import TENSORRT
from obsdiff_runtime.errors import CompatibilityError, ConfigError, MissingPackageError, ResourceError, RunError

PlanWriter = Callable[..., Path]


def inputs(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "x": random.normal(size=(batch, 3)).astype(np.float32),
        "k": random.integers(0, 9, (batch, 1), dtype=np.int64),
    }


def expected(feeds: dict[str, np.ndarray]) -> np.ndarray:
    return (2 * feeds["x"] + feeds["k"]).astype(np.float32)


@pytest.mark.parametrize("graphs", [True, False])
def test_runs_give_what_the_network_computes_whatever_the_order_of_shapes(
    gpu: Any, plan: PlanWriter, tmp_path: Path, graphs: bool
) -> None:
    path = plan(tmp_path / "a.plan", profiles=[(1, 2, 4), (1, 8, 8)])
    session = TENSORRT.open_plan(path, cuda_graphs=graphs)
    for seed, batch in enumerate([2, 2, 2, 1, 1, 8, 8, 8, 2, 3, 3, 5, 5, 5, 1]):
        feeds = inputs(batch, seed)
        (result,) = session.run(feeds).values()
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, expected(feeds))
    assert ("cudaGraphLaunch" in gpu.calls) == graphs


def test_nothing_is_allocated_after_loading(gpu: Any, plan: PlanWriter, tmp_path: Path) -> None:
    session = TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(1, 2, 4), (5, 8, 8)]))
    assert session.memory.buffers_bytes == gpu.used_bytes == 8 * (2 * 3 * 4 + 8)
    assert (session.memory.activations_bytes, session.memory.weights_bytes) == (4096, None)
    gpu.calls.clear()
    for batch in (1, 1, 8, 8, 8, 4):
        session.run(inputs(batch))
    assert "cudaMalloc" not in gpu.calls


def test_the_second_run_of_a_shape_is_recorded_and_a_new_shape_drops_it(
    gpu: Any, plan: PlanWriter, tmp_path: Path
) -> None:
    session = TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(1, 2, 4)]))
    states = []
    for batch in (2, 2, 2, 3, 3, 2):
        session.run(inputs(batch))
        states.append((session.graph, len(gpu.graphs)))
    none, recorded = ("none yet", 0), ("recorded", 1)
    assert states == [none, recorded, recorded, none, recorded, none]
    assert gpu.calls.count("cudaStreamBeginCapture") == 2
    assert gpu.calls.count("cudaGraphLaunch") == 3


def test_an_engine_that_cannot_be_recorded_runs_without_and_says_so(
    gpu: Any, plan: PlanWriter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.refuse_recording = True
    session = TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(1, 2, 4)]), name="toy")
    for seed in range(4):
        feeds = inputs(2, seed)
        np.testing.assert_array_equal(session.run(feeds)["y"], expected(feeds))
    assert "cannot be recorded: toy: TensorRT did not run it: operation not permitted" in session.graph
    assert [record.message for record in caplog.records if "without a CUDA graph" in record.message]
    assert gpu.calls.count("cudaStreamBeginCapture") == 1, "tried once"
    assert gpu.graphs == []


def test_a_graph_that_cannot_be_instantiated_is_dropped(gpu: Any, plan: PlanWriter, tmp_path: Path) -> None:
    session = TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(1, 2, 4)]))
    gpu.fail["cudaGraphInstantiate"] = gpu.errors.cudaErrorMemoryAllocation
    for seed in range(3):
        feeds = inputs(2, seed)
        np.testing.assert_array_equal(session.run(feeds)["y"], expected(feeds))
    assert "out of memory" in session.graph
    assert gpu.graphs == []


def test_running_again_copies_nothing(gpu: Any, plan: PlanWriter, tmp_path: Path) -> None:
    session = TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(1, 2, 4)]), name="toy")
    with pytest.raises(ConfigError, match="toy has not run yet"):
        session.rerun()
    session.run(inputs(2))
    gpu.calls.clear()
    session.rerun()
    session.rerun()
    assert "cudaMemcpyAsync" not in gpu.calls
    assert gpu.calls.count("cudaGraphLaunch") == 2
    assert gpu.calls[-1] == "cudaStreamSynchronize"


@pytest.mark.parametrize(
    ("dtype", "name", "tolerance"), [("HALF", "float16", 2**-10), ("BF16", "bfloat16", 2**-7), ("FLOAT", "float32", 0)]
)
def test_floats_are_cast_to_the_engine_and_come_back_as_float32(
    gpu: Any, plan: PlanWriter, tmp_path: Path, dtype: str, name: str, tolerance: float
) -> None:
    session = TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(1, 2, 4)], dtype=dtype))
    assert [(entry.name, entry.dtype, entry.shape) for entry in session.inputs] == [
        ("x", name, ("x.0", 3)),
        ("k", "int64", ("k.0", 1)),
    ]
    assert [entry.name for entry in session.outputs] == ["y"]
    feeds = inputs(2)
    result = session.run({"x": feeds["x"].astype(np.float64), "k": feeds["k"].astype(np.int32)})["y"]
    assert result.dtype == np.float32
    # One rounding of x and one of the result, each by half a unit in the last place (a whole one for truncation).
    np.testing.assert_allclose(result, expected(feeds), rtol=2 * tolerance, atol=2 * tolerance)


def test_arrays_that_are_not_contiguous_are_taken(gpu: Any, plan: PlanWriter, tmp_path: Path) -> None:
    session = TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(1, 2, 4)]))
    feeds = inputs(4)
    flipped = {name: array[::-2] for name, array in feeds.items()}
    np.testing.assert_array_equal(session.run(flipped)["y"], expected(flipped))


def test_the_profile_timed_nearest_to_the_request_serves_it(gpu: Any, plan: PlanWriter, tmp_path: Path) -> None:
    session = TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(1, 1, 8), (1, 8, 8)]))
    chosen = []
    for batch in (1, 2, 4, 8, 1):
        session.run(inputs(batch))
        chosen.append(session._profile)
    assert chosen == [0, 0, 1, 1, 0]


def test_a_request_outside_every_profile_is_told_the_nearest(gpu: Any, plan: PlanWriter, tmp_path: Path) -> None:
    session = TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(1, 1, 2), (4, 8, 8)]), name="transformer")
    with pytest.raises(ConfigError) as error:
        session.run(inputs(9))
    assert str(error.value) == (
        "transformer: the engine does not take axis 0 of x 9, axis 0 of k 9: the nearest of its 2 profiles (number 2) "
        "takes axis 0 of x 4 to 8, axis 0 of k 4 to 8. "
        "Ask for another size, or build an engine that holds it: obsdiff build BUNDLE --profile SIZES"
    )
    feeds = inputs(8)
    np.testing.assert_array_equal(session.run(feeds)["y"], expected(feeds)), "the session goes on"


def test_a_wrong_rank_is_named(gpu: Any, plan: PlanWriter, tmp_path: Path) -> None:
    session = TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(1, 1, 2)]))
    with pytest.raises(ConfigError, match="x has 3 axes, the engine takes 2"):
        session.run({**inputs(1), "x": np.zeros((1, 1, 3))})


def test_an_engine_of_one_shape_takes_that(gpu: Any, plan: PlanWriter, tmp_path: Path) -> None:
    session = TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(2, 2, 2)]))
    assert session.inputs[0].shape == (2, 3)
    feeds = inputs(2)
    np.testing.assert_array_equal(session.run(feeds)["y"], expected(feeds))
    with pytest.raises(
        ConfigError, match="does not take axis 0 of x 3, axis 0 of k 3: its profile takes axis 0 of x 2"
    ):
        session.run(inputs(3))


def test_missing_and_unknown_names_are_named(gpu: Any, plan: PlanWriter, tmp_path: Path) -> None:
    session = TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(1, 2, 4)]), name="toy")
    with pytest.raises(ConfigError, match="toy takes x, k; missing: k; unknown: z"):
        session.run({"x": np.zeros((1, 3)), "z": np.zeros(1)})
    with pytest.raises(ConfigError, match="toy gives y; not z"):
        session.run(inputs(1), ["z"])
    assert session.run(inputs(1), []) == {}


def test_a_run_that_tensorrt_refuses_is_an_error_with_its_words(gpu: Any, plan: PlanWriter, tmp_path: Path) -> None:
    session = TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(1, 2, 4)]), name="toy")
    gpu.refuse_running = True
    with pytest.raises(RunError, match=r"toy: TensorRT did not run it: .*API Usage Error"):
        session.run(inputs(1))
    gpu.refuse_running = False
    feeds = inputs(1)
    np.testing.assert_array_equal(session.run(feeds)["y"], expected(feeds))


def test_after_a_graph_that_fails_the_next_run_is_a_plain_one(gpu: Any, plan: PlanWriter, tmp_path: Path) -> None:
    session = TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(1, 2, 4)]))
    feeds = inputs(2)
    session.run(feeds)
    session.run(feeds)
    gpu.fail["cudaGraphLaunch"] = gpu.errors.cudaErrorStreamCaptureInvalidated
    with pytest.raises(RunError, match="cudaGraphLaunch"):
        session.run(feeds)
    np.testing.assert_array_equal(session.run(feeds)["y"], expected(feeds))
    assert session.graph == "none yet"


def test_a_gpu_that_fails_is_an_error_with_its_code(gpu: Any, plan: PlanWriter, tmp_path: Path) -> None:
    session = TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(1, 2, 4)]))
    gpu.memory.clear()
    with pytest.raises(RunError, match=r"cudaStreamSynchronize: IllegalAddress \(cudaErrorIllegalAddress\)"):
        session.run(inputs(1))
    gpu.driver = False  # nothing can be freed any more
    session._free.detach()


def test_closing_frees_everything_and_so_does_dropping(gpu: Any, plan: PlanWriter, tmp_path: Path) -> None:
    path = plan(tmp_path / "a.plan", profiles=[(1, 2, 4)])
    session = TENSORRT.open_plan(path, name="toy")
    session.run(inputs(2))
    session.run(inputs(2))
    session.close()
    session.close()
    assert (gpu.used_bytes, gpu.graphs, gpu.streams) == (0, [], {})
    with pytest.raises(ConfigError, match="toy was closed"):
        session.run(inputs(2))
    session = TENSORRT.open_plan(path)
    session.run(inputs(2))
    del session
    gc.collect()
    assert (gpu.used_bytes, gpu.graphs, gpu.streams) == (0, [], {})


def test_threads_get_their_own_results(gpu: Any, plan: PlanWriter, tmp_path: Path) -> None:
    session = TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(1, 2, 4)]))
    wrong: list[int] = []

    def work(seed: int) -> None:
        for turn in range(20):
            feeds = inputs(1 + (seed + turn) % 4, seed * 100 + turn)
            if not np.array_equal(session.run(feeds)["y"], expected(feeds)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_engine_that_does_not_fit_names_what_it_takes(gpu: Any, plan: PlanWriter, tmp_path: Path) -> None:
    path = plan(tmp_path / "a.plan", profiles=[(1, 2, 4)])
    gpu.capacity_bytes = 4000
    with pytest.raises(ResourceError, match=r"toy does not fit on Fake GPU \(9.0\): its activations take 4096 bytes"):
        TENSORRT.open_plan(path, name="toy")
    gpu.capacity_bytes = 4096
    with pytest.raises(ResourceError, match=r"the GPU is out of memory; \d+ bytes were asked for"):
        TENSORRT.open_plan(plan(tmp_path / "b.plan", profiles=[(1, 2, 4000)]))
    gc.collect()
    assert gpu.used_bytes == 0


def test_a_plan_that_does_not_load_says_where_it_was_tried(gpu: Any, plan: PlanWriter, tmp_path: Path) -> None:
    path = plan(tmp_path / "a.plan", profiles=[(1, 2, 4)], version="8.6.1")
    with pytest.raises(CompatibilityError) as error:
        TENSORRT.open_plan(path, name="toy")
    assert "tensorrt 10.3.0 cannot load toy" in str(error.value)
    assert "on Fake GPU (9.0)" in str(error.value)
    assert "Serialization assertion failed" in str(error.value)
    assert "obsdiff build" in str(error.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tensors": {"k": {"location": "HOST"}}}, "k holds values of its shapes"),
        ({"tensors": {"x": {"dtype": "FP8"}}}, "x holds values in FP8"),
        ({"values_decide": True}, r"the size of y depends on values, not on shapes alone: \(-1, 3\)"),
    ],
)
def test_an_engine_of_another_kind_is_refused(
    gpu: Any, plan: PlanWriter, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(CompatibilityError, match=message):
        TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(1, 2, 4)], **more))


def test_weights_are_streamed_where_the_engine_was_built_for_it(gpu: Any, plan: PlanWriter, tmp_path: Path) -> None:
    session = TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(1, 2, 4)], streamable=1000))
    assert session._engine.weight_streaming_budget_v2 == 500


def test_without_a_gpu_nothing_is_loaded(gpu: Any, plan: PlanWriter, tmp_path: Path) -> None:
    gpu.driver = False
    with pytest.raises(CompatibilityError, match=r"no NVIDIA GPU can be used here: .*cudaErrorInsufficientDriver"):
        TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(1, 2, 4)]))
    assert TENSORRT.obstacle().startswith("no NVIDIA GPU can be used here")
    gpu.driver = True
    assert TENSORRT.obstacle() == ""


def test_an_old_cuda_python_without_a_driver_is_no_bug(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(sys.modules["cuda.bindings.runtime"], "cudaGetDevice", fails)
    assert "no NVIDIA GPU can be used here: cudaGetDevice: Failed to dlopen libcuda.so.1" in TENSORRT.obstacle()


@pytest.mark.parametrize("package", ["tensorrt", "cuda"])
def test_a_missing_package_names_the_extra(
    gpu: Any, plan: PlanWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    if package == "cuda":
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'obsdiff\[trt\]'"):
        TENSORRT.open_plan(plan(tmp_path / "a.plan", profiles=[(1, 2, 4)]))


def test_versions_are_the_package_s(gpu: Any) -> None:
    assert TENSORRT.versions() == {"tensorrt": "10.3.0"}
