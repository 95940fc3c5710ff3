from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from obsdiff_runtime.backends import backend
from obsdiff_runtime.backends.plans import same_version, select
from obsdiff_runtime.bundle import Bundle, ComponentEntry, Defaults, EngineEntry, FileEntry, Manifest, TensorEntry
from obsdiff_runtime.cuda import Device
from obsdiff_runtime.errors import CompatibilityError, ConfigError

HERE = Device(name="NVIDIA H200", capability="9.0", memory_bytes=1)


def entry(key: str, **changes: Any) -> EngineEntry:
    built = {"backend": "tensorrt", "backend_version": "10.13.3.9", "targets": ("9.0",)} | changes
    return EngineEntry(path=f"engines/transformer/{key}.plan", key=key, **built)


def chosen(*entries: EngineEntry) -> str:
    return select(
        entries, backend="tensorrt", version="10.13.3.9", device=HERE, component="transformer", bundle=Path("sd35m")
    ).key


def test_the_newest_engine_for_this_machine_is_taken() -> None:
    assert chosen(entry("a"), entry("b"), entry("c", targets=("8.7",))) == "b"
    assert chosen(entry("a", targets=("8.6", "9.0")), entry("b", backend_version="11.4.0.106")) == "a"
    assert chosen(entry("a"), entry("b", backend="tensorrt_rtx")) == "a"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"targets": ("8.6", "8.9")}, "was built by tensorrt 10.13.3.9 for compute capability 8.6, 8.9"),
        (
            {"backend_version": "10.3.0"},
            "was built by tensorrt 10.3.0, and a plan loads in the version that built it",
        ),
        ({"backend": "tensorrt_rtx"}, "is for tensorrt_rtx"),
        ({"refit": "stripped"}, "holds no weights, and none are put into engines here"),
    ],
)
def test_a_plan_for_another_machine_is_refused_with_the_command(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(CompatibilityError) as error:
        chosen(entry("a", **changes))
    assert str(error.value) == (
        "no engine of transformer runs here, with tensorrt 10.13.3.9 on NVIDIA H200 (9.0): "
        f"engines/transformer/a.plan {why}; build one for this machine: obsdiff build sd35m"
    )
    assert error.value.exit_code == 5


def test_a_component_without_engines_names_the_command() -> None:
    with pytest.raises(
        CompatibilityError, match=r"transformer of sd35m has no engine; build one .*: obsdiff build sd35m"
    ):
        chosen()


@pytest.mark.parametrize(
    ("built", "here", "same"),
    [
        ("10.3.0", "10.3.0.26", True),
        ("10.3.0.26", "10.3.0.30", False),
        ("10.3.0", "10.13.3.9", False),
        ("11.4.0.106", "11.4.0.106", True),
        ("10.3.0.post1", "10.3.0", True),
        ("unknown", "10.3.0", True),
    ],
)
def test_versions_are_compared_as_far_as_both_say(built: str, here: str, same: bool) -> None:
    assert same_version(built, here) is same


def test_a_bundle_s_engine_runs_as_a_session(
    gpu: Any, plan: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = EngineEntry(
        path="engines/toy/a.plan",
        key="a",
        backend="tensorrt",
        backend_version="10.3.0",
        targets=("9.0",),
        device="Another GPU",
    )
    plan(tmp_path / engine.path, profiles=[(1, 2, 4)])
    tensors = {
        name: TensorEntry(name=name, dtype=dtype, shape=("batch", width))
        for name, dtype, width in (("x", "float32", 3), ("k", "int64", 1), ("y", "float32", 3))
    }
    component = ComponentEntry(
        onnx="toy/model.onnx",
        dtype="float32",
        inputs=(tensors["x"], tensors["k"]),
        outputs=(tensors["y"],),
        engines=(engine,),
    )
    manifest = Manifest(
        created_by="a test",
        family="toy",
        pipeline_class="Toy",
        sparsity="2:4",
        defaults=Defaults(height=1, width=1, num_inference_steps=1, guidance_scale=1),
        components={"toy": component},
        files={engine.path: FileEntry(sha256="0" * 64, bytes=1)},
    )
    bundle = Bundle(root=tmp_path, manifest=manifest)
    session = backend("tensorrt").open_session(bundle, "toy", threads=3)
    assert session.inputs == component.inputs
    assert session.outputs == component.outputs
    assert session.device == "Fake GPU (9.0)"
    assert "toy was tuned on Another GPU and runs on Fake GPU" in caplog.text
    result = session.run({"x": np.ones((2, 3)), "k": np.full((2, 1), 3)})
    np.testing.assert_array_equal(result["y"], np.full((2, 3), 5.0))
    with pytest.raises(ConfigError, match="toy: the engine does not take batch 5: its profile takes batch 1 to 4"):
        session.run({"x": np.ones((5, 3)), "k": np.ones((5, 1))})
    gpu.capability = (8, 6)
    with pytest.raises(CompatibilityError, match=r"for compute capability 9.0; build one .*: obsdiff build"):
        backend("tensorrt").open_session(bundle, "toy")
