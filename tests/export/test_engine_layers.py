import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsdiff_export.proof.layers import (
    EngineLayer,
    EngineTensor,
    dtype_of,
    layers_of_inspector,
    layers_of_log,
    nodes_of,
)
from obsdiff_runtime.errors import BuildError

RTX = """\
[INFO] Engine generation completed in 0.2 seconds.
[VERBOSE] Layers:
Name: __mye1_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, \
Metadata:\x20
Name: v+k+q_myl0_2, LayerType: gemm, Inputs: [ { Name: n.1_myl0, Dimensions: [-1,256], Strides: [256,1], StrideOrder: \
[1,0], Datatype: Half, Format: (Linear) Row major linear format }], Constants: [ { Name: __mye3_dconst, Dimensions: \
[256,768], Strides: [768,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear format }, { Name: \
__mye4v_alpha, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row major linear \
format }], Outputs: [ { Name: __mye5, Dimensions: [-1,768], Strides: [768,1], StrideOrder: [1,0], Datatype: Half, \
Format: (Linear) Row major linear format }], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: \
[ONNX Layer: v]\x1f[ONNX Layer: k]\x1f[ONNX Layer: q]

I/O Tensors:
 Name: tokens, IOMode: Input, DataType: Half, Dimensions: [-1,-1,256], Location: Device
[INFO] [MemUsageStats] Peak memory usage
"""

TENSORRT_8_LOG = """\
[08/05/2024-12:06:54] [V] [TRT] Layers:
Name: Reformatting CopyNode for Input Tensor 0 to MatMul_5 + Add_6, LayerType: Reformat, Inputs: [ { Name: x, \
Location: Device, Dimensions: [1,64,768], Format/Datatype: Row major linear FP32 }], Outputs: [ { Name: \
Reformatted Input Tensor 0 to {ForeignNode[a...b]}, Location: Device, Dimensions: [1,64,768], Format/Datatype: \
Row major linear FP16 format }], \
ParameterType: Reformat, Origin: REFORMAT, TacticValue: 0x0, StreamId: 0, Metadata:\x20
Name: MatMul_5 + Add_6, LayerType: CaskGemmMatrixMultiply, Inputs: [ { Name: y, Location: Device, Dimensions: \
[64,768], Format/Datatype: Row major linear FP16 format }], Outputs: [ { Name: z, Location: Device, Dimensions: \
[64,3072], Format/Datatype: Row major linear FP16 format }], ParameterType: MatrixMultiply, TacticName: \
sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128, TacticValue: 0x0020, StreamId: 0, Metadata: \
[ONNX Layer: MatMul_5 | block (Block)][ONNX Layer: Add_6]

Bindings:
x
z
"""


def layer_json(**more: object) -> dict[str, object]:
    return {"Name": "fc1", "LayerType": "gemm", "TacticName": "sm80_xmma_gemm_f16f16", **more}


TENSORRT_8 = {
    "Layers": [
        layer_json(
            Name="(Unnamed Layer* 1) [Convolution]",
            Inputs=[
                {"Name": "a", "Location": "Device", "Dimensions": [-1, 8], "Format/Datatype": "N/A due to dynamic"}
            ],
            Outputs=[
                {"Name": "b", "Dimensions": [-1, 12], "Format/Datatype": "Thirty-two wide row major Int8 format."}
            ],
            Weights={"Type": "Int8", "Count": 96},
            HasSparseWeights=0,
        )
    ],
    "Bindings": ["a", "b"],
}
TENSORRT_10 = {
    "Layers": [
        layer_json(
            Inputs=[{"Name": "a", "Dimensions": [-1, 256], "Format/Datatype": "Half"}],
            Outputs=[{"Name": "b", "Dimensions": [-1, 768], "Format/Datatype": "BFloat16"}],
            Metadata="[ONNX Layer: q]\x1e[ONNX Layer: k]",
            StreamId=0,
        )
    ],
    "Bindings": ["a", "b"],
    "Engine Metadata": {},
}
TENSORRT_11 = {
    "Layers": [
        layer_json(
            Inputs=[{"Name": "a", "Dimensions": [-1, 256], "Format": "Row major linear", "Datatype": "FP8"}],
            Constants=[{"Name": "w", "Dimensions": [256, 768], "Format": "Row major linear", "DataType": "FP8"}],
            Outputs=[{"Name": "b", "Dimensions": [-1, 768], "Format": "Row major linear", "Datatype": "Half"}],
            Metadata="[ONNX Layer: q]",
        )
    ],
    "I/O Tensors": [{"Name": "a", "IOMode": "Input", "DataType": "Half", "Dimensions": [-1, 256]}],
}


