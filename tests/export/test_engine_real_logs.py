"""What TensorRT-RTX itself says of engines built here, without a GPU: the readers against the real thing."""

from dataclasses import replace
from importlib.util import find_spec
from math import prod
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from obsdiff_export.build import BUILDERS, Engine, build
from obsdiff_export.builders.request import Flags
from obsdiff_export.component import Component
from obsdiff_export.onnx import export
from obsdiff_export.pattern import PatternReport, check
from obsdiff_export.ports import read_ports
from obsdiff_export.profiles import profiles_for
from obsdiff_export.proof import prove
from obsdiff_export.proof.layers import EngineLayer, layers_of_log
from obsdiff_export.proof.receipt import load, require_sparse
from obsdiff_runtime.errors import SparsityProofError

pytestmark = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")

PRODUCTS = ("gemm", "runtime_fusion")
SIZES = ({"batch": (1, 2, 4), "length": (16, 64, 128)}, {"batch": 1, "length": (256, 512, 1024)})


class Block(nn.Module):
    """A transformer block of width d, its FFN of width `hidden`, every weight 2:4."""

    def __init__(self, d: int = 128, heads: int = 4, hidden: int = 512) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(d)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)
        for linear in self.children():
            if isinstance(linear, nn.Linear):
                with torch.no_grad():
                    linear.weight.view(linear.out_features, -1, 4)[..., 1:3] = 0

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        x = self.norm(tokens)
        q, k, v = (
            to(x).view(batch, length, self.heads, -1).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v)
        )
        seen = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = tokens + self.to_out(seen)
        return x + self.down(nn.functional.gelu(self.up(x)))


def build_here(model: Path, *, profiles: int = 1, targets: tuple[str, ...] = ()) -> Engine:
    return build(
        model,
        model.parent.parent / "engines",
        builder=BUILDERS["tensorrt_rtx"],
        profiles=profiles_for(read_ports(model)[0], SIZES[:profiles]),
        flags=Flags(sparse=True),
        targets=targets,
        patterns=check(model, 2, 4),
    )


def graph_of(folder: Path, dtype: torch.dtype, module: nn.Module | None = None) -> Path:
    torch.manual_seed(0)
    component = Component(
        name="block",
        module=(module or Block()).eval(),
        inputs={"tokens": torch.randn(2, 24, 128)},
        dynamic_axes={"tokens": {0: "batch", 1: "length"}},
        outputs=("out",),
        config={},
    )
    return export(component, folder / "block", dtype=dtype).path


def layers_in(engine: Engine) -> tuple[EngineLayer, ...]:
    return layers_of_log(engine.log_path.read_text(encoding="utf-8"))


def rows_in(engine: Engine) -> list[str]:
    """The lines of the log's table, found without our reader."""
    table = engine.log_path.read_text(encoding="utf-8").split("Layers:\n")[-1]
    return [line for line in table.split("\n\n")[0].split("\n") if line]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> dict[str, Path]:
    torch.set_num_threads(1)
    dtypes = ("float32", "float16", "bfloat16")
    return {name: graph_of(tmp_path_factory.mktemp(name), getattr(torch, name)) for name in dtypes}


@pytest.fixture(scope="module")
def engines(graphs) -> dict[str, Engine]:
    return {name: build_here(graph) for name, graph in graphs.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_row_of_the_real_table_is_read_whole(engines, dtype):
    rows, layers = rows_in(engines[dtype]), layers_in(engines[dtype])
    assert len(layers) == len(rows) > 8
    for row, layer in zip(rows, layers, strict=True):
        assert row.startswith(f"Name: {layer.name}, LayerType: {layer.kind}, ")
        assert f"TacticName: {layer.tactic}, StreamId" in row
        assert row.count("{ Name: ") == len(layer.inputs + layer.constants + layer.outputs)
        assert row.count("[ONNX Layer: ") >= len(layer.onnx_nodes)
        tensors = layer.inputs + layer.constants + layer.outputs
        assert all(tensor.dims is not None and tensor.dtype != "unknown" for tensor in tensors)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_has_fused_attention_and_no_product_in_float32(engines, dtype):
    layers = layers_in(engines[dtype])
    assert sum("mha" in layer.tactic for layer in layers) == 1
    products = [layer for layer in layers if layer.kind in PRODUCTS]
    assert {tensor.dtype for layer in products for tensor in layer.inputs + layer.outputs} == {dtype}


def test_float32_stays_float32(engines):
    products = [layer for layer in layers_in(engines["float32"]) if layer.kind in PRODUCTS]
    assert {tensor.dtype for layer in products for tensor in layer.inputs + layer.outputs} == {"float32"}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_linear_is_found_in_the_real_engine(engines, dtype):
    proof = load(engines[dtype].receipt_path).proof
    assert {layer.weight for layer in proof.layers} == {
        f"{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out", "up", "down")
    }
    assert all(layer.layer for layer in proof.layers)
    assert {layer.dtype for layer in proof.layers} == {dtype}
    merged = {layer.weight: set(layer.merged) for layer in proof.layers}
    assert merged["to_q.weight"] == {"to_k.weight", "to_v.weight"}
    assert merged["up.weight"] == merged["down.weight"] == set()


