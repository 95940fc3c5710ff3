"""One of each kind of thing that can be inspected, made in a moment without a pipeline."""

import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from obsdiff.cli import main
from obsdiff_export.pattern import check
from obsdiff_export.proof import receipt
from obsdiff_runtime.bundle import ComponentEntry, Defaults, EngineEntry, Manifest, TensorEntry, write_manifest

SPARSE_LOG = """\
[INFO] (Sparsity) Found 1 layer(s) eligible to use sparse tactics: first
[INFO] (Sparsity) Chose 1 layer(s) using sparse tactics: first
[VERBOSE] Layers:
Name: first, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,16], Datatype: Half, Format: (Linear) }], \
Constants: [], Outputs: [ { Name: h, Dimensions: [-1,8], Datatype: Half, Format: (Linear) }], TacticName: \
sm80_xmma_sparse_gemm, StreamId: 0, Metadata: [ONNX Layer: first]
Name: second, LayerType: gemm, Inputs: [], Constants: [], Outputs: [], TacticName: sm80_xmma_gemm, Metadata:\x20

"""
HEADER = b"ftrt" + bytes(20) + bytes((10, 13, 3, 9))


def two_of_four(n_out: int, k: int) -> torch.Tensor:
    """(n_out, k), 2:4 and not 1:2."""
    weight = torch.ones(n_out, k // 4, 4)
    weight[..., 1:3] = 0
    weight[0, 0] = torch.tensor([0.0, -0.0, 1, 1])
    return weight.reshape(n_out, k)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A pruned SD3 folder: one 2:4 linear in bfloat16, one that should be and is not, one left dense, one bias."""
    folder = tmp_path / "pruned" / "transformer"
    folder.mkdir(parents=True)
    tensors = {
        "good.weight": two_of_four(4, 8).bfloat16(),
        "bad.weight": torch.ones(4, 8, dtype=torch.bfloat16),
        "dense.weight": torch.ones(4, 6, dtype=torch.float16),
        "dense.bias": torch.zeros(4),
    }
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}')
    (folder.parent / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    manifest = {
        "family": "sd3",
        "sparsity": "structured:0.25+2:4",
        "created_by": "obsdiff 0.1.0",
        "groups": {"blocks.0.heads": {"units": 4, "kept": [0, 2, 3]}, "blocks.0.ffn": {"units": 8, "kept": [1, 2]}},
        "linears": {
            "good": {"pattern": "2:4", "loss": 0.01, "zeros": 0.5},
            "bad": {"pattern": "2:4", "loss": 0.03, "zeros": 0.5},
            "dense": {"pattern": "dense", "reason": "6 inputs are no multiple of 4"},
            "gone": {"pattern": "2:4"},
        },
        "recipe": {"method": "streamed", "align": 64, "prompts": ["a", "b"], "sampling": {"seed": 3}},
        "prompts_sha256": "ab" * 32,
    }
    (folder / "obsdiff.json").write_text(json.dumps(manifest))
    return folder.parent


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Two MatMuls, the first with 2:4 weights."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", 16])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["batch", 4])
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight::T"], ["h"], name="first"),
        helper.make_node("MatMul", ["h", "b.weight::T"], ["y"], name="second"),
    ]
    weights = [
        numpy_helper.from_array(two_of_four(8, 16).T.numpy().astype(np.float16), "a.weight::T"),
        numpy_helper.from_array(np.ones((8, 4), np.float16), "b.weight::T"),
    ]
    body = helper.make_graph(nodes, "g", [x], [y], weights)
    opset = helper.make_opsetid("", 20)
    onnx.save(
        helper.make_model(body, opset_imports=[opset], producer_name="hand"),
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    return folder / "model.onnx"


@pytest.fixture
def make_engine(graph: Path) -> Callable[..., Path]:
    """make_engine(folder, log=..., **changes of the receipt): a plan with its receipt and log."""

    def make(folder: Path, log: str = SPARSE_LOG, **changes: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        plan = folder / "k.plan"
        plan.write_bytes(HEADER + b"the rest")
        values: dict[str, Any] = {
            "key": "k",
            "component": "transformer",
            "backend": "tensorrt",
            "backend_version": "10.13.3.9",
            "targets": ["8.7"],
            "onnx_sha256": "0" * 64,
            "plan_sha256": hashlib.sha256(plan.read_bytes()).hexdigest(),
            "plan_bytes": plan.stat().st_size,
            "profiles": [{"x": {"min": [1, 16], "opt": [2, 16], "max": [4, 16]}}],
            "sparse_requested": True,
            "patterns": check(graph, 2, 4),
            "log": log,
            "inspector": None,
            "seconds": 1.5,
            "flags": {"optimization_level": 3},
        }
        receipt.of(**{**values, **changes}).save(folder / "k.json")
        (folder / "k.log").write_text(log)
        return plan

    return make


@pytest.fixture
def plan(tmp_path: Path, make_engine: Callable[..., Path]) -> Path:
    return make_engine(tmp_path / "engines")


@pytest.fixture
def bundle(tmp_path: Path, graph: Path, make_engine: Callable[..., Path]) -> Path:
    root = tmp_path / "bundle"
    (root / "transformer").mkdir(parents=True)
    for file in graph.parent.iterdir():
        (root / "transformer" / file.name).write_bytes(file.read_bytes())
    make_engine(root / "engines" / "transformer")
    port = TensorEntry(name="x", dtype="float16", shape=("batch", 16))
    engine = EngineEntry(
        path="engines/transformer/k.plan",
        key="k",
        backend="tensorrt",
        backend_version="10.13.3.9",
        targets=("8.7",),
        receipt="engines/transformer/k.json",
    )
    component = ComponentEntry(
        onnx="transformer/model.onnx", dtype="float16", inputs=(port,), outputs=(port,), engines=(engine,)
    )
    manifest = Manifest(
        created_by="obsdiff 0.1.0",
        family="sd3",
        pipeline_class="StableDiffusion3Pipeline",
        sparsity="2:4",
        defaults=Defaults(height=64, width=64, num_inference_steps=20, guidance_scale=3.5, vae_tile=32),
        components={"transformer": component},
        measurements={"latency": {"p50_ms": 1.0}},
    )
    write_manifest(root, manifest)
    return root


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """call(*arguments): exit code, stdout and stderr of `obsdiff inspect`, in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["obsdiff", "inspect", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited, warnings.catch_warnings():
            main()
        out, err = capfd.readouterr()
        return int(exited.value.code or 0), out, err

    return run
