"""The witnesses as a table: every combination, and what it proves."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsdiff_export.pattern import PatternReport
from obsdiff_export.proof import Proof, prove
from obsdiff_export.proof.witnesses import SparsityLog, kernel_of, parse_log, parts_of

SPARSE = "sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128"
DENSE = "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128"
STUB = "__myelin_CASK_STUB"

TENSORRT_10 = """
[INFO] [TRT] (Sparsity) Found 2 layer(s) eligible to use sparse tactics: /mlp/fc1/MatMul, /mlp/fc2/MatMul
[VERBOSE] [TRT] Engine generation
[INFO] [TRT] (Sparsity) Chose 1 layer(s) using sparse tactics: /mlp/fc1/MatMul
"""
TENSORRT_8 = """
[I] [TRT] (Sparsity) Layers eligible for sparse math: conv1, conv2
[I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: conv2
"""


def weight(name: str = "fc", *, holds: bool = True, **more: object) -> PatternReport:
    values = {"k": 1024, "n_out": 1024, "zeros": 0.5, "reason": "" if holds else "only 1 of 4 weights are zero"}
    return PatternReport(
        name=f"{name}.weight", node=name, holds=holds, dtype="float16", reads="x", **{**values, **more}
    )


def log_of(found: list[str] | None, chose: list[str] | None = None, *, named: bool = True) -> str:
    """The lines of TensorRT 10."""

    def line(verb: str, what: str, names: list[str]) -> str:
        said = f"[INFO] (Sparsity) {verb} {len(names)} layer(s) {what}"
        return f"{said}: {', '.join(names)}\n" if named else f"{said}\n"

    lines = "" if found is None else line("Found", "eligible to use sparse tactics", found)
    return lines + ("" if chose is None else line("Chose", "using sparse tactics", chose))


def inspector_of(*layers: tuple[str, str], dtype: str = "Half", kind: str = "gemm") -> str:
    """The inspector's JSON of 11.x: (nodes joined by +, tactic) of each layer."""
    tensor = {"Name": "t", "Dimensions": [-1, 1024], "Datatype": dtype}
    return json.dumps(
        {
            "Layers": [
                {
                    "Name": f"{nodes}_myl0_{index}",
                    "LayerType": kind,
                    "Inputs": [tensor],
                    "Outputs": [{**tensor, "Datatype": "Half"}],
                    "TacticName": tactic,
                    "Metadata": "\x1f".join(f"[ONNX Layer: {node}]" for node in nodes.split("+")),
                }
                for index, (nodes, tactic) in enumerate(layers)
            ]
        }
    )


def prove_here(
    *patterns: PatternReport,
    log: str = "",
    inspector: str | None = None,
    backend: str = "tensorrt",
    requested: bool = True,
    target: str = "8.6",
) -> Proof:
    return prove(patterns, log, inspector, backend=backend, sparse_requested=requested, targets=(target,))


def test_the_lines_of_tensorrt_10_are_read():
    assert parse_log(TENSORRT_10) == SparsityLog(
        found=2, chose=1, found_layers=("/mlp/fc1/MatMul", "/mlp/fc2/MatMul"), chose_layers=("/mlp/fc1/MatMul",)
    )


def test_the_lines_of_tensorrt_8_are_read():
    assert parse_log(TENSORRT_8) == SparsityLog(
        found=2, chose=1, found_layers=("conv1", "conv2"), chose_layers=("conv2",)
    )


def test_lines_without_names_are_counted():
    assert parse_log(log_of(["a", "b"], ["a"], named=False)) == SparsityLog(found=2, chose=1)


def test_an_empty_list_is_none_chosen():
    old = (
        "(Sparsity) Layers eligible for sparse math: a",
        "(Sparsity) TRT inference plan picked sparse implementation for layers:",
    )
    assert parse_log("\n".join(old)) == SparsityLog(found=1, chose=0, found_layers=("a",))
    assert parse_log(log_of([], [])) == SparsityLog(found=0, chose=0)


def test_the_last_pair_of_a_build_counts():
    assert parse_log(TENSORRT_10 + log_of(["a", "b"], ["a", "b"])).chose == 2


def test_a_choice_before_the_last_search_is_of_an_earlier_try():
    assert parse_log(TENSORRT_10 + log_of(["a"])) == SparsityLog(found=1, chose=None, found_layers=("a",))


def test_no_line_is_unknown_and_not_zero():
    assert parse_log("[INFO] nothing of that kind\n") == SparsityLog(found=None, chose=None)


def test_a_comma_inside_brackets_parts_no_names():
    text = "(Sparsity) Layers eligible for sparse math: Conv_1 + PWN(Sigmoid_2, Mul_3), {ForeignNode[a, b]}"
    assert parse_log(text).found_layers == ("Conv_1 + PWN(Sigmoid_2, Mul_3)", "{ForeignNode[a, b]}")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("MatMul_5 + Add_6", ("MatMul_5", "Add_6")),
        ("v+k+q_myl0_2", ("v", "k", "q")),
        ("v [profile 1]+q [profile 1]_myl1_2", ("v", "q")),
        ("/a/MatMul || /b/MatMul", ("/a/MatMul", "/b/MatMul")),
        ("fc", ("fc",)),
    ],
)
def test_the_nodes_in_a_layers_name(name, parts):
    assert parts_of(name) == parts