def test_rtx_proves_nothing_and_the_demand_for_proof_says_so(engines):
    receipt = load(engines["float16"].receipt_path)
    assert (receipt.proof.verdict, receipt.proof.holding, receipt.proof.active) == ("ignored", 6, 0)
    assert receipt.proof.sparse_layers == 0
    with pytest.raises(SparsityProofError, match="6 x TensorRT-RTX takes the sparse flag and ignores it"):
        require_sparse([receipt])


def test_a_dense_v_makes_the_real_merged_product_dense(graphs, engines):
    reports = [replace(report, holds=report.name != "to_v.weight") for report in check(graphs["float16"], 2, 4)]
    log = engines["float16"].log_path.read_text(encoding="utf-8")
    proof = prove(reports, log, None, backend="tensorrt", sparse_requested=True, targets=("8.6",))
    told = {layer.weight: (layer.verdict, layer.reason) for layer in proof.layers}
    reason = "the builder merged it with to_v.weight, whose weights are not 2:4"
    assert told["to_q.weight"] == told["to_k.weight"] == ("not eligible", reason)
    assert told["up.weight"][0] == "unknown"  # chosen on the device


def test_each_profile_has_its_layers_and_every_linear_is_in_all(graphs):
    engine = build_here(graphs["float16"], profiles=2)
    layers = layers_in(engine)
    assert len(layers) == len(rows_in(engine))
    for report in check(graphs["float16"], 2, 4):
        assert sum(report.node in layer.onnx_nodes for layer in layers if layer.kind in PRODUCTS) == 2
    merged = [layer for layer in load(engine.receipt_path).proof.layers if layer.merged]
    assert [len(layer.merged) for layer in merged] == [2, 2, 2]


def test_the_plan_shrinks_with_the_model(tmp_path, engines):
    small = build_here(graph_of(tmp_path, torch.float16, Block(hidden=256)))
    weights = 2 * 128 * 256 * 2  # bytes that left up and down
    assert 0.9 * weights < engines["float16"].bytes - small.bytes < 1.5 * weights


def quantized(folder: Path, kind: str) -> Path:
    """x -> q and k of one input, multiplied -> o, whose output is rounded too; everything in int8 or float8."""
    element = {"int8": TensorProto.INT8, "float8": TensorProto.FLOAT8E4M3FN}[kind]
    nodes, constants = [], []

    def round_trip(name: str, source: str) -> str:
        constants.extend([numpy_helper.from_array(np.array(0.05, np.float16), f"{name}_s")])
        constants.append(helper.make_tensor(f"{name}_z", element, [], [0]))
        scale = [f"{name}_s", f"{name}_z"]
        nodes.append(helper.make_node("QuantizeLinear", [source, *scale], [f"{name}_q"], name=f"{name}_Q"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *scale], [f"{name}_d"], name=f"{name}_DQ"))
        return f"{name}_d"

    def linear(name: str, source: str, k: int, n: int) -> str:
        weight = np.random.default_rng(0).uniform(1, 2, (k // 4, 4, n)).astype(np.float32)
        weight[:, 1:3] = 0
        constants.append(helper.make_tensor(f"{name}.weight::T", element, [k, n], np.rint(weight.reshape(-1) * 4)))
        constants.append(numpy_helper.from_array(np.array(0.05, np.float16), f"{name}_ws"))
        constants.append(helper.make_tensor(f"{name}_wz", element, [], [0]))
        names = [f"{name}.weight::T", f"{name}_ws", f"{name}_wz"]
        nodes.append(helper.make_node("DequantizeLinear", names, [f"{name}_w"], name=f"{name}_wDQ"))
        nodes.append(helper.make_node("MatMul", [source, f"{name}_w"], [f"{name}_y"], name=name))
        return f"{name}_y"

    x = round_trip("in", "x")
    nodes.append(helper.make_node("Mul", [linear("q", x, 256, 256), linear("k", x, 256, 256)], ["m"], name="mul"))
    y = round_trip("out", linear("o", round_trip("mid", "m"), 256, 512))
    nodes.append(helper.make_node("Relu", [y], ["y"], name="relu"))
    ports = [helper.make_tensor_value_info(*port) for port in (("x", 10, ["batch", 256]), ("y", 10, ["batch", 512]))]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], constants)
    (folder / "block").mkdir()
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10),
        folder / "block" / "model.onnx",
    )
    return folder / "block" / "model.onnx"


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_quantised_linears_compute_in_their_format_and_their_outputs_are_told(tmp_path, kind):
    model = quantized(tmp_path, kind)
    engine = build_here(model, targets=("8.9",))
    proof = load(engine.receipt_path).proof
    assert {(layer.weight, layer.weights, layer.dtype) for layer in proof.layers} == {
        (f"{name}.weight", "holds", kind) for name in "qko"
    }
    outputs = {
        node: layer.outputs[0].dtype for layer in layers_in(engine) if layer.kind == "gemm" for node in layer.onnx_nodes
    }
    assert (outputs["q"], outputs["k"], outputs["o"]) == ("float16", "float16", kind)


def test_a_report_names_what_its_linear_reads_behind_q_and_dq(tmp_path):
    reports: list[PatternReport] = check(quantized(tmp_path, "int8"), 2, 4)
    assert {report.name: report.reads for report in reports} == {"q.weight": "x", "k.weight": "x", "o.weight": "m"}
    assert all(prod((report.k, report.n_out)) and report.dtype == "int8" for report in reports)
