"""A bundle whose denoiser computes in eight bits: one recipe, one comparison, graphs that run."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

from obsdiff import verbs
from obsdiff.precision import fitting
from obsdiff.settings import Settings
from obsdiff.verbs import Exported
from obsdiff_export.build import BUILDERS
from obsdiff_export.builders.request import Flags
from obsdiff_export.orders import Order
from obsdiff_export.pattern import check
from obsdiff_export.requested import ShapeBounds
from obsdiff_runtime.bundle import open_bundle
from obsdiff_runtime.errors import CompatibilityError, ConfigError
from obsdiff_runtime.pipeline import Pipeline

TINY: dict[str, Any] = {"steps": 1, "height": 32, "width": 32, "num_samples": 2, "eval_prompts": 1, "draws": 1}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, sd3_folder: Path) -> Exported:
    """A tiny SD3 in int8 and 2:4, but for the linears out of the neurons."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a red circle\na blue square")
    settings = Settings(
        model=str(sd3_folder),
        precision="int8+fp16+2:4",
        keep_float=["*.ff.net.2"],
        method="magnitude",
        prompts_file=str(prompts),
        max_sequence_length=4,
        **TINY,
    )
    return verbs.export(settings, tmp_path_factory.mktemp("bundles") / "int8")


@pytest.mark.slow
def test_the_stored_codes_hold_the_pattern_under_the_weights_names(exported):
    graph = exported.folder / "transformer" / "model.onnx"
    pruned = [layer.name for layer in exported.report.layers if layer.pattern == "2:4"]
    assert len(pruned) > 20
    check(graph, 2, 4, pruned)
    types = {
        tensor.name: tensor.data_type for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer
    }
    for record in exported.report.quantized:
        wanted = TensorProto.INT8 if record.precision == "int8" else TensorProto.FLOAT16
        assert types[f"{record.name}.weight::T"] == wanted


def test_the_report_compares_what_ships(exported):
    report = json.loads((exported.folder / "report.json").read_text())
    assert report["sparsity"] == "2:4"
    assert (report["recipe"]["precision"], report["recipe"]["dtype"]) == ("int8", "fp16")
    assert report["evaluation"]["velocity_error"] > 0
    assert "linears inside the blocks compute in int8" in report["notes"][0]
    kept = [entry for entry in report["quantized"] if entry["precision"] == "float"]
    assert {entry["reason"] for entry in kept} == {"matches --keep-float"}
    assert {entry["dtype"] for entry in report["components"] if entry["name"] == "transformer"} == {"int8 in float16"}


def test_the_manifest_says_what_each_network_computes_in(exported):
    components = open_bundle(exported.folder).manifest.components
    assert (components["transformer"].dtype, components["transformer"].precision) == ("float16", "int8")
    assert components["vae_decoder"].precision == components["vae_decoder"].dtype == "float16"


def test_the_runtime_draws_with_it(exported):
    image = Pipeline(exported.folder)("a red circle", seed=1).arrays[0]
    assert image.std() > 0


def order_for(targets: tuple[str, ...]) -> Order:
    bounds = ShapeBounds(min={}, opt={}, max={})
    return Order(
        builder=BUILDERS["tensorrt_rtx"], targets=targets, flags=Flags(), profiles=(), bounds=bounds, cache=None,
        require_sparse=False, builds=0,
    )  # fmt: skip


def test_engines_are_built_for_targets_that_compute_in_the_precision():
    usual = order_for(("8.6", "8.9", "12.0"))
    found = fitting(usual, Settings(precision="fp8"))
    assert found is not None
    assert found.targets == ("8.9", "12.0")
    assert fitting(usual, Settings(precision="int8")) == usual
    with pytest.raises(CompatibilityError, match=r"8\.6 has no fp8: that needs 8\.9"):
        fitting(order_for(("8.6",)), Settings(precision="fp8", targets=["8.6"]))
    with pytest.raises(CompatibilityError, match=r"7\.5 has no bf16: that needs 8\.0"):
        fitting(order_for(("7.5",)), Settings(precision="int8", dtype="bf16", targets=["7.5"]))


@pytest.mark.skipif(bool(BUILDERS["tensorrt_rtx"].missing()), reason="TensorRT-RTX is absent")
def test_fp8_for_a_gpu_without_it_is_refused_before_the_model_is_read(tmp_path):
    asked = Settings(model=str(tmp_path / "absent"), precision="fp8+2:4", trt=True, targets=["8.6"])
    with pytest.raises(CompatibilityError, match=r"compute capability 8\.6 has no fp8"):
        verbs.export(asked, tmp_path / "out")


def test_a_name_that_matches_nothing_is_refused_before_any_work(tmp_path, sd3_folder):
    asked = Settings(model=str(sd3_folder), precision="int8", keep_float=["attention"], max_sequence_length=4, **TINY)
    with pytest.raises(ConfigError, match="--keep-float 'attention' matches no linear"):
        verbs.export(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()