@pytest.mark.parametrize(
    ("tactic", "said"),
    [
        (SPARSE, "sparse"),
        ("cutlass3x_sm100_sptensorop_s256x128x32spgemm_f16_f16", "sparse"),
        ("sm86_sp_gemm_s8", "sparse"),
        ("sm80_spmma_f16", "sparse"),
        ("__myl_SparseFc_0x12", "sparse"),
        (DENSE, "dense"),
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n", "dense"),
        ("sm80_xmma_fprop_implicit_gemm_f16", "dense"),
        ("ampere_h16816gemm_256x128_ldg8_nn_v1", "dense"),
        ("__myl_TranSpMmAdd_0x12", "silent"),  # named after what it computes
        ("_gemm_mha_v2_0x12", "silent"),  # attention
        (STUB, "silent"),
        ("", "silent"),
        ("0x0000000000000020", "silent"),
    ],
)
def test_what_a_kernels_name_says(tactic, said):
    assert kernel_of(tactic) == said


NAMED = {"silent": "", "chosen": log_of(["fc"], ["fc"]), "found": log_of(["fc"], []), "not found": log_of(["z"], ["z"])}
KERNELS = {"silent": STUB, "sparse": SPARSE, "dense": DENSE}


@pytest.mark.parametrize(
    ("holds", "log", "kernel", "verdict", "said"),
    [
        (True, "chosen", "sparse", "active", ""),
        (True, "chosen", "silent", "active", ""),
        (True, "silent", "sparse", "active", ""),
        (True, "chosen", "dense", "unknown", "contradict.*the engine has a dense one"),
        (True, "found", "sparse", "unknown", "contradict.*none was chosen"),
        (True, "found", "dense", "not chosen", "likely because the dense kernel was faster"),
        (True, "found", "silent", "not chosen", "likely because the dense kernel was faster"),
        (True, "not found", "sparse", "unknown", "contradict.*none was chosen"),
        (True, "not found", "dense", "not eligible", "the builder does not list it"),
        (True, "not found", "silent", "not eligible", "the builder does not list it"),
        (True, "silent", "dense", "not chosen", "the engine has a dense kernel"),
        (True, "silent", "silent", "unknown", "neither the log nor the engine's layers"),
        (False, "chosen", "sparse", "unknown", "contradict.*not 2:4"),
        (False, "chosen", "silent", "unknown", "contradict.*not 2:4"),
        (False, "chosen", "dense", "unknown", "contradict.*not 2:4"),
        (False, "found", "silent", "unknown", "contradict.*calls the layer eligible"),
        (False, "found", "dense", "unknown", "contradict.*calls the layer eligible"),
        (False, "found", "sparse", "unknown", "contradict.*not 2:4"),
        (False, "silent", "sparse", "unknown", "contradict.*not 2:4"),
        (False, "not found", "sparse", "unknown", "contradict.*not 2:4"),
        (False, "silent", "silent", "not eligible", "not 2:4: only 1 of 4"),
        (False, "silent", "dense", "not eligible", "not 2:4: only 1 of 4"),
        (False, "not found", "silent", "not eligible", "not 2:4: only 1 of 4"),
        (False, "not found", "dense", "not eligible", "not 2:4: only 1 of 4"),
    ],
)
def test_what_the_witnesses_prove_together(holds, log, kernel, verdict, said):
    proof = prove_here(weight(holds=holds), log=NAMED[log], inspector=inspector_of(("fc", KERNELS[kernel])))
    (layer,) = proof.layers
    assert (layer.verdict, layer.weights, layer.log, layer.inspector) == (
        verdict,
        "holds" if holds else "broken",
        log,
        kernel,
    )
    assert re.search(said, layer.reason) if said else layer.reason == ""
    assert layer.contradicts is said.startswith("contradict")
    assert (proof.verdict == "active") is (verdict == "active")


