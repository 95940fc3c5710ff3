import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from obsdiff.inspection import inspect
from obsdiff.inspection.checkpoints import CheckpointContent
from obsdiff.inspection.stored import tensors
from obsdiff_export.inspection import demand_sparsity, to_json
from obsdiff_export.inspection.bundles import BundleContent
from obsdiff_export.inspection.engines import EngineContent, header_of
from obsdiff_export.inspection.graphs import GraphContent
from obsdiff_runtime.bundle import read_manifest, write_manifest
from obsdiff_runtime.errors import BundleError, CompatibilityError, ConfigError, ExportError, SparsityProofError


def test_a_checkpoint_tells_what_was_cut_and_what_its_weights_hold(checkpoint):
    content = inspect(checkpoint)
    assert isinstance(content, CheckpointContent)
    assert (content.pipeline_class, content.denoiser) == (
        "StableDiffusion3Pipeline",
        "transformer SD3Transformer2DModel",
    )
    assert (content.family, content.sparsity, content.created_by) == ("sd3", "structured:0.25+2:4", "obsdiff 0.1.0")
    assert content.kept == {"blocks.0.heads": (3, 4), "blocks.0.ffn": (2, 8)}
    assert (content.parameters, content.zeros) == (32 + 32 + 24 + 4, 16 + 4)
    assert content.recipe == {"method": "streamed", "align": 64, "sampling": {"seed": 3}}
    told = {linear.name: (linear.pattern, linear.holds, linear.dtype, linear.loss) for linear in content.linears}
    assert told == {
        "good": ("2:4", ("2:4",), "bfloat16", 0.01),
        "bad": ("2:4", (), "bfloat16", 0.03),
        "dense": ("dense", (), "float16", None),
    }


def test_a_checkpoint_whose_weights_break_its_manifest_says_so(checkpoint):
    assert inspect(checkpoint).notes == (
        "gone: the manifest tells of it, and its weight is not stored",
        "bad: the manifest says 2:4, and the stored weights hold no pattern with 0.0% zeros",
    )


def test_a_denoiser_alone_and_a_folder_that_obsdiff_never_saw_are_read_too(checkpoint):
    alone = inspect(checkpoint / "transformer")
    assert (alone.pipeline_class, alone.sparsity) == ("", "structured:0.25+2:4")
    (checkpoint / "transformer" / "obsdiff.json").unlink()
    foreign = inspect(checkpoint)
    assert (foreign.created_by, foreign.notes) == ("", ())
    assert {linear.name: linear.holds for linear in foreign.linears}["good"] == ("2:4",)


def test_variants_beside_the_weights_are_not_counted_twice(checkpoint):
    folder = checkpoint / "transformer"
    whole = folder / "diffusion_pytorch_model.safetensors"
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(whole.read_bytes())
    assert inspect(checkpoint).parameters == 92


def test_a_checkpoint_without_weights_is_an_error(checkpoint):
    (checkpoint / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BundleError, match="no safetensors in transformer or unet"):
        inspect(checkpoint)


def test_the_manifest_of_a_newer_obsdiff_is_refused(checkpoint):
    path = checkpoint / "transformer" / "obsdiff.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(CompatibilityError, match="update obsdiff"):
        inspect(checkpoint)


def test_a_graph_tells_its_operators_axes_formats_and_patterns(graph):
    content = inspect(graph)
    assert isinstance(content, GraphContent)
    assert (content.ops, content.parameters, content.dtypes) == ({"MatMul": 2}, 160, {"float16": 160})
    assert (content.dynamic_axes, content.opset, content.producer) == (("batch",), 20, "hand")
    assert content.bytes == sum(file.stat().st_size for file in graph.parent.iterdir())
    assert [(weight.name, weight.patterns) for weight in content.weights] == [("a.weight", ("2:4",)), ("b.weight", ())]
    assert inspect(graph.parent) == content


def test_a_graph_without_its_weights_is_an_error(graph):
    (graph.parent / "model.onnx.data").unlink()
    with pytest.raises(ExportError, match="cannot be read as a graph with its weights"):
        inspect(graph)


def test_an_engine_tells_what_it_was_built_for_and_what_is_proven(plan):
    content = inspect(plan)
    assert isinstance(content, EngineContent)
    assert content.header == "TensorRT 10.13.3.9"
    assert (content.verdict, content.verdicts) == ("active", {"active": 1, "not eligible": 1})
    assert content.sparsity.startswith("1 of 2 linears run on sparse kernels, 1 cannot")
    assert ([layer.name for layer in content.layers], content.layers_from) == (["first", "second"], "k.log")
    assert content.notes == ()
    demand_sparsity(content)


