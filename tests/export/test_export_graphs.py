import contextlib
import copy
import json
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter

from kinds import never_traced_again
from obsdiff_export import capture
from obsdiff_export.casting import cast_to
from obsdiff_export.component import Component
from obsdiff_export.economies import spared
from obsdiff_export.onnx import OnnxModel, export, reweigh
from obsdiff_export.parity import compare
from obsdiff_runtime.errors import ConfigError, ExportError

DTYPES = ("float32", "float16", "bfloat16")


def graph_of(model: OnnxModel) -> onnx.GraphProto:
    return onnx.load(model.path).graph


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_parameter_is_an_initializer_under_its_own_name(toy, exports, dtype):
    graph = graph_of(getattr(exports, dtype))
    stored = {tensor.name.removesuffix("::T") for tensor in graph.initializer}
    assert {name for name, _ in toy.module.named_parameters()} <= stored


def test_weights_of_matmul_are_stored_as_it_reads_them_and_those_of_gemm_as_torch_does(toy, exports):
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph_of(exports.float32).initializer}
    weights = dict(toy.module.named_parameters())
    for name in ("up.weight", "gate.weight", "down.weight"):
        np.testing.assert_array_equal(stored[f"{name}::T"], weights[name].detach().numpy().T)
    np.testing.assert_array_equal(stored["embed.weight"], weights["embed.weight"].detach().numpy())
    assert not [node for node in graph_of(exports.float32).node if node.op_type == "Transpose"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_graph_computes_in_its_dtype_and_timesteps_stay_float32(exports, dtype):
    model = getattr(exports, dtype)
    onnx_name = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16"}[dtype]
    assert {port.name: port.dtype for port in model.inputs} == {"tokens": onnx_name, "timestep": "float"}
    assert {port.dtype for port in model.outputs} == {onnx_name}
    kinds = {tensor.name: tensor.data_type for tensor in graph_of(model).initializer}
    assert kinds["up.weight::T"] == getattr(TensorProto, onnx_name.upper())


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_float64_is_left(exports, dtype):
    graph = graph_of(getattr(exports, dtype))
    kinds = {tensor.data_type for tensor in graph.initializer}
    kinds |= {value.type.tensor_type.elem_type for value in graph.value_info}
    casts = {attribute.i for node in graph.node if node.op_type == "Cast" for attribute in node.attribute}
    assert TensorProto.DOUBLE not in kinds | casts


def test_axes_carry_the_components_names(exports):
    shapes = {port.name: port.shape for port in (*exports.float32.inputs, *exports.float32.outputs)}
    assert shapes == {
        "tokens": ("batch", "length", 16),
        "timestep": ("batch",),
        "out": ("batch", "length", 16),
        "shift": ("batch", 16),
    }


def test_the_same_component_gives_the_same_bytes(toy, exports, tmp_path):
    again = export(toy, tmp_path, dtype=torch.float32)
    for name in ("model.onnx", "model.onnx.data", "config.json"):
        assert (tmp_path / name).read_bytes() == (exports.float32.path.parent / name).read_bytes()
    assert again.bytes == exports.float32.bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_exporter_is_spared_changes_no_byte_and_leaves_torch_as_it_was(
    toy, exports, tmp_path, monkeypatch, dtype
):
    before = dict(vars(ONNXRegistry)), dict(vars(_TypePromotionInterpreter))
    with spared():
        assert before != (dict(vars(ONNXRegistry)), dict(vars(_TypePromotionInterpreter)))
    assert before == (dict(vars(ONNXRegistry)), dict(vars(_TypePromotionInterpreter)))
    monkeypatch.setattr(capture, "spared", contextlib.nullcontext)
    export(toy, tmp_path, dtype=getattr(torch, dtype))
    assert (tmp_path / "model.onnx").read_bytes() == getattr(exports, dtype).path.read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_weights_in_a_graph_give_the_bytes_of_their_own_export(toy, exports, tmp_path, dtype):
    other = replace(toy, module=copy.deepcopy(toy.module))
    for parameter in other.module.parameters():
        torch.nn.init.normal_(parameter)
    made = export(other, tmp_path / "made", dtype=getattr(torch, dtype))
    found = reweigh(getattr(exports, dtype), other, tmp_path / "found")
    assert replace(found, path=made.path, seconds=made.seconds) == made
    for name in ("model.onnx", "model.onnx.data", "config.json"):
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "made" / name).read_bytes()


