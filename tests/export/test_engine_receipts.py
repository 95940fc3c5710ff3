import json

import pytest

from obsdiff_export.pattern import PatternReport
from obsdiff_export.proof.receipt import Receipt, load, of, require_sparse, sparsity_statement
from obsdiff_runtime.errors import BundleError, SparsityProofError

FOUND = "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b\n"
CHOSE = "(Sparsity) Chose 1 layer(s) using sparse tactics: a\n"


def linear(node: str, *, holds: bool = True) -> PatternReport:
    return PatternReport(
        name=f"{node}.weight",
        node=node,
        k=1024,
        n_out=1024,
        holds=holds,
        zeros=0.5,
        reason="" if holds else "only 1 of 4 weights are zero at output 0, inputs from 0",
        dtype="float16",
        reads=f"{node}_in",
    )


LINEARS = (linear("a"), linear("b"), linear("c", holds=False))


def receipt_of(patterns=LINEARS, log=FOUND + CHOSE, **more: object) -> Receipt:
    values = {
        "key": "k",
        "component": "transformer",
        "backend": "tensorrt",
        "backend_version": "10.13.3.9",
        "targets": ["8.7"],
        "onnx_sha256": "a",
        "plan_sha256": "b",
        "plan_bytes": 1,
        "profiles": [{"x": {"min": [1, 2], "opt": [1, 2], "max": [1, 2]}}],
        "sparse_requested": True,
        "inspector": None,
        "seconds": 1.5,
        "flags": {"refit": "no", "optimization_level": None},
    }
    return of(patterns=patterns, log=log, **{**values, **more})


RTX = {"backend": "tensorrt_rtx", "backend_version": "1.7.1.116", "log": ""}


def test_the_statement_counts_the_linears_and_repeats_the_builder():
    assert sparsity_statement(receipt_of()) == (
        "1 of 3 linears run on sparse kernels, 1 could and do not, 1 cannot; "
        "the builder found 2 of its layers eligible and chose sparse kernels for 1 (tensorrt 10.13.3.9)."
    )


def test_the_statement_of_a_silent_log_is_that_it_is_not_known():
    assert sparsity_statement(receipt_of(log="")) == (
        "0 of 3 linears run on sparse kernels, 1 cannot, of 2 it is not known; "
        "the build log says nothing of sparse kernels (tensorrt 10.13.3.9)."
    )


def test_the_statement_of_rtx_is_that_it_ignores_the_flag():
    assert "ignores it in builds without a GPU: this engine runs dense" in sparsity_statement(receipt_of(**RTX))


def test_the_statement_of_a_dense_build_is_that_it_is_one():
    assert "without the sparse flag" in sparsity_statement(receipt_of(log="", sparse_requested=False))


def test_the_statement_of_a_contradiction_names_the_linear_and_both_witnesses():
    said = sparsity_statement(receipt_of((linear("a", holds=False),)))
    assert said.startswith("Not proven: of a.weight, the witnesses contradict each other")
    assert said.endswith("not 2:4.")


def test_the_statement_without_weights_proves_nothing():
    assert sparsity_statement(receipt_of(())).startswith("Not proven: no weights were looked at; the builder found 2")


def test_a_receipt_comes_back_as_it_was_stored(tmp_path):
    path = tmp_path / "k.json"
    receipt_of().save(path)
    assert load(path) == receipt_of()
    assert json.loads(path.read_text())["sparsity"] == sparsity_statement(receipt_of())


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 1}', '{"schema": 2}', '{"schema": 99}', "[" * 100_000])
def test_what_is_no_receipt_is_an_error(tmp_path, text):
    path = tmp_path / "k.json"
    path.write_text(text)
    with pytest.raises(BundleError, match=r"k\.json: .*build the engine again"):
        load(path)


def test_a_verdict_nobody_knows_is_an_error(tmp_path):
    path = tmp_path / "k.json"
    receipt_of().save(path)
    path.write_text(path.read_text().replace('"active"', '"very active"'))
    with pytest.raises(BundleError, match=r"proof\.layers\[0\]\.verdict should be one of active, not chosen"):
        load(path)


def test_proven_engines_pass_and_those_without_sparse_weights_do_not_count():
    vae = receipt_of((linear("d", holds=False),), "", component="vae_decoder", sparse_requested=False)
    require_sparse([vae, receipt_of()])


def test_a_dense_twin_may_stand_beside_a_proven_engine_but_not_alone():
    twin = receipt_of(log="", sparse_requested=False)
    require_sparse([receipt_of(), twin])
    with pytest.raises(SparsityProofError, match="2 x the engine was built without the sparse flag"):
        require_sparse([twin])


def test_an_unproven_engine_is_an_error_with_exit_code_6_that_says_why():
    with pytest.raises(SparsityProofError, match="no proof of sparsity for 1 of 2 pruned engines") as raised:
        require_sparse([receipt_of(), receipt_of(log="", component="unet")])
    assert raised.value.exit_code == 6
    assert "unet (tensorrt 10.13.3.9): 0 of 3 linears" in str(raised.value)
    assert "2 x neither the log nor the engine's layers say" in str(raised.value)


def test_a_backend_that_ignores_sparsity_never_proves_it():
    with pytest.raises(SparsityProofError, match="2 x TensorRT-RTX takes the sparse flag and ignores it"):
        require_sparse([receipt_of(**RTX)])


def test_a_contradiction_is_no_proof_though_another_linear_is_active():
    log = FOUND + "(Sparsity) Chose 2 layer(s) using sparse tactics: a, c\n"
    receipt = receipt_of(log=log)
    assert (receipt.proof.active, receipt.proof.verdict) == (1, "contradicted")
    with pytest.raises(SparsityProofError, match="contradict"):
        require_sparse([receipt])


def test_nothing_to_prove_is_an_error_too():
    with pytest.raises(SparsityProofError, match="there is no engine"):
        require_sparse([])
    with pytest.raises(SparsityProofError, match="1 engine was looked at, and none has weights that are 2:4"):
        require_sparse([receipt_of((linear("d", holds=False),), "")])
