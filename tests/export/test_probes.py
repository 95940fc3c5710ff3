"""The products that the doctor tries, on what is installed here."""

from pathlib import Path

import numpy as np
import pytest

from obsdiff_export.builders.rtx import Rtx
from obsdiff_export.probes import arithmetic, engines, graphs, providers
from obsdiff_export.probes.libraries import describe

needs_rtx = pytest.mark.skipif(bool(Rtx().missing()), reason=f"TensorRT-RTX: {Rtx().missing()}")


@pytest.mark.parametrize("form", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_torch_multiplies_on_the_processor(form: str) -> None:
    assert arithmetic.multiply(f"cpu/{form}")["error"] <= arithmetic.TOLERANCES[form]


def test_semi_structured_tensors_need_a_gpu_and_say_so() -> None:
    with pytest.raises(RuntimeError, match="CUDA"):
        arithmetic.multiply("cpu/2:4 fp16")


def test_a_wrong_product_is_told_from_a_missing_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    product = arithmetic._product
    monkeypatch.setattr(
        arithmetic, "_product", lambda a, b, form: (product(a, b, form)[0] * 1.1, product(a, b, form)[1])
    )
    with pytest.raises(ArithmeticError, match="off by"):
        arithmetic.multiply("cpu/fp32")


@pytest.mark.parametrize(("form", "kernel"), [("fp32", "fp32"), ("fp16", "fp32"), ("int8", "int8"), ("fp8", "fp32")])
def test_onnxruntime_tells_what_a_format_is_computed_in(form: str, kernel: str) -> None:
    found = providers.multiply(f"CPUExecutionProvider/{form}")
    assert found["error"] <= graphs.TOLERANCE
    # Builds for processors with half-precision kernels use them.
    assert found["computed_in"] in ({kernel, "fp16"} if form == "fp16" else {kernel})


def test_a_provider_that_is_not_there_fails_instead_of_falling_back() -> None:
    with pytest.raises(RuntimeError, match="this onnxruntime has no SoundExecutionProvider"):
        providers.multiply("SoundExecutionProvider/fp32")


def test_what_the_library_of_a_provider_lacks_is_told_in_the_loaders_words(tmp_path: Path) -> None:
    assert providers.unloadable(tmp_path, "CUDAExecutionProvider") == ""
    for part in ("cuda", "shared"):
        (tmp_path / f"libonnxruntime_providers_{part}.so").write_bytes(b"no library")
    assert "libonnxruntime_providers_shared.so" in providers.unloadable(tmp_path, "CUDAExecutionProvider")


def test_the_product_of_a_graph_is_checked() -> None:
    x, weight = graphs.factors()
    assert graphs.error(x @ weight) < 1e-6
    with pytest.raises(ArithmeticError):
        graphs.error(np.zeros((graphs.ROWS, graphs.SIZE), np.float32))
    with pytest.raises(ArithmeticError):
        graphs.error(np.full((graphs.ROWS, graphs.SIZE), np.nan, np.float32))


@needs_rtx
def test_rtx_builds_fp8_for_ada_and_refuses_it_for_ampere() -> None:
    assert engines.build("tensorrt_rtx/8.9/fp8")["bytes"] > 0
    with pytest.raises(RuntimeError, match="HW-specific datatypes"):
        engines.build("tensorrt_rtx/8.6/fp8")
    assert engines.build("tensorrt_rtx/8.6/fp16") == {"bytes": pytest.approx(145_000, rel=0.5), "error": None}


@needs_rtx
def test_rtx_builds_no_fp32_product_for_turing() -> None:
    with pytest.raises(RuntimeError, match="FP32 GEMM is not supported"):
        engines.build("tensorrt_rtx/7.5/fp32")


@needs_rtx
def test_rtx_has_no_hopper() -> None:
    with pytest.raises(RuntimeError, match=r"does not build for 9\.0"):
        engines.build("tensorrt_rtx/9.0/fp16")


def test_libraries_describe_themselves() -> None:
    assert describe("torch")["version"]
    assert "CPUExecutionProvider" in describe("onnxruntime")["providers"]
    assert "devices" in describe("gpus")
    with pytest.raises(ModuleNotFoundError):
        describe("no_such_library")
