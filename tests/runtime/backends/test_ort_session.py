import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from obsdiff_runtime.backends import backend, ort
from obsdiff_runtime.errors import CompatibilityError, ConfigError, MissingPackageError


def affine(folder: Path, dtype: int) -> Path:
    """y = 2 x + k, with k an integer that is cast."""
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "x"], ["twice"]),
            helper.make_node("Cast", ["k"], ["moved"], to=dtype),
            helper.make_node("Add", ["twice", "moved"], ["y"]),
        ],
        "affine",
        [
            helper.make_tensor_value_info("x", dtype, ["batch", 3]),
            helper.make_tensor_value_info("k", TensorProto.INT64, ["batch", 1]),
        ],
        [
            helper.make_tensor_value_info("y", dtype, ["batch", 3]),
            helper.make_tensor_value_info("twice", dtype, ["batch", 3]),
        ],
    )
    path = folder / "affine.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def available_providers() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


X = np.array([[0.25, 1.5, -3.0]], dtype=np.float64)
K = np.array([[5]], dtype=np.int64)


@pytest.mark.parametrize(("dtype", "name"), [(TensorProto.FLOAT, "float32"), (TensorProto.FLOAT16, "float16")])
def test_floats_are_cast_to_the_graph_and_come_back_as_float32(tmp_path: Path, dtype: int, name: str) -> None:
    session = ort.open_graph(affine(tmp_path, dtype), threads=1)
    assert [(entry.name, entry.dtype, entry.shape) for entry in session.inputs] == [
        ("x", name, ("batch", 3)),
        ("k", "int64", ("batch", 1)),
    ]
    outputs = session.run({"x": X, "k": K})
    assert list(outputs) == ["y", "twice"]
    assert outputs["y"].dtype == np.float32
    np.testing.assert_array_equal(outputs["y"], 2 * X + 5)
    assert session.device == "CPUExecutionProvider"


def test_only_the_outputs_asked_for_come_back(tmp_path: Path) -> None:
    session = ort.open_graph(affine(tmp_path, TensorProto.FLOAT), threads=1)
    assert list(session.run({"x": X, "k": K}, ["twice"])) == ["twice"]


def test_missing_and_unknown_inputs_are_named(tmp_path: Path) -> None:
    session = ort.open_graph(affine(tmp_path, TensorProto.FLOAT), name="toy", threads=1)
    with pytest.raises(ConfigError, match="toy takes x, k; missing: k; unknown: z"):
        session.run({"x": X, "z": K})


def test_a_shape_the_graph_does_not_take_is_named(tmp_path: Path) -> None:
    session = ort.open_graph(affine(tmp_path, TensorProto.FLOAT), name="toy", threads=1)
    with pytest.raises(ConfigError, match=r"toy does not take x \(1, 2\), k \(1, 1\)"):
        session.run({"x": X[:, :2], "k": K})


def test_a_graph_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(CompatibilityError, match=r"cannot load toy \(.*broken\.onnx\)"):
        ort.open_graph(path, name="toy")


def test_a_bfloat16_graph_is_refused_before_it_runs(tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError, match=r"bfloat16|NOT_IMPLEMENTED"):
        ort.open_graph(affine(tmp_path, TensorProto.BFLOAT16))


def test_a_provider_that_is_absent_has_no_substitute(tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError, match=r"has no CUDAExecutionProvider; it has .*CPUExecutionProvider.*gpu"):
        ort.open_graph(affine(tmp_path, TensorProto.FLOAT), provider="CUDAExecutionProvider")


def test_without_onnxruntime_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'obsdiff\[cpu\]'.*'obsdiff-runtime\[cpu\]'"):
        ort.open_graph(tmp_path / "any.onnx")


def test_an_unknown_backend_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="no backend 'trt'; there are onnxruntime"):
        backend("trt")


@pytest.mark.gpu
@pytest.mark.skipif(ort.CUDA not in available_providers(), reason="needs onnxruntime-gpu and a GPU")
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_a_gpu_computes_what_the_cpu_does(tmp_path: Path, dtype: int) -> None:
    session = ort.open_graph(affine(tmp_path, dtype), provider=ort.CUDA)
    assert session.device == ort.CUDA
    np.testing.assert_array_equal(session.run({"x": X, "k": K})["y"], 2 * X + 5)