@pytest.mark.parametrize(("backend", "said"), [("tensorrt_rtx", "ignores it"), ("onnxruntime", "multiplies zeros")])
def test_a_backend_that_ignores_sparsity_says_so(backend, said):
    proof = prove_here(weight(), inspector=inspector_of(("fc", STUB)), backend=backend)
    assert (proof.verdict, proof.layers[0].verdict, proof.active) == ("ignored", "not eligible", 0)
    assert said in proof.layers[0].reason


def test_a_sparse_kernel_of_a_backend_that_has_none_is_a_contradiction():
    proof = prove_here(weight(), inspector=inspector_of(("fc", SPARSE)), backend="tensorrt_rtx")
    assert (proof.verdict, proof.layers[0].verdict) == ("contradicted", "unknown")


def test_without_the_flag_nothing_is_eligible_and_a_sparse_kernel_contradicts():
    proof = prove_here(weight(), inspector=inspector_of(("fc", DENSE)), requested=False)
    assert (proof.verdict, proof.layers[0].reason) == (
        "not requested",
        "the engine was built without the sparse flag",
    )
    assert prove_here(weight(), log=NAMED["chosen"], requested=False).verdict == "contradicted"


def test_linears_that_are_merged_hold_together_or_not_at_all():
    q, k, v = weight("q"), weight("k"), weight("v", holds=False)
    proof = prove_here(q, k, v, inspector=inspector_of(("v+k+q", DENSE)))
    assert [layer.verdict for layer in proof.layers] == ["not eligible"] * 3
    assert proof.layers[0].reason == "the builder merged it with v.weight, whose weights are not 2:4"
    assert proof.layers[0].merged == ("k.weight", "v.weight")
    whole = prove_here(q, k, weight("v"), log=log_of(["v+k+q_myl0_0"], ["v+k+q_myl0_0"]))
    assert [layer.verdict for layer in whole.layers] == ["active"] * 3
    assert whole.layers[0].merged == ("k.weight", "v.weight")


def test_a_merged_product_that_is_sparse_with_a_dense_part_is_a_contradiction():
    proof = prove_here(weight("q"), weight("k", holds=False), log=log_of(["k+q"], ["k+q"]))
    assert [layer.contradicts for layer in proof.layers] == [True, True]


def test_linears_that_follow_each_other_in_a_fused_layer_are_not_merged():
    up, down = weight("up"), replace(weight("down", holds=False), reads="h")
    first, second = prove_here(up, down, inspector=inspector_of(("up+down", DENSE), kind="fusion")).layers
    assert (first.verdict, first.merged, second.verdict) == ("not chosen", (), "not eligible")


def test_what_may_be_merged_is_told_where_nobody_says():
    first, _ = prove_here(weight("q"), weight("k", holds=False)).layers
    assert first.verdict == "unknown"
    assert "k.weight of the same input are not 2:4" in first.reason


def test_a_subgraph_that_is_one_layer_merges_nothing():
    inspector = inspector_of(("q+k", ""), kind="Myelin")
    assert [layer.merged for layer in prove_here(weight("q"), weight("k"), inspector=inspector).layers] == [(), ()]


def test_a_layer_that_prepares_operands_is_no_witness():
    inspector = json.loads(inspector_of(("fc", SPARSE), ("fc", "__myl_MoveConc_0x1")))
    inspector["Layers"][1]["LayerType"] = "kgen"
    (layer,) = prove_here(weight(), inspector=json.dumps(inspector)).layers
    assert (layer.inspector, layer.tactic) == ("sparse", SPARSE)


def test_a_linear_that_is_sparse_in_some_profiles_only_says_in_how_many():
    (layer,) = prove_here(weight(), inspector=inspector_of(("fc", SPARSE), ("fc", DENSE))).layers
    assert (layer.verdict, layer.inspector) == ("active", "partly sparse")
    assert layer.reason == "in 1 of the 2 engine layers that compute it"


def test_names_that_the_log_does_not_give_leave_linears_unknown():
    (layer,) = prove_here(weight(), log=log_of(["a", "b"], ["a"], named=False)).layers
    assert (layer.log, layer.verdict) == ("silent", "unknown")
    assert "chose sparse kernels for 1 layers and does not say which" in layer.reason


def test_none_chosen_needs_no_names():
    (layer,) = prove_here(weight(), log=log_of(["a"], [], named=False)).layers
    assert (layer.verdict, "the builder chose none" in layer.reason) == ("not chosen", True)


def test_a_fused_name_that_cannot_be_matched_leaves_linears_unknown():
    log = log_of(["{ForeignNode[fc...z]}"], ["{ForeignNode[fc...z]}"])
    proof = prove_here(weight(), log=log)
    assert proof.layers[0].verdict == "unknown"
    assert proof.others == ("{ForeignNode[fc...z]}",)