def test_the_layer_table_of_rtx_is_read_with_its_nodes():
    first, merged = layers_of_log(RTX)
    assert first == EngineLayer(name="__mye1_0_myl0_0", kind="shape_call")
    assert merged == EngineLayer(
        name="v+k+q_myl0_2",
        kind="gemm",
        tactic="__myelin_CASK_STUB",
        inputs=(EngineTensor(name="n.1_myl0", dims=(-1, 256), dtype="float16"),),
        constants=(
            EngineTensor(name="__mye3_dconst", dims=(256, 768), dtype="float16"),
            EngineTensor(name="__mye4v_alpha", dims=(1,), dtype="float32"),
        ),
        outputs=(EngineTensor(name="__mye5", dims=(-1, 768), dtype="float16"),),
        onnx_nodes=("v", "k", "q"),
    )


def test_the_layer_table_of_tensorrt_8_is_read_behind_its_time_stamps():
    reformat, product = layers_of_log(TENSORRT_8_LOG)
    assert (reformat.kind, reformat.tactic, reformat.onnx_nodes) == ("Reformat", "", ())
    assert reformat.outputs[0].name == "Reformatted Input Tensor 0 to {ForeignNode[a...b]}"
    assert [tensor.dtype for tensor in reformat.inputs + reformat.outputs] == ["float32", "float16"]
    assert product.tactic == "sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128"
    assert product.onnx_nodes == ("MatMul_5", "Add_6")


def test_a_log_without_detail_gives_names_only():
    text = "[VERBOSE] Layers:\nMatMul_5 + Add_6\nRelu_7\n\nBindings:\nx\n"
    assert [(layer.name, layer.kind) for layer in layers_of_log(text)] == [
        ("MatMul_5 + Add_6", "unknown"),
        ("Relu_7", "unknown"),
    ]


def test_of_several_tables_the_last_counts():
    assert len(layers_of_log(TENSORRT_8_LOG + RTX)) == 2
    assert layers_of_log(TENSORRT_8_LOG + RTX) == layers_of_log(RTX)


def test_no_table_gives_no_layers():
    assert layers_of_log("") == layers_of_log("[INFO] nothing\n") == layers_of_log("[VERBOSE] Layers:") == ()


def test_the_inspector_of_tensorrt_8_is_read():
    (layer,) = layers_of_inspector(json.dumps(TENSORRT_8))
    assert layer.name == "(Unnamed Layer* 1) [Convolution]"
    assert layer.inputs == (EngineTensor(name="a", dims=(-1, 8)),)
    assert layer.outputs == (EngineTensor(name="b", dims=(-1, 12), dtype="int8"),)
    assert layer.constants == (EngineTensor(name="weights", dtype="int8"),)


def test_the_inspectors_of_tensorrt_10_and_11_are_read_alike():
    (ten,) = layers_of_inspector(json.dumps(TENSORRT_10))
    (eleven,) = layers_of_inspector(json.dumps(TENSORRT_11))
    assert (ten.kind, ten.tactic, ten.onnx_nodes) == ("gemm", "sm80_xmma_gemm_f16f16", ("q", "k"))
    assert [ten.inputs[0].dtype, ten.outputs[0].dtype] == ["float16", "bfloat16"]
    assert (eleven.kind, eleven.tactic, eleven.onnx_nodes) == ("gemm", "sm80_xmma_gemm_f16f16", ("q",))
    assert [eleven.inputs[0].dtype, eleven.constants[0].dtype, eleven.outputs[0].dtype] == ["float8"] * 2 + ["float16"]


