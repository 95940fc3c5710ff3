"""Pruned checkpoints: what is saved comes back, and what was altered is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kinds import EVERY
from obsdiff import checkpoint
from obsdiff.families.table import family_of
from obsdiff.manifest import GroupCut, LinearRecord, PrunedManifest, read_manifest
from obsdiff.shrinking import shrink
from obsdiff_runtime.errors import BundleError, CompatibilityError, ConfigError

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
MANIFEST = "transformer/obsdiff.json"


def two_of_four(denoiser: nn.Module) -> dict[str, LinearRecord]:
    """Changes the denoiser: the first two of every four inputs of each linear become zero."""
    records = {}
    for linear in family_of(denoiser).linears(denoiser):
        if linear.in_features % 4 == 0:
            weight = denoiser.get_submodule(linear.name).weight
            assert isinstance(weight, nn.Parameter)
            weight.data.view(linear.out_features, -1, 4)[..., :2] = 0
            records[linear.name] = LinearRecord(pattern="2:4", loss=0.25, zeros=0.5)
    return records


def halve(denoiser: nn.Module) -> dict[str, GroupCut]:
    """Changes the denoiser: every other unit goes, everywhere but in the first block."""
    family = family_of(denoiser)
    cuts = {
        group.name: GroupCut(units=group.units, kept=tuple(range(0, group.units, 2)))
        for group in family.groups(denoiser)
        if group.block > 0
    }
    shrink(denoiser, family, {name: cut.kept for name, cut in cuts.items()})
    return cuts


def save_cut(pipeline: DiffusionPipeline, folder: Path, source: Path | None = None) -> None:
    manifest = PrunedManifest(
        family="sd3",
        sparsity="structured:0.5+2:4",
        groups=halve(pipeline.transformer),
        linears=two_of_four(pipeline.transformer),
        recipe={"seed": 0},
        prompts_sha256="0" * 64,
    )
    checkpoint.save(pipeline, pipeline.transformer, folder, manifest, source=source)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, sd3_folder: Path) -> Path:
    """A pruned checkpoint of the tiny SD3. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("pruned") / "cut"
    pipeline = checkpoint.assemble(sd3_folder, {}, dtype=torch.float32)
    save_cut(pipeline, folder, source=sd3_folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.stage("saved", kind="sd3")
def test_a_cut_and_masked_pipeline_comes_back_bit_by_bit(
    build_pipeline: Callable[..., Any], denoise: Callable[[nn.Module], Tensor], tmp_path: Path
) -> None:
    pipeline = build_pipeline("sd3")
    save_cut(pipeline, tmp_path / "out")
    loaded = checkpoint.load(tmp_path / "out")
    assert torch.equal(denoise(loaded.transformer), denoise(pipeline.transformer))
    assert loaded.text_encoder_3 is None
    assert type(loaded) is type(pipeline)
    assert not any(parameter.is_meta for parameter in loaded.transformer.parameters())


@pytest.mark.stage("saved")
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("sd15", "unet"),
        ("sdxl", "unet"),
        *((kind, "transformer") for kind in EVERY if not kind.startswith("sd") and kind != "pixart_sigma"),
    ],
)
def test_another_family_s_cut_denoiser_comes_back_bit_by_bit(
    kind: str, name: str, build_pipeline: Callable[..., Any], denoise: Callable[[nn.Module], Tensor], tmp_path: Path
) -> None:
    pipeline = build_pipeline(kind)
    denoiser = getattr(pipeline, name)
    manifest = PrunedManifest(family=family_of(denoiser).name, sparsity="structured:0.5", groups=halve(denoiser))
    checkpoint.save(pipeline, denoiser, tmp_path / "out", manifest)
    assert torch.equal(denoise(getattr(checkpoint.load(tmp_path / "out"), name)), denoise(denoiser))


def test_saving_what_was_loaded_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    loaded = checkpoint.load(saved)
    manifest = read_manifest(saved / "transformer")
    checkpoint.save(loaded, loaded.transformer, tmp_path / "copied", manifest, source=saved)
    assert contents(tmp_path / "copied") == contents(saved)
    checkpoint.save(loaded, loaded.transformer, tmp_path / "anew", manifest)
    anew, before = contents(tmp_path / "anew"), contents(saved)
    weights = [name for name in before if name.endswith(".safetensors") or name == "model_index.json"]
    assert {name: anew[name] for name in weights} == {name: before[name] for name in weights}


