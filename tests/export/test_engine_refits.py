"""Refitting, held to a vendor's module that is as strict as the real one: no GPU is here."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from obsdiff_export.pattern import check
from obsdiff_export.proof import receipt
from obsdiff_export.refitting import refit
from obsdiff_runtime.errors import BuildError, CompatibilityError, ConfigError

LOG = """
[INFO] (Sparsity) Found 1 layer(s) eligible to use sparse tactics: fc1
[INFO] (Sparsity) Chose 1 layer(s) using sparse tactics: fc1
"""


def graph(path: Path, seed: int, *, sparse: bool = True) -> Path:
    """Two linears, of which the first is 2:4."""
    random = np.random.default_rng(seed)
    first, second = (random.standard_normal((64, 64)).astype(np.float16) for _ in range(2))
    if sparse:
        first.reshape(16, 4, 64)[:, 1:3] = 0
    x, y = (helper.make_tensor_value_info(port, TensorProto.FLOAT16, ["batch", 64]) for port in "xy")
    nodes = [
        helper.make_node("MatMul", ["x", "fc1.weight::T"], ["h"], name="fc1"),
        helper.make_node("MatMul", ["h", "fc2.weight::T"], ["y"], name="fc2"),
    ]
    weights = [numpy_helper.from_array(first, "fc1.weight::T"), numpy_helper.from_array(second, "fc2.weight::T")]
    opset = helper.make_opsetid("", 20)
    path.parent.mkdir(exist_ok=True)
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y], weights), opset_imports=[opset]), path)
    return path


@pytest.fixture
def engine(tmp_path: Path):
    """A plan, its log and receipt, as a build leaves them."""

    def make(log: str = LOG, **changes: Any) -> Path:
        plan = tmp_path / "engines" / "k.plan"
        plan.parent.mkdir(exist_ok=True)
        plan.write_bytes(b"a plan")
        plan.with_suffix(".log").write_text(log)
        model = graph(tmp_path / "transformer" / "model.onnx", 0)
        facts = {
            "key": "k" * 24,
            "component": "transformer",
            "backend": "tensorrt",
            "backend_version": "10.13.3.9",
            "targets": ("9.0",),
            "onnx_sha256": "a",
            "plan_sha256": "b",
            "plan_bytes": 6,
            "profiles": [{"x": {"min": (1, 64), "opt": (1, 64), "max": (1, 64)}}],
            "sparse_requested": True,
            "patterns": check(model, 2, 4),
            "log": log,
            "inspector": None,
            "seconds": 1.0,
            "flags": {"refit": "stripped"},
        }
        receipt.of(**{**facts, **changes}).save(plan.with_suffix(".json"))
        return plan

    return make


@dataclass
class FakeVendor:
    """Names as in the bindings; counts what is called."""

    names: tuple[str, ...] = ("fc1.weight::T", "fc2.weight::T")
    missing: tuple[str, ...] = ()
    loads: bool = True
    refittable: bool = True
    takes: bool = True
    errors: tuple[Any, ...] = ()
    again: bool = True
    calls: list[Any] = field(default_factory=list)
    __version__: str = "10.13.3.9"

    class ILogger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3)

        def __init__(self) -> None: ...

    @property
    def SerializationFlag(self) -> Any:  # noqa: N802
        flags = {"EXCLUDE_WEIGHTS": "EXCLUDE_WEIGHTS"}
        return SimpleNamespace(**flags, **({"INCLUDE_REFIT": "INCLUDE_REFIT"} if self.again else {}))

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        config = SimpleNamespace(
            set_flag=lambda flag: self.calls.append(("set", flag)),
            clear_flag=lambda flag: self.calls.append(("clear", flag)),
        )
        engine = SimpleNamespace(
            refittable=self.refittable,
            create_serialization_config=lambda: config,
            serialize_with_config=lambda given: b"new weights",
        )
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: engine if self.loads else None)

    def Refitter(self, engine: Any, logger: Any) -> Any:  # noqa: N802
        return SimpleNamespace(
            get_missing_weights=lambda: list(self.missing),
            get_all_weights=lambda: list(self.names),
            refit_cuda_engine=lambda: self.takes,
        )

    def OnnxParserRefitter(self, refitter: Any, logger: Any) -> Any:  # noqa: N802
        return SimpleNamespace(
            refit_from_file=lambda path: self.calls.append(("file", path)) or not self.errors,
            num_errors=len(self.errors),
            get_error=lambda index: self.errors[index],
        )


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """Other weights, as sparse."""
    return graph(tmp_path / "lora" / "model.onnx", 1)


def test_the_new_plan_holds_the_weights_and_can_be_refitted_again(engine, lora, tmp_path):
    vendor = FakeVendor()
    done = refit(engine(), lora, tmp_path / "new" / "lora.plan", vendor=vendor)
    assert done.path.read_bytes() == b"new weights"
    assert (done.weights, done.bytes) == (2, 11)
    assert ("file", str(lora)) in vendor.calls
    assert vendor.calls[-2:] == [("clear", "EXCLUDE_WEIGHTS"), ("set", "INCLUDE_REFIT")]
    found = receipt.load(done.receipt_path)
    assert found.flags["refitted_from"] == "k" * 24
    assert found.flags["refit"] == "yes"
    assert found.key != "k" * 24
    assert found.proof.active == 1


def test_a_release_that_cannot_keep_a_plan_refittable_writes_one_all_the_same(engine, lora, tmp_path):
    vendor = FakeVendor(again=False)
    refit(engine(), lora, tmp_path / "lora.plan", vendor=vendor)
    assert vendor.calls[-1] == ("clear", "EXCLUDE_WEIGHTS")


def test_dense_weights_for_a_sparse_kernel_are_refused_before_the_gpu_is_asked(engine, tmp_path):
    dense = graph(tmp_path / "lora" / "model.onnx", 1, sparse=False)
    vendor = FakeVendor()
    with pytest.raises(BuildError, match=r"1 linears of this engine .*not 2:4: fc1\.weight: only 0 of 4"):
        refit(engine(), dense, tmp_path / "lora.plan", vendor=vendor)
    assert not vendor.calls
    assert not (tmp_path / "lora.plan").exists()


def test_where_it_is_not_known_which_kernels_run_the_weights_must_be_sparse_too(engine, tmp_path):
    dense = graph(tmp_path / "lora" / "model.onnx", 1, sparse=False)
    with pytest.raises(BuildError, match="or may run, on sparse kernels"):
        refit(engine(log=""), dense, tmp_path / "lora.plan", vendor=FakeVendor())


@pytest.mark.parametrize("changes", [{"sparse_requested": False}, {"backend": "tensorrt_rtx"}])
def test_an_engine_without_sparse_kernels_takes_dense_weights(engine, tmp_path, changes):
    dense = graph(tmp_path / "lora" / "model.onnx", 1, sparse=False)
    assert refit(engine(log="", **changes), dense, tmp_path / "lora.plan", vendor=FakeVendor()).weights == 2


def test_an_engine_that_was_not_built_for_it_is_told_how_to_be(engine, lora, tmp_path):
    with pytest.raises(ConfigError, match="without --refit: its weights are fixed; build it again with --refit yes"):
        refit(engine(flags={"refit": "no"}), lora, tmp_path / "lora.plan", vendor=FakeVendor())
    with pytest.raises(ConfigError, match="says that it cannot be refitted"):
        refit(engine(), lora, tmp_path / "lora.plan", vendor=FakeVendor(refittable=False))


def test_the_engine_itself_is_never_overwritten(engine, lora):
    plan = engine()
    with pytest.raises(ConfigError, match="the engine that is refitted stays as it is"):
        refit(plan, lora, plan, vendor=FakeVendor())


def test_a_plan_of_another_version_says_what_it_was_built_for(engine, lora, tmp_path):
    vendor = FakeVendor(loads=False, __version__="11.4.0")
    with pytest.raises(CompatibilityError, match=r"by tensorrt 11\.4\.0 here; .* tensorrt 10\.13\.3\.9 for 9\.0"):
        refit(engine(), lora, tmp_path / "lora.plan", vendor=vendor)


def test_a_graph_of_other_widths_is_refused_by_node(engine, lora, tmp_path):
    error = SimpleNamespace(
        node=lambda: 1,
        node_name=lambda: "fc2",
        node_operator=lambda: "MatMul",
        desc=lambda: "Assertion failed: count == expected: 64 weights, 32 expected",
    )
    vendor = FakeVendor(errors=(error,), missing=("fc2.weight::T",))
    with pytest.raises(BuildError, match=r"node fc2 \(MatMul\): .*1 weights are missing: fc2\.weight::T"):
        refit(engine(), lora, tmp_path / "lora.plan", vendor=vendor)


def test_weights_that_are_missing_are_named(engine, lora, tmp_path):
    with pytest.raises(BuildError, match="lacks 1 weights of the engine, such as b; export the same model"):
        refit(engine(), lora, tmp_path / "lora.plan", vendor=FakeVendor(missing=("b",)))


def test_a_vendor_that_says_no_is_an_error_and_leaves_nothing(engine, lora, tmp_path):
    with pytest.raises(BuildError, match="did not take the weights"):
        refit(engine(), lora, tmp_path / "new" / "lora.plan", vendor=FakeVendor(takes=False))
    assert not (tmp_path / "new").exists()


def test_other_backends_have_no_refit(engine, lora, tmp_path):
    with pytest.raises(ConfigError, match="engines of onnxruntime cannot be refitted"):
        refit(engine(backend="onnxruntime"), lora, tmp_path / "lora.plan")