@pytest.mark.parametrize("layer", ["embed", "down"])
def test_weights_of_another_shape_are_refused(toy, exports, tmp_path, layer):
    other = replace(toy, module=copy.deepcopy(toy.module))
    setattr(other.module, layer, nn.Linear(8, 8))
    with pytest.raises(ExportError, match=rf"toy: {layer}\.weight has another shape in .*model\.onnx"):
        reweigh(exports.float32, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cast_is_undone_and_keeps_tied_weights_tied():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    before = dict(module.named_parameters(remove_duplicate=False))
    with cast_to(module, torch.float16):
        assert {leaf.dtype for leaf in module.state_dict().values()} == {torch.float16}
        assert module[1].weight is module[0].weight
    after = dict(module.named_parameters(remove_duplicate=False))
    assert all(after[name] is before[name] for name in before)


def test_a_failed_export_leaves_the_module_as_it_was(tmp_path):
    component = one_input(Unbound())
    with pytest.raises(ExportError, match=r"one: torch\.export could not capture it: .*no_such_name"):
        export(component, tmp_path, dtype=torch.float16)
    assert component.module.linear.weight.dtype == torch.float32


def test_external_weights_are_aligned_to_pages(exports):
    graph = onnx.load(exports.float32.path, load_external_data=False).graph
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in graph.initializer]
    external = [place for place in places if place]
    assert external
    assert all(int(place["offset"]) % 4096 == 0 and place["location"] == "model.onnx.data" for place in external)


def test_config_and_provenance_travel_with_the_graph(exports):
    folder = exports.float16.path.parent
    assert json.loads((folder / "config.json").read_text()) == {"_class_name": "Toy", "width": 16}
    facts = {
        entry.key: entry.value for entry in onnx.load(exports.float16.path, load_external_data=False).metadata_props
    }
    assert facts["obsdiff.class"] == "Toy"
    assert facts["obsdiff.dtype"] == "float16"
    assert facts["obsdiff.torch"] == version("torch")


def test_no_source_path_is_left_in_the_graph(exports):
    assert b".py" not in exports.float32.path.read_bytes()