def test_an_inspector_without_detail_gives_names_only():
    assert layers_of_inspector('{"Layers": ["a + b"], "Bindings": []}') == (EngineLayer(name="a + b"),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no JSON"),
        (json.dumps(TENSORRT_10)[:-20], "no JSON .* cut off"),
        ("[]", "no list of Layers"),
        ('{"layers": []}', "no list of Layers"),
        ('{"Layers": {}}', "no list of Layers"),
        ('{"Layers": [{"LayerType": "gemm"}]}', r"Layers\[0\] is no layer with a Name"),
        ('{"Layers": ["a", 3]}', r"Layers\[1\]"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_what_is_no_inspectors_json_is_an_error_that_says_so(text, said):
    with pytest.raises(BuildError, match=said):
        layers_of_inspector(text)


@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        ("Row major linear FP16 format (kLINEAR)", "float16"),
        ("Channel major FP16 format where channel % 8 == 0", "float16"),
        ("BFloat16", "bfloat16"),
        ("Float", "float32"),
        ("FP8E4M3", "float8"),
        ("float8_e4m3fn", "float8"),
        ("Four wide channel vectorized row major Int8 format", "int8"),
        ("Int64", "int64"),
        ("N/A due to dynamic shapes", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_builders_words_for_a_type(words, dtype):
    assert dtype_of(words) == dtype


@pytest.mark.parametrize(
    ("metadata", "nodes"),
    [
        ("[ONNX Layer: a]\x1f[ONNX Layer: b]", ("a", "b")),
        ("[ONNX Layer: a][ONNX Layer: a]", ("a",)),
        ("[ONNX Layer: /x/[0]/MatMul | f (F) | g (G)]", ("/x/[0]/MatMul",)),
        ("[ONNX Layer: a]__gemm_from_conv1x1\x1f[ONNX Layer: b]", ("a", "b")),
        ("[ONNX Layer: cut", ()),
        ("", ()),
    ],
)
def test_the_nodes_in_a_layers_metadata(metadata, nodes):
    assert nodes_of(metadata) == nodes


names = st.text(st.characters(codec="utf-8", exclude_characters='"\n\r\x1e\x1f[]{}|,'), min_size=1, max_size=20)
dims = st.lists(st.integers(-1, 4096), max_size=4)


@given(st.lists(st.tuples(names, names, names, dims), max_size=4), st.booleans())
def test_a_written_table_is_read_back(rows, stamped):
    lines = [
        f"Name: {name}, LayerType: gemm, Inputs: [ {{ Name: {tensor}, Dimensions: {str(sizes).replace(' ', '')}, "
        f"Datatype: Half, Format: Float }}], Constants: [], Outputs: [], TacticName: {tactic}, StreamId: 0, "
        f"Metadata: [ONNX Layer: {name}]"
        for name, tensor, tactic, sizes in rows
    ]
    text = "\n".join([("[08/05] [V] " if stamped else "[VERBOSE] ") + "Layers:", *lines, "", "Bindings:"])
    read = layers_of_log(text)
    assert [(layer.name, layer.tactic) for layer in read] == [(row[0].strip(), row[2].strip()) for row in rows]
    assert [layer.inputs[0].dims for layer in read] == [tuple(row[3]) for row in rows]
    assert {layer.inputs[0].dtype for layer in read} <= {"float16"}


@given(st.integers(0, len(RTX)))
def test_a_log_cut_anywhere_is_read_as_far_as_it_goes(length):
    read, whole = layers_of_log(RTX[:length]), layers_of_log(RTX)
    assert len(read) <= len(whole)
    assert all(found == full for found, full in zip(read[:-1], whole, strict=False))


@given(st.text(max_size=200))
def test_no_text_breaks_the_reader_of_logs(text):
    for layer in layers_of_log("[VERBOSE] Layers:\n" + text):
        assert isinstance(layer, EngineLayer)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
keys = ("Name", "LayerType", "Inputs", "Constants", "Outputs", "TacticName", "Metadata", "Weights", "Dimensions")


@given(st.lists(st.dictionaries(st.sampled_from(keys), json_values) | json_values, max_size=4))
def test_no_json_breaks_the_reader_of_the_inspector(entries):
    try:
        layers = layers_of_inspector(json.dumps({"Layers": entries}))
    except BuildError:
        return
    assert len(layers) == len(entries)