def test_the_inspectors_layers_come_before_the_logs(plan):
    plan.with_name("k.layers.json").write_text('{"Layers": ["a", "b", "c"]}')
    assert (len(inspect(plan).layers), inspect(plan).layers_from) == (3, "k.layers.json")
    plan.with_name("k.layers.json").write_text('{"Layers": ["a"')
    content = inspect(plan)
    assert (len(content.layers), content.layers_from) == (2, "k.log")
    assert "cut off" in content.notes[0]


def test_an_engine_without_a_receipt_tells_what_its_header_says(plan):
    plan.with_name("k.json").unlink()
    plan.with_name("k.log").unlink()
    content = inspect(plan)
    assert (content.header, content.verdict, content.receipt) == ("TensorRT 10.13.3.9", "unknown", None)
    assert content.sparsity.startswith("Not known")
    assert content.notes == (
        "no k.json beside the plan: `obsdiff build` writes one with every engine",
        "nothing beside the plan tells its layers",
    )
    with pytest.raises(SparsityProofError, match="has no receipt beside it"):
        demand_sparsity(content)


def test_a_receipt_of_an_older_obsdiff_is_noted_and_proves_nothing(plan):
    path = plan.with_name("k.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 1}))
    content = inspect(plan)
    assert content.verdict == "unknown"
    assert "schema 1 is not 2; build the engine again" in content.notes[0]
    with pytest.raises(SparsityProofError):
        demand_sparsity(content)


def test_a_plan_that_its_receipt_does_not_describe_is_an_error(plan):
    plan.write_bytes(plan.read_bytes() + b"!")
    with pytest.raises(BundleError, match=r"k\.plan is not the plan that k\.json describes"):
        inspect(plan)


def test_a_bundle_tells_its_networks_engines_and_measurements(bundle):
    content = inspect(bundle)
    assert isinstance(content, BundleContent)
    assert (content.files, list(content.engines), list(content.measurements)) == (5, ["transformer"], ["latency"])
    assert [(network.name, network.dtype) for network in content.networks] == [("transformer", "float16")]
    assert content.networks[0].bytes == sum(file.stat().st_size for file in (bundle / "transformer").iterdir())
    assert content.engines["transformer"][0].verdict == "active"
    demand_sparsity(content)


def test_what_eight_bits_and_no_engines_are_is_told(bundle, call):
    manifest = read_manifest(bundle)
    component = dataclasses.replace(manifest.components["transformer"], precision="fp8", engines=())
    files = {"components": {"transformer": component}, "measurements": {}}
    write_manifest(bundle, dataclasses.replace(manifest, **files))
    code, out, _ = call(bundle)
    assert code == 0
    assert re.search(r"transformer +fp8 ", out)
    assert "measured" not in out, "a report may hold more"


def test_an_altered_bundle_is_an_error_that_names_the_file(bundle):
    data = bundle / "transformer" / "model.onnx.data"
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(BundleError, match=r"model\.onnx\.data was altered"):
        inspect(bundle)


@pytest.mark.parametrize("fixture", ["checkpoint", "graph"])
def test_what_has_no_engine_has_no_proof(fixture, request):
    with pytest.raises(SparsityProofError, match="there is no engine"):
        demand_sparsity(inspect(request.getfixturevalue(fixture)))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("weights.gguf", b"GGUF\x03", "a GGUF file"),
        ("weights.pt", b"PK\x03\x04zip", "obsdiff reads no pickles"),
        ("weights.bin", b"\x80\x04pickle", "a pickle"),
        ("model.safetensors", b"\0" * 20, "the weights of .*: name that folder"),
        ("k.json", b'{"plan_sha256": "0"}', r"an engine's receipt: name the plan beside it, .*k\.plan"),
        ("obsdiff.json", b'{"components": {}}', "the manifest of .*: name that folder"),
        ("other.json", b"{}", "text"),
        ("some.json", b'{"a": 1}', "a JSON file"),
        ("picture.png", b"\x89PNG\r\n", "a picture"),
        ("notes.txt", b"words", "looks like text"),
        ("empty", b"", "an empty file"),
        ("noise.plan", b"\xff\xfe\x00", "nothing that is known here"),
    ],
)
def test_another_file_is_an_error_that_says_what_it_looks_like(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        inspect(tmp_path / name)


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="nothing is there"):
        inspect(tmp_path / "absent")
    with pytest.raises(ConfigError, match="the folder holds nothing"):
        inspect(tmp_path)


def test_a_folder_of_several_engines_asks_for_one(plan):
    plan.with_name("other.plan").write_bytes(plan.read_bytes())
    with pytest.raises(ConfigError, match="holds 2 graphs and engines; name one of them, such as"):
        inspect(plan.parent)


