from dataclasses import replace

import pytest

from obsdiff_export.pattern import PatternReport
from obsdiff_export.receipt import Receipt, SparsityLog, load, parse_log, sparsity_statement
from obsdiff_runtime.errors import BundleError

RECEIPT = Receipt(
    key="k",
    component="transformer",
    backend="tensorrt",
    backend_version="10.13.3.9",
    targets=("8.7",),
    onnx_sha256="a",
    plan_sha256="b",
    plan_bytes=1,
    profile={"x": {"min": (1, 2), "opt": (1, 2), "max": (1, 2)}},
    sparse_requested=True,
    sparsity_log=SparsityLog(found=11, chose=6, found_layers=("a",), chose_layers=("a",)),
    weights=(PatternReport(name="w", node="n", k=4, n_out=4, holds=True, zeros=0.5, reason=""),),
    seconds=1.5,
)

TENSORRT_10 = """
[INFO] [TRT] (Sparsity) Found 2 layer(s) eligible to use sparse tactics: /mlp/fc1/MatMul, /mlp/fc2/MatMul
[VERBOSE] [TRT] Engine generation
[INFO] [TRT] (Sparsity) Chose 1 layer(s) using sparse tactics: /mlp/fc1/MatMul
"""
TENSORRT_8 = """
[I] [TRT] (Sparsity) Layers eligible for sparse math: conv1, conv2
[I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: conv2
"""


def test_the_lines_of_tensorrt_10_are_read():
    assert parse_log(TENSORRT_10) == SparsityLog(
        found=2,
        chose=1,
        found_layers=("/mlp/fc1/MatMul", "/mlp/fc2/MatMul"),
        chose_layers=("/mlp/fc1/MatMul",),
    )


def test_the_lines_of_tensorrt_8_are_read():
    assert parse_log(TENSORRT_8) == SparsityLog(
        found=2, chose=1, found_layers=("conv1", "conv2"), chose_layers=("conv2",)
    )


def test_an_empty_list_is_none_chosen():
    old = (
        "(Sparsity) Layers eligible for sparse math: a",
        "(Sparsity) TRT inference plan picked sparse implementation for layers:",
    )
    assert parse_log("\n".join(old)) == SparsityLog(found=1, chose=0, found_layers=("a",))
    new = (
        "(Sparsity) Found 0 layer(s) eligible to use sparse tactics: ",
        "(Sparsity) Chose 0 layer(s) using sparse tactics: ",
    )
    assert parse_log("\n".join(new)) == SparsityLog(found=0, chose=0)


def test_the_last_pair_of_a_build_counts():
    text = TENSORRT_10 + "(Sparsity) Chose 2 layer(s) using sparse tactics: a, b\n"
    assert parse_log(text).chose == 2


def test_no_line_is_unknown_and_not_zero():
    assert parse_log("[INFO] nothing of that kind\n") == SparsityLog(found=None, chose=None)


def test_the_statement_says_what_was_found_and_chosen():
    assert sparsity_statement(RECEIPT) == (
        "The builder found 11 layers eligible for sparse kernels and chose them for 6."
    )


def test_the_statement_of_a_silent_log_is_unknown():
    silent = replace(RECEIPT, sparsity_log=SparsityLog(found=None, chose=None))
    assert sparsity_statement(silent).startswith("Unknown: the build log of tensorrt 10.13.3.9")


def test_the_statement_of_rtx_is_that_it_ignores_the_flag():
    assert "ignores it" in sparsity_statement(replace(RECEIPT, backend="tensorrt_rtx"))


def test_the_statement_of_a_dense_build_is_that_it_is_one():
    assert "without the sparse flag" in sparsity_statement(replace(RECEIPT, sparse_requested=False))


def test_a_receipt_comes_back_as_it_was_stored(tmp_path):
    path = tmp_path / "k.json"
    RECEIPT.save(path)
    back = load(path)
    assert replace(back, profile=RECEIPT.profile) == RECEIPT
    assert {name: {k: tuple(v) for k, v in s.items()} for name, s in back.profile.items()} == RECEIPT.profile


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 1}', '{"schema": 99}'])
def test_what_is_no_receipt_is_an_error(tmp_path, text):
    path = tmp_path / "k.json"
    path.write_text(text)
    with pytest.raises(BundleError, match="build the engine again"):
        load(path)