def test_a_fused_name_is_matched_through_the_layers_metadata():
    inspector = json.loads(inspector_of(("fc", STUB)))
    inspector["Layers"][0]["Name"] = "__myl_FcAdd_myl0_0"
    log = log_of(["__myl_FcAdd_myl0_0"], ["__myl_FcAdd_myl0_0"])
    (layer,) = prove_here(weight(), log=log, inspector=json.dumps(inspector)).layers
    assert (layer.verdict, layer.layer) == ("active", "__myl_FcAdd_myl0_0")


def test_convolutions_that_are_sparse_are_told_apart():
    assert prove_here(weight(), log=log_of(["fc", "/conv"], ["/conv"])).others == ("/conv",)


@pytest.mark.parametrize(
    ("report", "more", "said"),
    [
        (weight(k=128), {}, "it is small \\(128 to 1024\\)"),
        (weight(), {"dtype": "Int8"}, "its output is float16: sparse int8 kernels are chosen where Q follows"),
        (weight(), {"kind": "runtime_fusion"}, "fused with its neighbours"),
    ],
)
def test_the_likely_reason_that_dense_was_chosen(report, more, said):
    proof = prove_here(report, log=NAMED["found"], inspector=inspector_of(("fc", STUB), **more))
    assert re.search(f"^likely because.*{said}", proof.layers[0].reason)


def test_float32_has_no_sparse_kernels():
    proof = prove_here(weight(), log=NAMED["not found"], inspector=inspector_of(("fc", DENSE), dtype="Float"))
    assert "float32" in proof.layers[0].reason


def test_an_architecture_without_sparse_kernels_is_told():
    (layer,) = prove_here(weight(), target="7.5").layers
    assert (layer.verdict, "7.5 has no sparse kernels" in layer.reason) == ("not eligible", True)


@pytest.mark.parametrize(
    ("pattern", "holds", "verdict"),
    [("1:2", True, "active"), ("3:4", True, "active"), ("4:8", True, "unknown"), ("3:4", False, "unknown")],
)
def test_another_pattern_counts_where_it_tells_of_2_4(pattern, holds, verdict):
    (layer,) = prove_here(replace(weight(), pattern=pattern, holds=holds), log=NAMED["chosen"]).layers
    assert layer.verdict == verdict


def test_an_inspector_that_cannot_be_read_is_noted_and_proves_nothing():
    proof = prove_here(weight(), inspector='{"Layers": [')
    assert (proof.verdict, proof.sparse_layers, len(proof.notes)) == ("unknown", None, 1)
    assert "cut off" in proof.notes[0]


def test_the_logs_own_table_stands_in_for_the_inspector():
    table = f"[V] Layers:\nName: fc, LayerType: gemm, Inputs: [], Outputs: [], TacticName: {SPARSE}, Metadata: \n"
    proof = prove_here(weight(), log=table)
    assert (proof.active, proof.sparse_layers, proof.layers[0].inspector) == (1, 1, "sparse")


def test_an_engine_without_linears_is_told():
    assert prove_here(log=log_of(["/conv"], ["/conv"])).verdict == "no linears"


lines = st.lists(
    st.sampled_from(["fc", "k", "fc+k", "{ForeignNode[fc...k]}", "__myl_Fc_myl0_1", "/conv"]), max_size=3, unique=True
)


@given(
    holds=st.booleans(),
    found=st.none() | lines,
    chose=st.none() | lines,
    named=st.booleans(),
    tactics=st.lists(st.sampled_from([SPARSE, DENSE, STUB, "", "__myl_FcAdd_0x1"]), max_size=3),
    backend=st.sampled_from(["tensorrt", "tensorrt_rtx", "onnxruntime"]),
    requested=st.booleans(),
    target=st.sampled_from(["7.5", "8.6", "9.0", "nonsense"]),
)
def test_success_always_has_weights_and_a_witness(holds, found, chose, named, tactics, backend, requested, target):
    inspector = inspector_of(*(("fc", tactic) for tactic in tactics)) if tactics else None
    log = log_of(found, chose, named=named)
    patterns = (weight(holds=holds), weight("k"))
    proof = prove_here(*patterns, log=log, inspector=inspector, backend=backend, requested=requested, target=target)
    for layer in proof.layers:
        if layer.verdict == "active":
            assert backend == "tensorrt"
            assert requested
            assert layer.weights == "holds"
            assert layer.log == "chosen" or layer.inspector in ("sparse", "partly sparse")
        else:
            assert layer.reason
    assert proof.verdict != "active" or proof.active
    assert len(proof.layers) == 2