def test_other_components_are_the_sources_files(saved: Path, sd3_folder: Path) -> None:
    before, after = contents(sd3_folder), contents(saved)
    same = {name for name in before if not name.startswith("transformer/")}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert set(after) == set(before) | {MANIFEST}


def test_nothing_is_pickled_and_no_path_of_this_machine_is_written(saved: Path, sd3_folder: Path) -> None:
    assert {path.suffix for path in saved.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".txt"}
    for name, content in contents(saved).items():
        assert str(sd3_folder.parent).encode() not in content, name


def test_two_of_four_loads_with_plain_diffusers(
    sd15_folder: Path, denoise: Callable[[nn.Module], Tensor], tmp_path: Path
) -> None:
    pipeline = checkpoint.assemble(sd15_folder, {}, dtype=torch.float32)
    manifest = PrunedManifest(family="unet", sparsity="2:4", linears=two_of_four(pipeline.unet))
    checkpoint.save(pipeline, pipeline.unet, tmp_path / "out", manifest, source=sd15_folder)
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    assert torch.equal(denoise(plain.unet), denoise(pipeline.unet))


def test_plain_diffusers_refuses_a_cut_model_instead_of_loading_it_wrongly(saved: Path) -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"shape|size mismatch"):
        SD3Transformer2DModel.from_pretrained(saved / "transformer")


def test_shards_come_back(
    build_denoiser: Callable[..., Any], denoise: Callable[[nn.Module], Tensor], copied: Path
) -> None:
    denoiser = checkpoint.load_denoiser(copied / "transformer")
    (copied / WEIGHTS).unlink()
    denoiser.save_pretrained(copied / "transformer", max_shard_size="30KB")
    shards = sorted((copied / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    assert torch.equal(denoise(checkpoint.load_denoiser(copied / "transformer")), denoise(denoiser))
    shards[1].unlink()
    with pytest.raises(BundleError, match=f"{shards[1].name} is missing"):
        checkpoint.load_denoiser(copied / "transformer")


def test_weights_load_in_another_precision(copied: Path) -> None:
    denoiser = checkpoint.load_denoiser(copied / "transformer", dtype=torch.float16)
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.float16}


def test_a_truncated_weight_file_is_named(copied: Path) -> None:
    data = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError, match=f"{WEIGHTS} is truncated or altered"):
        checkpoint.load(copied)


def test_a_missing_weight_file_is_named(copied: Path) -> None:
    (copied / WEIGHTS).unlink()
    with pytest.raises(BundleError, match=f"{WEIGHTS} is missing"):
        checkpoint.load(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("proj_out.bias"), "tensor proj_out.bias is in no weight file"),
        (lambda state: state.update(extra=torch.zeros(1)), "tensor extra does not belong"),
        (
            lambda state: state.update({"proj_out.bias": torch.zeros(3)}),
            r"proj_out.bias has shape \(3,\), and .*\(16,\)",
        ),
    ],
)
def test_an_altered_tensor_is_named(change: Callable[[Any], None], message: str, copied: Path) -> None:
    state = load_file(copied / WEIGHTS)
    change(state)
    save_file(state, copied / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(BundleError, match=message):
        checkpoint.load(copied)


HEADS = "transformer_blocks.1.attn.heads"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["groups"][HEADS].update(kept=[0, 7]), "not all among its 4"),
        (lambda data: data["groups"][HEADS].update(kept=[2, 0]), "not ascending"),
        (lambda data: data["groups"][HEADS].update(kept=[]), f"groups.{HEADS}.kept"),
        (lambda data: data["groups"][HEADS].update(kept=[0.5]), f"groups.{HEADS}.kept"),
        (lambda data: data["groups"][HEADS].update(units=6), "has 4 units in the config, not 6"),
        (lambda data: data["groups"].update(nowhere={"units": 2, "kept": [0]}), "nowhere: the model has no such group"),
        (lambda data: data["groups"].pop(HEADS), r"tensor transformer_blocks.1.attn.* has shape"),
        (lambda data: data.update(family="nothing"), "unknown family nothing; known are sd3, unet"),
        (lambda data: data.update(family="unet"), "SD3Transformer2DModel is no denoiser of family unet"),
        (lambda data: data.update(surprise=1), "surprise: Extra inputs"),
        (lambda data: data.pop("sparsity"), "sparsity: Field required"),
    ],
)
def test_an_impossible_manifest_is_an_error(change: Callable[[Any], None], message: str, copied: Path) -> None:
    edit(copied / MANIFEST, change)
    with pytest.raises(BundleError, match=message):
        checkpoint.load_denoiser(copied / "transformer")


