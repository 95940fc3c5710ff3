"""Weights that go from file to file: the bundle is the usual one, byte by byte, and what cannot be had is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from networks.whole.denoisers import ONE_LEVEL
from obsdiff import checkpoint, verbs, weights
from obsdiff.delivery import dtype_of
from obsdiff.loading import load_pipeline
from obsdiff.settings import Settings
from obsdiff_export.stored import StoredParameter, is_stored, values
from obsdiff_runtime.errors import BundleError, ConfigError, ModelError

SMALL: dict[str, Any] = {"height": 32, "width": 32, "steps": 2}


@pytest.fixture
def pruned(build_pipeline: Callable[..., DiffusionPipeline], tmp_path: Path) -> Path:
    out = tmp_path / "pruned"
    build_pipeline("sd3", num_layers=2).save_pretrained(tmp_path / "dense")
    settings = Settings(
        model=str(tmp_path / "dense"), sparsity="structured:0.25+2:4", method="magnitude", align=1, **SMALL
    )
    verbs.prune_to_folder(settings, out)
    return out


@pytest.mark.slow
def test_the_bundle_of_a_pruned_checkpoint_is_the_usual_one(pruned: Path, tmp_path: Path) -> None:
    usual = verbs.export(pruned, tmp_path / "usual", **SMALL)
    low = verbs.export(pruned, tmp_path / "low", low_memory=True, **SMALL)
    files = sorted(path.relative_to(usual.folder) for path in usual.folder.glob("*/model.onnx*"))
    assert len(files) == 10
    for file in files:
        assert (low.folder / file).read_bytes() == (usual.folder / file).read_bytes(), file
    assert (low.report.pruned.parameters, low.report.pruned.nonzero) == (
        usual.report.pruned.parameters,
        usual.report.pruned.nonzero,
    )
    assert usual.report.to_json()["latency"] == {"not_measured": "the model was exported as it came"}
    told = low.report.to_json()
    assert told["latency"] == {"not_measured": "--low-memory runs no network"}
    assert "were not compared with torch, and nothing was timed" in told["notes"][0]
    errors = {component["name"]: component["max_error"] for component in told["components"]}
    assert errors["transformer"] == errors["text_encoder_2"] == {"not_measured": "--low-memory runs no network"}
    assert errors["vae_decoder"] < 1e-4, "what is loaded is compared"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sparsity": "2:4"}, "--sparsity cannot go with it: prune first"),
        ({"precision": "int8"}, "--precision cannot go with it"),
        ({"trt": True}, "then obsdiff build OUT"),
        ({"fail_if": ["velocity_error>0.1"]}, "nothing is measured"),
    ],
)
def test_what_runs_the_model_is_refused(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        verbs.export(output=tmp_path / "out", low_memory=True, **more)
    assert not (tmp_path / "out").exists()


def test_only_export_knows_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--low-memory: only obsdiff export"):
        verbs.prune(sparsity="2:4", low_memory=True)
    with pytest.raises(ConfigError, match="--low-memory: only obsdiff export"):
        verbs.prune_to_folder(Settings(sparsity="2:4", low_memory=True), tmp_path / "out")


def test_parameters_lie_in_their_files_and_buffers_are_read(sd3_folder: Path) -> None:
    folder = sd3_folder / "transformer"
    denoiser = checkpoint.stored_denoiser(folder)
    assert is_stored(denoiser)
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    for name, parameter in denoiser.named_parameters():
        assert isinstance(parameter, StoredParameter), name
        assert parameter.is_meta
        assert torch.equal(values(parameter), state[name]), name
    assert torch.equal(denoiser.get_buffer("pos_embed.pos_embed"), state["pos_embed.pos_embed"])


def test_tied_weights_need_one_name_in_the_files(sd3_t5_folder: Path) -> None:
    encoder = weights.stored_encoder(sd3_t5_folder / "text_encoder_3", "T5EncoderModel")
    assert encoder is not None
    names = [name for name, _ in encoder.named_parameters(remove_duplicate=False)]
    assert {"shared.weight", "encoder.embed_tokens.weight"} <= set(names)
    assert encoder.get_parameter("shared.weight") is encoder.get_parameter("encoder.embed_tokens.weight")


def test_precision_is_as_stored_unless_it_is_asked_for(
    build_pipeline: Callable[..., DiffusionPipeline], tmp_path: Path
) -> None:
    """Also of an encoder whose files name tensors as older versions of transformers did."""
    half = tmp_path / "half"
    build_pipeline("sd15", **ONE_LEVEL).to(torch.float16).save_pretrained(half)
    _change(half / "text_encoder" / "model.safetensors", _rename)
    found = verbs.export(half, tmp_path / "out", low_memory=True, **SMALL)
    components = {item.name: item for item in found.report.components}  # type: ignore[union-attr]
    dtypes = {name: component.dtype for name, component in components.items()}
    assert dtypes["unet"] == dtypes["text_encoder"] == "float16"
    assert dtypes["vae_decoder"] == "float32", "what is loaded"
    assert isinstance(components["vae_decoder"].max_error, float)
    assert not isinstance(components["unet"].max_error, float)
    encoder = weights.stored_encoder(half / "text_encoder", "CLIPTextModel")
    assert encoder is not None
    state = load_file(half / "text_encoder" / "model.safetensors")
    kept = {parameter.key for parameter in encoder.parameters() if isinstance(parameter, StoredParameter)}
    assert kept == state.keys()
    _change(half / "text_encoder" / "model.safetensors", lambda state: state.update(x=torch.ones(1)))
    assert weights.stored_encoder(half / "text_encoder", "CLIPTextModel") is None, "which is loaded as usual"
    denoiser = checkpoint.stored_denoiser(half / "unet")
    assert dtype_of("unet", Settings(), denoiser) is torch.float16
    assert dtype_of("unet", Settings(dtype="fp32"), denoiser) is torch.float32


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "is truncated or altered"),
        (lambda file: file.unlink(), "is missing"),
        (lambda file: _change(file, lambda state: state.pop("proj_out.bias")), "proj_out.bias is in no weight file"),
        (lambda file: _change(file, lambda state: state.update(x=torch.ones(1))), "x does not belong to this model"),
    ],
)
def test_a_damaged_checkpoint_is_named(
    sd3_folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    copy = _copied(sd3_folder, tmp_path)
    damage(copy / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises((BundleError, ModelError), match=message):
        verbs.export(copy, tmp_path / "out", low_memory=True, **SMALL)
    assert not (tmp_path / "out").exists()


def test_shards_and_variants_are_found(sd3_folder: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(sd3_folder, dtype=torch.float16).pipeline
    folder = tmp_path / "transformer"
    pipeline.transformer.save_pretrained(folder, variant="fp16", max_shard_size="20KB")
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.fp16.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    denoiser = checkpoint.stored_denoiser(folder, variant="fp16")
    state = pipeline.transformer.state_dict()
    assert all(torch.equal(values(parameter), state[name]) for name, parameter in denoiser.named_parameters())


def _copied(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def _change(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def _rename(state: dict[str, torch.Tensor]) -> None:
    for name in list(state):
        state[f"text_model.{name}"] = state.pop(name)