class Unbound(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.no_such_name


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class InPlace(nn.Module):
    """Needs the exporter's own decompositions: writes in place."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0] = 1.0
        return y.add_(x)


def one_input(module: nn.Module, **changes: object) -> Component:
    component = Component(
        name="one",
        module=module.eval(),
        inputs={"x": torch.arange(24.0).reshape(3, 8)},
        dynamic_axes={"x": {0: "batch"}},
        outputs=("y",),
        config={},
    )
    return replace(component, **changes)


def test_a_module_that_writes_in_place_is_decomposed_first(tmp_path):
    component = one_input(InPlace())
    model = export(component, tmp_path, dtype=torch.float32)
    assert compare(component, model).max_relative_error == 0


class Unpatchify(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bpc->bcp", x.reshape(-1, 2, 4)).reshape(-1, 8)


def test_an_einsum_that_only_permutes_is_a_transpose_so_that_bfloat16_is_valid(tmp_path):
    model = export(one_input(Unpatchify()), tmp_path, dtype=torch.bfloat16)
    onnx.checker.check_model(str(model.path), full_check=True)
    kinds = {node.op_type for node in graph_of(model).node}
    assert "Transpose" in kinds
    assert "Einsum" not in kinds


class Pooled(nn.Module):
    """As CLIP reads one token of each text, which is captured with transpositions that move no axis."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 4, 2)
        return self.projection(tokens[torch.arange(tokens.shape[0]), tokens[..., 0].argmax(-1)])


def test_no_transposition_that_moves_nothing_stays(tmp_path):
    # ONNX Runtime up to 1.23, the newest for Python 3.10, made a real one of it before a Gemm
    component = one_input(Pooled())
    model = export(component, tmp_path, dtype=torch.float32)
    moves = [list(node.attribute[0].ints) for node in graph_of(model).node if node.op_type == "Transpose"]
    assert not [move for move in moves if move == sorted(move)]
    assert compare(component, model).max_relative_error < 1e-6


class Rotated(nn.Module):
    """Operations of FLUX.1 of which the exporter has no translation, or one that TensorRT refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(4, eps=1e-6)
        self.norm.weight.data = torch.linspace(0.5, 2, 4)
        self.register_buffer("frequencies", torch.linspace(0.1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[0] // 2
        head, tail = x.split_with_sizes([half, x.shape[0] - half])
        normed = self.norm(torch.cat([tail, head]).unflatten(1, (2, 4))).flatten(1)
        angles = torch.outer(x[:, 0].to(torch.float32, memory_format=torch.contiguous_format), self.frequencies.float())
        return (normed * angles.cos().to(x.dtype)).clip(-1, 1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_norms_splits_and_clips_of_flux_are_those_of_torch(tmp_path, dtype):
    component = one_input(Rotated(), more_inputs=({"x": torch.linspace(-3, 3, 40).reshape(5, 8)},))
    model = export(component, tmp_path, dtype=dtype)
    compare(component, model)
    assert not any("Sequence" in node.op_type for node in graph_of(model).node)


class Grids(nn.Module):
    """Operations of positions and masks of which the exporter has no translation: it would trace the module again."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = torch.arange(x.shape[0]), torch.arange(8)
        down, along = torch.meshgrid(rows, columns, indexing="ij")
        same = torch.meshgrid(columns, rows, torch.tensor([3, 4]), indexing="xy")
        inner = (rows > 0) & (rows < 3)
        grids = (1 - x) * (1 - down) + along * torch.tensor([[2]]) + sum(grid.sum(-1) for grid in same)
        return grids * inner[:, None] + (down & along)


class Buckets(nn.Module):
    """Operations of T5, and of the autoencoders of Sana, Wan and Qwen-Image, as above."""

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.matmul(x, x.transpose(0, 1))
        buckets = 0 + torch.arange(x.shape[0])
        buckets += torch.min(torch.arange(x.shape[0]), torch.full((x.shape[0],), 2))
        scores += buckets
        later = 3 * scores
        later += 1
        image = torch.movedim(torch.stack([scores, x[:, :1] * scores, later]), 0, -1)[None].movedim(-1, 1)
        doubled = nn.functional.interpolate(image, scale_factor=2.0, mode="nearest-exact")
        odd = nn.functional.interpolate(image, size=(x.shape[0] + 2, 3), mode="nearest-exact")
        return doubled.sum((1, 2, 3)) + odd[0, :, :-1].sum(0)


@pytest.mark.parametrize("net", [Grids, Buckets])
def test_its_operations_are_translated_without_tracing_again(tmp_path, net):
    component = one_input(net(), more_inputs=({"x": torch.linspace(-3, 3, 40).reshape(5, 8)},))
    with never_traced_again():
        model = export(component, tmp_path, dtype=torch.float32)
    assert compare(component, model).max_relative_error < 1e-6


class InPart(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        doubled = 2 * x
        half = doubled[:, :4]
        doubled += 1
        return doubled[:, 4:] + half


class Through(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        doubled = 2 * x
        itself = doubled.view(-1)
        itself += 1
        return doubled


@pytest.mark.parametrize("net", [InPart, Through])
def test_what_is_changed_in_place_is_changed_for_all_who_read_it(tmp_path, net):
    component = one_input(net(), more_inputs=({"x": torch.linspace(-3, 3, 40).reshape(5, 8)},))
    assert compare(component, export(component, tmp_path, dtype=torch.float32)).max_relative_error == 0


class CentreCrop(nn.Module):
    """As SD3 crops its position table: the end of the crop is captured as a floor division of a negative size."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(17.0))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1]
        start = (17 - size) // 2
        return x + self.table[start : start + size]


def test_odd_sizes_are_halved_as_python_does(tmp_path):
    component = one_input(
        CentreCrop(),
        dynamic_axes={"x": {0: "batch", 1: "size"}},
        more_inputs=tuple({"x": torch.ones(2, size)} for size in (3, 4, 5, 6, 17)),
    )
    assert compare(component, export(component, tmp_path, dtype=torch.float32)).max_relative_error == 0


class Bakes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(int(x.shape[0]), 1) if x.shape[0] == 3 else x


def test_an_axis_that_the_module_fixes_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ExportError, match="one"):
        export(one_input(Bakes()), tmp_path, dtype=torch.float32)
    assert not (tmp_path / "model.onnx").exists()


def test_an_example_of_batch_one_is_an_error_because_it_would_be_baked_in(tmp_path):
    with pytest.raises(ExportError, match="batch < 2"):
        export(one_input(Doubles(), inputs={"x": torch.ones(1, 8)}), tmp_path, dtype=torch.float32)


def test_a_module_in_training_mode_is_an_error(tmp_path):
    component = one_input(Doubles())
    component.module.train()
    with pytest.raises(ExportError, match="training mode"):
        export(component, tmp_path, dtype=torch.float32)


@pytest.mark.parametrize(
    ("dtype", "opset", "message"),
    [(torch.bfloat16, 20, "22 or later"), (torch.float32, 17, "18 or later"), (torch.int8, None, "float32, float16")],
)
def test_a_dtype_or_opset_that_gives_no_valid_graph_is_refused(toy, tmp_path, dtype, opset, message):
    with pytest.raises(ConfigError, match=message):
        export(toy, tmp_path, dtype=dtype, opset=opset)


def test_exporting_leaves_warnings_and_loggers_as_they_were(tmp_path):
    import logging

    filters, level = copy.copy(warnings.filters), logging.getLogger("torch.onnx").level
    export(one_input(Doubles()), tmp_path, dtype=torch.float32)
    assert warnings.filters == filters
    assert logging.getLogger("torch.onnx").level == level


def test_nothing_is_printed(capfd, tmp_path):
    export(one_input(Doubles()), tmp_path, dtype=torch.float32)
    assert capfd.readouterr() == ("", "")


def test_a_folder_is_made_where_it_is_absent(tmp_path: Path):
    model = export(one_input(Doubles()), tmp_path / "a" / "b", dtype=torch.float32)
    assert model.path == tmp_path / "a" / "b" / "model.onnx"
