"""The doctor on the machine that runs the tests."""

from pathlib import Path

import pytest

from obsdiff_export.asking import Outcome
from obsdiff_export.doctor import examination
from obsdiff_export.doctor.examination import examine


def test_products_are_tried_on_every_device_and_provider_that_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def ask(place: str, questions: list[str], **_: object) -> dict[str, Outcome]:
        asked.extend(questions)
        libraries = {
            "gpus": {"devices": [{"capability": "8.6"}]},
            "torch": {"usable": True},
            "onnxruntime": {"providers": ["CUDAExecutionProvider", "AzureExecutionProvider", "CPUExecutionProvider"]},
        }
        return {name: Outcome(value=libraries.get(name, {"version": "1"}), failure="") for name in questions}

    monkeypatch.setattr(examination, "ask", ask)
    facts = examine(tmp_path)
    for name in (
        *("torch/cpu/fp32", "torch/cuda/fp8", "torch/cuda/2:4 fp16", "onnxruntime/CUDAExecutionProvider/int8"),
        *("tensorrt/here/bf16", "tensorrt_rtx/12.0/fp16"),
    ):
        assert name in facts.products
    assert not [name for name in facts.products if "Azure" in name]


def test_what_obsdiff_requires_is_held_against_what_is_installed() -> None:
    installed = examination._installed()
    assert examination._unmet("obsdiff", installed)[0] == ()
    missing = {name: version for name, version in installed.items() if name != "diffusers"}
    (words,), _ = examination._unmet("obsdiff", {**missing, "torch": "2.13.0+cu130"})
    assert words.startswith("diffusers")
    assert words.endswith("is not installed")
    (words,), _ = examination._unmet("obsdiff", {**installed, "torch": "2.5.1"})
    assert words.endswith("is needed, 2.5.1 is installed")
    _, misfits = examination._unmet("obsdiff", {**installed, "tensorrt": "8.6.1"})
    assert "tensorrt>=10.3 is needed, 8.6.1 is installed" in misfits