def test_a_newer_schema_is_incompatible(copied: Path) -> None:
    edit(copied / MANIFEST, lambda data: data.update(schema_version=99, novelty=True))
    with pytest.raises(CompatibilityError, match=r"schema 99.*update obsdiff"):
        checkpoint.load(copied)


def test_a_manifest_that_is_no_json_is_an_error(copied: Path) -> None:
    (copied / MANIFEST).write_text('{"schema_version": 1, "fam')
    with pytest.raises(BundleError, match=r"obsdiff\.json is unreadable"):
        checkpoint.load(copied)


def test_a_folder_without_manifest_is_no_pruned_checkpoint(sd3_folder: Path) -> None:
    with pytest.raises(BundleError, match="is it a pruned checkpoint"):
        checkpoint.load(sd3_folder)


def test_a_manifest_that_does_not_fit_the_weights_is_not_saved(
    build_pipeline: Callable[..., Any], tmp_path: Path
) -> None:
    pipeline = build_pipeline("sd3")
    cut = {HEADS: GroupCut(units=4, kept=(0,))}
    with pytest.raises(BundleError, match="nothing was saved"):
        checkpoint.save(
            pipeline,
            pipeline.transformer,
            tmp_path / "out",
            PrunedManifest(family="sd3", sparsity="heads:0.75", groups=cut),
        )
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(build_pipeline: Callable[..., Any], tmp_path: Path) -> None:
    pipeline = build_pipeline("sd3")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="out exists"):
        checkpoint.save(
            pipeline, pipeline.transformer, tmp_path / "out", PrunedManifest(family="sd3", sparsity="structured:0")
        )


def test_only_plain_safetensors_and_configs_of_the_source_are_copied(
    build_pipeline: Callable[..., Any], sd3_folder: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(sd3_folder, tmp_path / "source"))
    for name in ("model.fp16.safetensors", "pytorch_model.bin", "model.fp16.safetensors.index.json", "model.onnx"):
        (source / "text_encoder" / name).write_bytes(b"x")
    (source / "text_encoder_2" / "model.safetensors").rename(source / "text_encoder_2" / "model.fp16.safetensors")
    (source / "obsdiff_defaults.json").write_text("{}")
    pipeline = build_pipeline("sd3")
    manifest = PrunedManifest(family="sd3", sparsity="structured:0")
    checkpoint.save(pipeline, pipeline.transformer, tmp_path / "out", manifest, source=source)
    for encoder in ("text_encoder", "text_encoder_2"):
        names = sorted(path.name for path in (tmp_path / "out" / encoder).iterdir())
        assert names == ["config.json", "model.safetensors"]
    assert (tmp_path / "out" / "obsdiff_defaults.json").exists()


def test_a_loss_that_was_not_measured_is_null_in_json() -> None:
    record = LinearRecord(pattern="2:4", loss=float("nan"))
    assert json.loads(record.model_dump_json())["loss"] is None


def test_pruning_a_pruned_model_again_is_told_from_the_dense_one_on(
    saved: Path, denoise: Callable[[nn.Module], Tensor], tmp_path: Path
) -> None:
    pipeline = checkpoint.load(saved)
    previous = read_manifest(saved / "transformer")
    cut = {HEADS: GroupCut(units=2, kept=(1,)), "transformer_blocks.0.attn.heads": GroupCut(units=4, kept=(0, 3))}
    again = PrunedManifest(family="sd3", sparsity="heads:0.5", groups=cut).after(previous)
    assert again.groups[HEADS] == GroupCut(units=4, kept=(2,))
    assert again.groups.keys() == previous.groups.keys() | cut.keys()
    shrink(pipeline.transformer, family_of(pipeline.transformer), {name: group.kept for name, group in cut.items()})
    checkpoint.save(pipeline, pipeline.transformer, tmp_path / "again", again, source=saved)
    assert torch.equal(denoise(checkpoint.load(tmp_path / "again").transformer), denoise(pipeline.transformer))
