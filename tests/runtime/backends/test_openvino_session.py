"""OpenVINO draws what ONNX Runtime draws; in bfloat16 nearly."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest

from obsdiff_runtime import Pipeline
from obsdiff_runtime.backends import backend
from obsdiff_runtime.backends.openvino import OpenVino
from obsdiff_runtime.bundle import open_bundle
from obsdiff_runtime.errors import CompatibilityError, ConfigError, MissingPackageError

PROMPT = "a large red circle above a small blue square"


def drawn(folder: Path, name: str) -> np.ndarray:
    images = Pipeline(folder, backend=name, threads=1)(PROMPT, seed=3, num_inference_steps=4)
    return np.asarray(images.arrays, dtype=np.float64) / 255


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((a - b) ** 2) + 1e-12))


@pytest.mark.parametrize("kind", ["sd", "flux", "auraflow"])
def test_it_draws_what_onnxruntime_draws(kind: str, make_bundle: Any) -> None:
    folder = make_bundle(kind)
    assert psnr(drawn(folder, "onnxruntime"), drawn(folder, "openvino")) > 50


@pytest.mark.skipif(
    "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), reason="needs a CPU with bfloat16"
)
def test_in_bfloat16_it_nearly_does(make_bundle: Any) -> None:
    folder = make_bundle("sd")
    found = psnr(drawn(folder, "onnxruntime"), drawn(folder, "openvino_bf16"))
    assert 25 < found < 70, "rounded, and no more"


def test_a_cpu_without_bfloat16_is_told_so(make_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def get_property(self, *_: str) -> list[str]:
            return ["FP32"]

    monkeypatch.setattr(openvino, "Core", Core)
    with pytest.raises(CompatibilityError, match=r"no bfloat16.*take --backend openvino"):
        backend("openvino_bf16").open_session(open_bundle(make_bundle("sd")), "unet")


def test_wrong_inputs_are_named(make_bundle: Any) -> None:
    session = OpenVino("f32").open_session(open_bundle(make_bundle("sd")), "text_encoder", threads=1)
    assert session.device == "OpenVINO on the CPU, f32"
    with pytest.raises(ConfigError, match="text_encoder takes input_ids; missing: input_ids; unknown: ids"):
        session.run({"ids": np.zeros((1, 16), dtype=np.int64)})
    with pytest.raises(ConfigError, match=r"text_encoder does not take input_ids \(1, 3\)"):
        session.run({"input_ids": np.zeros((1, 3), dtype=np.int64)})
    found = session.run({"input_ids": np.zeros((2, 16), dtype=np.int64)}, ["last_hidden_state"])
    assert {name: array.dtype for name, array in found.items()} == {"last_hidden_state": np.float32}


def test_answers_stay_when_the_next_one_is_asked_for(make_bundle: Any) -> None:
    session = OpenVino("f32").open_session(open_bundle(make_bundle("sd")), "text_encoder", threads=1)
    first = session.run({"input_ids": np.zeros((1, 16), dtype=np.int64)})["last_hidden_state"]
    before = first.copy()
    session.run({"input_ids": np.full((1, 16), 5, dtype=np.int64)})
    np.testing.assert_array_equal(first, before)


def test_without_openvino_the_extra_is_named(make_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'obsdiff\[openvino\]'"):
        backend("openvino").open_session(open_bundle(make_bundle("sd")), "unet")