@pytest.mark.parametrize("fixture", ["graph", "plan", "bundle"])
def test_graphs_engines_and_bundles_are_read_without_torch(fixture, request):
    path = request.getfixturevalue(fixture)
    code = (
        "import sys; from pathlib import Path; sys.modules['torch'] = None\n"
        "from obsdiff.inspection import inspect; from obsdiff.inspection.tables import render\n"
        f"render(inspect(Path({str(path)!r})), everything=True)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("fixture", ["checkpoint", "graph", "plan", "bundle"])
def test_json_is_one_object_and_nothing_else(fixture, request, call):
    code, out, err = call(request.getfixturevalue(fixture), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["kind"] in ("checkpoint", "onnx", "engine", "bundle")
    assert out.count("\n") == 1


@pytest.mark.parametrize("layers", [(), ("--layers",)])
@pytest.mark.parametrize(
    ("fixture", "said"),
    [
        ("checkpoint", ["structured:0.25+2:4 by obsdiff 0.1.0", "3 of 4 in 1 group", "6 inputs are no multiple of 4"]),
        ("graph", ["MatMul 2", "x float16 [batch, 16]", "no pattern"]),
        ("plan", ["TensorRT 10.13.3.9", "x 1x16 .. 2x16 .. 4x16", "(1)", "only 0 of 4", "layers, from k.log"]),
        (
            "bundle",
            [
                "every sha256 is that of the manifest",
                "of the VAE, 32 pixels a side",
                "1 of 2 linears run on sparse kernels",
            ],
        ),
    ],
)
def test_the_tables_say_what_is_there(fixture, said, layers, request, call):
    code, out, _ = call(request.getfixturevalue(fixture), "-q", *layers)
    assert code == 0
    for words in said:
        assert words in out


def test_layers_lists_every_linear_and_layer(plan, call):
    assert "a.weight" not in call(plan, "-q")[1]
    listed = call(plan, "-q", "--layers")[1]
    assert "a.weight" in listed
    assert "float16 ?x16" in listed


def test_a_proof_that_is_demanded_and_there_exits_0(plan, call):
    assert call(plan, "-q", "--require-sparse")[0] == 0


def test_a_proof_that_is_demanded_and_absent_exits_6_after_the_result(tmp_path, make_engine, call):
    code, out, err = call(make_engine(tmp_path / "e", log=""), "--json", "--require-sparse")
    assert (code, json.loads(out)["verdict"]) == (6, "unknown")
    assert "no proof of sparsity for 1 of 1 pruned engines: transformer (tensorrt 10.13.3.9)" in err


@given(st.binary(max_size=64))
@settings(max_examples=60, deadline=None)
def test_no_bytes_break_the_reader_of_weights(tmp_path_factory, noise):
    path = tmp_path_factory.mktemp("noise") / "w.safetensors"
    path.write_bytes(noise)
    with pytest.raises(BundleError, match=r"w\.safetensors"):
        list(tensors(path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8])
def test_stored_bits_are_those_of_safetensors(tmp_path, dtype):
    values = torch.tensor([[0.0, -0.0, 1.5, 2.0], [0.0, 3.0, -1.0, 0.0]]).to(dtype)
    save_file({"w": values, "none": torch.zeros(0, 3)}, tmp_path / "w.safetensors")
    none, stored = tensors(tmp_path / "w.safetensors")
    assert (none.name, none.bits, stored.shape) == ("none", None, (2, 4))
    assert str(dtype).removeprefix("torch.") == stored.dtype
    zero = (stored.bits & stored.bits.dtype.type(stored.mask)) == 0
    assert np.array_equal(zero, (values == 0).numpy())


def test_a_truncated_file_of_weights_is_an_error(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(4, 4)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match="truncated: tensor w"):
        list(tensors(path))


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"ftrt" + bytes(20) + bytes((8, 6, 1, 6)), "TensorRT 8.6.1.6"),
        (b"vtrt" + bytes(20) + bytes((1, 7, 1, 116)), "TensorRT-RTX 1.7.1.116"),
        (b"ftrt", "TensorRT"),
        (b"none", ""),
    ],
)
def test_the_header_of_a_plan_names_its_builder(tmp_path, head, said):
    (tmp_path / "k.plan").write_bytes(head)
    assert header_of(tmp_path / "k.plan") == said


def test_every_kind_of_content_is_plain_data(checkpoint, graph, plan, bundle):
    for path in (checkpoint, graph, plan, bundle):
        assert json.loads(json.dumps(to_json(inspect(path)), allow_nan=False))["path"] == str(Path(path))
