"""Single files of tiny models, by the names that such files have: the folder holds the same weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import obsdiff
from networks import layouts
from networks.whole.pipelines import PIPELINES
from obsdiff import single_files
from obsdiff.cli import app
from obsdiff.loading import load_configs, load_pipeline
from obsdiff_runtime.errors import ConfigError, ModelError

WHOLE: dict[str, Callable[[DiffusionPipeline], dict[str, Tensor]]] = {
    "sd15": lambda pipe: (
        layouts.unet(pipe.unet)
        | layouts.autoencoder(pipe.vae)
        | layouts.clip(pipe.text_encoder, "cond_stage_model.transformer.")
    ),
    "sdxl": lambda pipe: (
        layouts.unet(pipe.unet)
        | layouts.autoencoder(pipe.vae)
        | layouts.clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        | layouts.open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    ),
    "sd3": lambda pipe: (
        layouts.mmdit(pipe.transformer)
        | layouts.autoencoder(pipe.vae)
        | layouts.clip(pipe.text_encoder_2, "text_encoders.clip_g.transformer.")
    ),
}


def written(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def base_of(kind: str, folder: Path) -> Path:
    """The same architecture with other weights."""
    torch.manual_seed(7)
    pipeline = PIPELINES[kind]()
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            for parameter in component.parameters():
                torch.nn.init.normal_(parameter)
    pipeline.save_pretrained(folder)
    return folder


def differing(first: nn.Module, second: nn.Module) -> list[str]:
    left, right = first.state_dict(), second.state_dict()
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_model_comes_with_its_own_weights(kind: str, build_pipeline: Any, tmp_path: Path) -> None:
    pipeline = build_pipeline(kind)
    tensors = WHOLE[kind](pipeline) | {"model_ema.decay": torch.ones(1)}
    file = written(tensors, tmp_path / "tuned.safetensors")
    base = base_of(kind, tmp_path / "base")
    found = obsdiff.convert(file, base, tmp_path / "out")
    loaded = load_pipeline(tmp_path / "out").pipeline
    networks = [name for name, each in pipeline.components.items() if isinstance(each, nn.Module)]
    own = set(networks) - ({"text_encoder"} if kind == "sd3" else set())  # the file has the second one alone
    assert set(found.taken) == own
    assert found.left_out == 1
    for name in networks:
        assert (differing(getattr(loaded, name), getattr(pipeline, name)) == []) == (name in own), name
    assert not differing(getattr(loaded, found.taken[0]), getattr(pipeline, found.taken[0]))
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_class_name"] == type(pipeline).__name__


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("kind", ["sd15", "sd3", "pixart", "qwen"])
def test_a_denoiser_alone_is_read_with_any_prefix(kind: str, prefix: str, build_pipeline: Any, tmp_path: Path) -> None:
    pipeline = build_pipeline(kind)
    name = "unet" if kind == "sd15" else "transformer"
    module = getattr(pipeline, name)
    layout = {"sd15": layouts.unet, "sd3": layouts.mmdit}.get(kind, diffusers_names)
    file = written(layout(module, prefix), tmp_path / "tuned.safetensors")
    base = base_of(kind, tmp_path / "base")
    found = obsdiff.convert(file, base, tmp_path / "out")
    assert (found.taken, found.left_out, found.dtype) == ((name,), 0, "float32")
    assert not differing(getattr(load_pipeline(tmp_path / "out").pipeline, name), module)
    for path in (file for file in base.rglob("*") if file.is_file() and file.parent.name != name):
        assert (tmp_path / "out" / path.relative_to(base)).read_bytes() == path.read_bytes(), path


def diffusers_names(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


def test_denoisers_that_take_turns_come_from_a_file_each(build_pipeline: Any, tmp_path: Path) -> None:
    pipeline = build_pipeline("wan22")
    names = ("transformer", "transformer_2")
    first, second = (
        written(diffusers_names(getattr(pipeline, name), "model.diffusion_model."), tmp_path / f"{name}.safetensors")
        for name in names
    )
    assert differing(pipeline.transformer, pipeline.transformer_2)
    base = base_of("wan22", tmp_path / "base")
    found = obsdiff.convert(first, base, tmp_path / "out", second=second)
    assert (found.taken, found.left_out) == (names, 0)
    loaded = load_pipeline(tmp_path / "out").pipeline
    for name in names:
        assert not differing(getattr(loaded, name), getattr(pipeline, name))


@pytest.mark.parametrize("layout", [layouts.mmdit, diffusers_names])
@pytest.mark.parametrize(
    ("stored", "computed"),
    [(torch.float16, "float16"), (torch.bfloat16, "bfloat16"), (torch.float8_e4m3fn, "bfloat16")],
)
def test_weights_keep_their_precision_and_those_of_eight_bits_are_widened(
    stored: torch.dtype, computed: str, layout: Any, build_pipeline: Any, tmp_path: Path
) -> None:
    pipeline = build_pipeline("sd3")
    tensors = {
        name: tensor.to(stored) for name, tensor in layout(pipeline.transformer, "model.diffusion_model.").items()
    }
    file = written(tensors, tmp_path / "tuned.safetensors")
    found = obsdiff.convert(file, base_of("sd3", tmp_path / "base"), tmp_path / "out")
    assert found.dtype == computed
    wanted = pipeline.transformer.to(stored).to(getattr(torch, computed))
    assert not differing(load_pipeline(tmp_path / "out").pipeline.transformer, wanted)


def test_weights_that_are_stored_wider_than_others_stay_so(build_pipeline: Any, tmp_path: Path) -> None:
    module = build_pipeline("wan").transformer
    for name, parameter in module.named_parameters():
        if "norm" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    file = written(diffusers_names(module, ""), tmp_path / "tuned.safetensors")
    found = obsdiff.convert(file, base_of("wan", tmp_path / "base"), tmp_path / "out")
    assert found.dtype == "bfloat16"
    stored = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16, torch.float32}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in module.state_dict().items())


def test_memory_that_runs_out_is_not_taken_for_another_model(
    build_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] can't allocate memory: you tried to allocate 8 bytes")

    file = written(layouts.unet(build_pipeline("sd15").unet), tmp_path / "tuned.safetensors")
    monkeypatch.setattr(single_files, "load_single_file_sub_model", full)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        obsdiff.convert(file, base_of("sd15", tmp_path / "base"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_is_pruned_like_any_folder(build_pipeline: Any, tmp_path: Path) -> None:
    file = written(WHOLE["sd15"](build_pipeline("sd15")), tmp_path / "tuned.safetensors")
    obsdiff.convert(file, base_of("sd15", tmp_path / "base"), tmp_path / "out")
    load_configs(tmp_path / "out")
    how = {"steps": 2, "height": 32, "width": 32, "num_samples": 2}
    pruned = obsdiff.prune(str(tmp_path / "out"), sparsity="2:4", prompts=["a", "b"], **how)
    assert pruned.layers


@pytest.mark.parametrize(
    ("marks", "told"),
    [
        (("v_pred",), ("prediction_type",)),
        (("v_pred", "ztsnr"), ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")),
    ],
)
def test_what_a_unet_predicts_is_told_to_the_scheduler(
    marks: tuple[str, ...], told: tuple[str, ...], build_pipeline: Any, tmp_path: Path
) -> None:
    tensors = layouts.unet(build_pipeline("sd15").unet) | {mark: torch.zeros(0) for mark in marks}
    file = written(tensors, tmp_path / "tuned.safetensors")
    found = obsdiff.convert(file, base_of("sd15", tmp_path / "base"), tmp_path / "out")
    assert (found.told, found.left_out) == (told, 0)
    scheduler = load_pipeline(tmp_path / "out").pipeline.scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.rescale_betas_zero_snr == ("ztsnr" in marks)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"lora_unet_down.lora_up.weight": torch.ones(2)}, "is a LoRA, no model: obsdiff lora"),
        ({"a.weight": torch.ones(2), "a.scale_weight": torch.ones(1)}, "quantised .a.scale_weight"),
        ({"a.weight": torch.ones(2, dtype=torch.uint8)}, "integers: it is quantised"),
        ({"a.weight": torch.ones(2)}, "holds no transformer of .*; is that what it was made from"),
    ],
)
def test_what_is_no_model_of_that_base_is_refused(
    tensors: dict[str, Tensor], says: str, build_pipeline: Any, tmp_path: Path
) -> None:
    build_pipeline("sd3").save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=says):
        obsdiff.convert(written(tensors, tmp_path / "x.safetensors"), tmp_path / "base", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "x.safetensors"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop("model.diffusion_model.joint_blocks.1.x_block.mlp.fc2.bias"), "fc2.bias"),
        (lambda tensors: tensors.update({"model.diffusion_model.final_layer.linear.bias": torch.ones(3)}), "shape"),
    ],
)
def test_what_lacks_a_weight_or_has_another_shape_is_refused(
    change: Callable[[Any], Any], says: str, build_pipeline: Any, tmp_path: Path
) -> None:
    pipeline = build_pipeline("sd3")
    pipeline.save_pretrained(tmp_path / "base")
    tensors = layouts.mmdit(pipeline.transformer)
    change(tensors)
    with pytest.raises(ModelError, match=says):
        obsdiff.convert(written(tensors, tmp_path / "x.safetensors"), tmp_path / "base", tmp_path / "out")


def test_a_unet_that_lacks_a_weight_is_refused(build_pipeline: Any, tmp_path: Path) -> None:
    pipeline = build_pipeline("sd15")
    pipeline.save_pretrained(tmp_path / "base")
    tensors = layouts.unet(pipeline.unet)
    del tensors["model.diffusion_model.middle_block.1.norm.weight"]
    with pytest.raises(ModelError, match=r"holds no unet of .*some of its weights are missing"):
        obsdiff.convert(written(tensors, tmp_path / "x.safetensors"), tmp_path / "base", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.ckpt", b"", "no safetensors file; pickled ones are not read"),
        ("x.gguf", b"", "GGUF files hold quantised weights"),
        ("x.safetensors", b"\x08\0\0\0\0\0\0\0{", "truncated or no safetensors file"),
        (None, b"", "there is no such file"),
    ],
)
def test_what_is_no_file_of_weights_is_refused(name: str | None, content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / (name or "x.safetensors")
    if name is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=says):
        obsdiff.convert(path, tmp_path / "base", tmp_path / "out")


def test_of_a_base_on_the_hub_only_what_is_lacking_is_fetched(
    build_pipeline: Any, stand_in: Callable[..., Any], tmp_path: Path
) -> None:
    pipeline = build_pipeline("sd15")
    file = written(layouts.unet(pipeline.unet) | layouts.autoencoder(pipeline.vae), tmp_path / "tuned.safetensors")
    base = base_of("sd15", tmp_path / "base")
    for name in ("unet", "vae"):
        (base / name / "diffusion_pytorch_model.safetensors").unlink()
    asked = stand_in(base)
    obsdiff.convert(file, "someone/sd15", tmp_path / "out", revision="main")
    (fetched,) = asked
    assert (fetched["model"], fetched["revision"]) == ("someone/sd15", "main")
    assert fetched["unet"] is fetched["vae"] is None
    assert "text_encoder" not in fetched
    assert not differing(load_pipeline(tmp_path / "out").pipeline.unet, pipeline.unet)


def test_a_base_without_the_weights_that_the_file_lacks_is_refused(build_pipeline: Any, tmp_path: Path) -> None:
    pipeline = build_pipeline("sd15")
    base = base_of("sd15", tmp_path / "base")
    encoder = base / "text_encoder"
    (encoder / "model.safetensors").rename(encoder / "model.fp16.safetensors")
    with pytest.raises(ModelError, match=r"text_encoder holds no weights as safetensors, or of a variant only"):
        obsdiff.convert(written(layouts.unet(pipeline.unet), tmp_path / "x.safetensors"), base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_came_from_where(build_pipeline: Any, tmp_path: Path) -> None:
    marks = {"v_pred": torch.zeros(0), "model_ema.decay": torch.ones(1)}
    file = written(WHOLE["sd15"](build_pipeline("sd15")) | marks, tmp_path / "tuned.safetensors")
    base = base_of("sd15", tmp_path / "base")
    arguments = ["convert", str(file), "--base", str(base), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"{tmp_path / 'out'}: unet, vae, text_encoder as given, in float32"
    assert lines[1] == "the rest is the base's: scheduler, tokenizer"
    assert lines[2:4] == [
        "note the file sets prediction_type of the scheduler",
        "note tensors of the file that belong to none of these: 1",
    ]
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "exists; choose another folder" in again.stderr


def test_the_base_must_be_dense_and_have_as_many_denoisers(build_pipeline: Any, tmp_path: Path) -> None:
    file = written({"a.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="no such folder"):
        obsdiff.convert(file, tmp_path / "base", tmp_path / "out")
    build_pipeline("wan22").save_pretrained(tmp_path / "two")
    with pytest.raises(ConfigError, match="has transformer and transformer_2: give a file of each, with --second"):
        obsdiff.convert(file, tmp_path / "two", tmp_path / "out")
    build_pipeline("wan").save_pretrained(tmp_path / "one")
    with pytest.raises(ConfigError, match="has transformer: leave --second out"):
        obsdiff.convert(file, tmp_path / "one", tmp_path / "out", second=file)
    how = {"steps": 2, "height": 32, "width": 32, "num_samples": 2, "method": "magnitude"}
    obsdiff.save(obsdiff.prune(build_pipeline("sd15"), sparsity="2:4", prompts=["a"], **how), tmp_path / "pruned")
    with pytest.raises(ConfigError, match="it is pruned; name the dense model that x"):
        obsdiff.convert(file, tmp_path / "pruned", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists; choose another folder"):
        obsdiff.convert(file, tmp_path / "pruned", tmp_path / "out")
