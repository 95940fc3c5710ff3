"""What a model's name can mean, and the one clear line for everything else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines import pipeline_loading_utils
from torch import Tensor, nn

import obsdiff
from obsdiff import checkpoint
from obsdiff.defaults import Defaults, defaults_of, vae_scale
from obsdiff.families import guided, usual_scale
from obsdiff.families.table import FAMILIES, family_of
from obsdiff.loading import load_configs, load_pipeline, shipped_pipeline
from obsdiff.manifest import GroupCut, PrunedManifest
from obsdiff.shrinking import shrink
from obsdiff_runtime.errors import ModelError
from obsdiff_runtime.labels import Labels

HEADS = "transformer_blocks.1.attn.heads"


@pytest.fixture
def copied(sd3_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd3_folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, sd3_folder: Path) -> Path:
    pipeline = checkpoint.assemble(sd3_folder, {}, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("pruned") / "cut"
    manifest = PrunedManifest(family="sd3", sparsity="heads:0.5", groups={HEADS: GroupCut(units=4, kept=(0, 3))})
    shrink(pipeline.transformer, family_of("SD3Transformer2DModel"), manifest.keep)
    checkpoint.save(pipeline, pipeline.transformer, folder, manifest, source=sd3_folder)
    return folder


def test_a_pipeline_without_t5_loads_and_keeps_null_components_null(
    sd3_folder: Path, build_pipeline: Callable[..., Any], denoise: Callable[[nn.Module], Tensor]
) -> None:
    loaded = load_pipeline(sd3_folder)
    assert loaded.pipeline.text_encoder_3 is None
    assert loaded.family.name == "sd3"
    assert loaded.manifest is None
    assert torch.equal(denoise(loaded.denoiser), denoise(build_pipeline("sd3").transformer))
    assert not any(module.training for module in (loaded.denoiser, loaded.pipeline.vae, loaded.pipeline.text_encoder))


def test_a_pruned_checkpoint_is_known_by_its_manifest(pruned: Path) -> None:
    loaded = load_pipeline(str(pruned))
    assert loaded.manifest is not None
    assert loaded.manifest.sparsity == "heads:0.5"
    assert loaded.denoiser.get_submodule("transformer_blocks.1.attn").heads == 2


def test_weights_keep_the_precision_they_are_stored_in(copied: Path) -> None:
    half = load_pipeline(copied, dtype=torch.float16)
    half.denoiser.save_pretrained(copied / "transformer")
    loaded = load_pipeline(copied)
    assert loaded.denoiser.dtype == loaded.pipeline.text_encoder.dtype == torch.float16
    assert load_pipeline(copied, dtype=torch.float32).denoiser.dtype == torch.float32


def test_a_variant_is_loaded_where_it_is_asked_for(copied: Path) -> None:
    pipeline = checkpoint.assemble(copied, {}, dtype=torch.float32)
    shutil.rmtree(copied)
    pipeline.save_pretrained(copied, variant="fp16")
    assert load_pipeline(copied, variant="fp16").family.name == "sd3"
    with pytest.raises(ModelError, match="holds no weights as safetensors"):
        load_pipeline(copied)
    with pytest.raises(ModelError, match="no weights of variant bf16"):
        load_pipeline(copied, variant="bf16")


@pytest.mark.parametrize("load", [load_pipeline, load_configs])
@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere", "a/b/c", r"C:\models\sd3"])
def test_a_path_to_nothing_is_an_error_without_asking_the_hub(load: Callable[..., Any], name: str) -> None:
    with pytest.raises(ModelError, match="there is no such folder"):
        load(name)


@pytest.mark.parametrize("load", [load_pipeline, load_configs])
def test_an_empty_name_is_an_error_and_not_this_folder(load: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="name is empty"):
        load("")


@pytest.mark.parametrize("load", [load_pipeline, load_configs])
def test_a_model_that_cannot_be_fetched_is_an_error_that_says_what_to_do(load: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match=r"obsdiff-tests/nowhere is neither a folder here nor .*unset HF_HUB_OFFLINE"):
        load("obsdiff-tests/nowhere", local_files_only=True)


def test_a_folder_without_an_index_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is no diffusers pipeline: it holds no model_index.json"):
        load_pipeline(tmp_path)


def test_a_single_file_is_an_error_that_says_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "sd.safetensors").touch()
    with pytest.raises(ModelError, match=r"obsdiff convert .*sd.safetensors --base MODEL -o FOLDER"):
        load_pipeline(tmp_path / "sd.safetensors")


def edit_index(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("load", [load_pipeline, load_configs])
def test_a_denoiser_unknown_to_diffusers_is_an_error_with_the_list(load: Callable[..., Any], copied: Path) -> None:
    edit_index(copied, _class_name="SanaPipeline", transformer=["diffusers", "SomeTransformer2DModel"])
    with pytest.raises(ModelError, match=r"SomeTransformer2DModel is no denoiser of a known family.*sd3.*unet"):
        load(copied)


def test_a_pipeline_class_that_does_not_exist_is_an_error(copied: Path) -> None:
    edit_index(copied, _class_name="SomePipeline")
    with pytest.raises(ModelError, match="has no pipeline SomePipeline"):
        load_pipeline(copied)


def test_an_index_that_is_no_json_is_an_error(copied: Path) -> None:
    (copied / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match=r"model_index\.json is unreadable"):
        load_pipeline(copied)


def test_a_pipeline_without_denoiser_is_an_error(copied: Path) -> None:
    edit_index(copied, transformer=[None, None])
    with pytest.raises(ModelError, match="has no denoiser"):
        load_pipeline(copied)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", "transformer holds no weights as safetensors"),
        ("text_encoder_2/model.safetensors", "cannot be loaded: .*model.safetensors"),
        ("transformer/config.json", "config.json"),
        ("vae", "lists vae, but there is no such folder"),
    ],
)
def test_what_is_missing_is_named(missing: str, message: str, copied: Path) -> None:
    path = copied / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ModelError, match=message):
        load_pipeline(copied)


def test_pickled_weights_are_not_read(copied: Path) -> None:
    path = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(ModelError, match="pickled ones are not read"):
        load_pipeline(copied)


def test_a_truncated_weight_file_is_an_error(copied: Path) -> None:
    path = copied / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"truncated or altered|cannot be loaded"):
        load_pipeline(copied)


def test_a_truncated_denoiser_is_an_error(copied: Path) -> None:
    path = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match="truncated or altered"):
        load_pipeline(copied)


def test_defaults_come_from_diffusers(sd3_folder: Path, sd15_folder: Path) -> None:
    assert load_pipeline(sd3_folder).defaults == Defaults(
        height=32, width=32, num_inference_steps=28, guidance_scale=7.0, max_sequence_length=256
    )
    assert load_pipeline(sd15_folder).defaults == Defaults(
        height=32, width=32, num_inference_steps=50, guidance_scale=7.5
    )


def test_the_guidance_of_z_image_is_counted_as_its_pipeline_counts_it() -> None:
    loaded = load_configs(Path(__file__).parent / "configs" / "z_image_turbo.json")
    assert defaults_of(None, loaded.configs) == Defaults(
        height=1024, width=1024, num_inference_steps=50, guidance_scale=5.0, max_sequence_length=512
    )
    assert usual_scale(loaded.family, 5.0) == 6.0
    assert [guided(loaded.family, loaded.denoiser, scale) for scale in (0.0, 0.5)] == [False, True]
    assert usual_scale(family_of("SD3Transformer2DModel"), 5.0) == 5.0


def test_the_guidance_of_qwen_image_is_that_by_negative_prompts() -> None:
    configs = load_configs(Path(__file__).parent / "configs" / "qwen_image.json").configs
    assert defaults_of(None, configs) == Defaults(
        height=1024, width=1024, num_inference_steps=50, guidance_scale=4.0, max_sequence_length=512
    )


def test_a_pipelines_own_defaults_go_first(copied: Path) -> None:
    own = {"height": 48, "guidance_scale": 3.5, "max_sequence_length": 1, "prompts": "shapes"}
    (copied / "obsdiff_defaults.json").write_text(json.dumps(own))
    assert load_pipeline(copied).defaults == Defaults(
        height=48, width=32, num_inference_steps=28, guidance_scale=3.5, max_sequence_length=1, prompts="shapes"
    )
    (copied / "obsdiff_defaults.json").write_text('{"hieght": 48}')
    with pytest.raises(ModelError, match="unknown key hieght"):
        load_pipeline(copied)


def test_configurations_are_enough_to_plan_with(copied: Path) -> None:
    for weights in copied.rglob("*.safetensors"):
        weights.unlink()
    denoiser, family, configs, _ = load_configs(copied)
    assert family.name == "sd3"
    assert all(parameter.is_meta for parameter in denoiser.parameters())
    assert set(configs) == {"model_index", "transformer", "vae", "scheduler", "text_encoder", "text_encoder_2"} | {
        name for name in configs if name.startswith("tokenizer")
    }
    assert vae_scale(configs) == 2
    assert defaults_of(copied, configs).height == 32


@pytest.mark.parametrize("name", ["transformer", "transformer/config.json"])
def test_a_bare_denoiser_is_enough_to_plan_with(name: str, sd3_folder: Path) -> None:
    denoiser, family, configs, _ = load_configs(sd3_folder / name)
    assert len(family.groups(denoiser)) == len(family.groups(load_configs(sd3_folder).denoiser))
    assert defaults_of(None, configs).num_inference_steps == 28
    assert vae_scale(configs) == 8


def test_a_configuration_may_have_any_name(sd3_folder: Path, tmp_path: Path) -> None:
    file = Path(shutil.copyfile(sd3_folder / "transformer" / "config.json", tmp_path / "sd3_small.json"))
    assert load_configs(file).family.name == "sd3"
    with pytest.raises(ModelError, match="it holds no model_index"):
        load_pipeline(file)


@pytest.mark.parametrize(("kind", "steps"), [("sana", 20), ("sana_sprint", 2)])
def test_a_bare_sana_takes_the_steps_of_the_pipeline_that_tells_it_its_guidance(
    kind: str, steps: int, build_denoiser: Callable[..., Any], tmp_path: Path
) -> None:
    build_denoiser(kind).save_config(tmp_path)
    defaults = defaults_of(None, load_configs(tmp_path).configs)
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (steps, 4.5)


def test_a_sampler_that_sana_sprint_does_not_draw_by_is_refused(
    build_pipeline: Callable[..., Any], tmp_path: Path
) -> None:
    pipeline = build_pipeline("sana_sprint")
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ModelError, match="draws by SCMScheduler alone, not by FlowMatchEulerDiscreteScheduler"):
        obsdiff.prune(pipeline, sparsity="2:4", prompts=["a cat"])
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="draws by SCMScheduler alone"):
        load_configs(tmp_path)


def test_a_bare_sana_stands_for_thirty_two_pixels_a_side(build_denoiser: Callable[..., Any], tmp_path: Path) -> None:
    build_denoiser("sana").save_config(tmp_path)
    assert vae_scale(load_configs(tmp_path).configs) == 32


def test_a_bare_flux2_stands_for_patches_of_sixteen_pixels_a_side(
    build_denoiser: Callable[..., Any], tmp_path: Path
) -> None:
    build_denoiser("flux2").save_config(tmp_path)
    configs = load_configs(tmp_path).configs
    assert vae_scale(configs) == 16
    assert (defaults_of(None, configs).height, defaults_of(None, configs).width) == (1024, 1024)


def test_a_bundle_s_autoencoder_says_how_many_pixels_a_latent_pixel_stands_for(
    sd3_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sd3_folder, tmp_path / "bundle"))
    (folder / "vae").rename(folder / "vae_decoder")
    assert vae_scale(load_configs(folder).configs) == vae_scale(load_configs(sd3_folder).configs) == 2


def test_a_folder_that_is_neither_pipeline_nor_denoiser_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a diffusers pipeline"):
        load_configs(tmp_path)


def test_configurations_of_a_pruned_checkpoint_include_its_cuts(pruned: Path) -> None:
    denoiser, family, *_ = load_configs(pruned)
    units = {group.name: group.units for group in family.groups(denoiser)}
    assert units[HEADS] == 2


def test_a_name_on_the_hub_is_fetched_and_loaded_from_the_cache(pruned: Path, stand_in: Callable[..., Any]) -> None:
    asked = stand_in(pruned)
    assert load_pipeline("someone/sd3", revision="main").manifest is not None
    (fetched,) = asked
    assert (fetched["model"], fetched["revision"], fetched["use_safetensors"]) == ("someone/sd3", "main", True)
    assert load_configs("someone/sd3").family.name == "sd3"


def test_pickled_weights_on_the_hub_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(model: str, *, use_safetensors: bool, variant: str | None, **_: Any) -> None:
        files = {"transformer/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin"}
        pipeline_loading_utils._get_ignore_patterns(  # diffusers' own message
            [], ["transformer", "vae"], list(files), use_safetensors, False, False, False, False, variant
        )

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    with pytest.raises(ModelError, match=r"facebook/DiT has no weights as safetensors .* convert them with save_pret"):
        load_pipeline("facebook/DiT")


def test_the_shipped_pipeline_is_named() -> None:
    assert shipped_pipeline().name == "shapes"


def test_alpha_s_published_class_name_is_pixart_s(build_pipeline: Callable[..., Any], tmp_path: Path) -> None:
    build_pipeline("pixart").save_pretrained(tmp_path)
    edit_index(tmp_path, transformer=["diffusers", "Transformer2DModel"])
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "Transformer2DModel"}))
    loaded = load_pipeline(tmp_path)
    assert loaded.family.name == load_configs(tmp_path).family.name == "pixart"
    assert type(loaded.denoiser).__name__ == type(load_configs(path).denoiser).__name__ == "PixArtTransformer2DModel"
    assert loaded.defaults == Defaults(
        height=256, width=256, num_inference_steps=20, guidance_scale=4.5, max_sequence_length=120
    )
    assert loaded.family.text_tokens(load_configs(tmp_path).configs, None) == 120


def test_a_transformer_without_text_is_no_pixart(tmp_path: Path) -> None:
    config = {"_class_name": "Transformer2DModel", "norm_type": "layer_norm", "in_channels": 32, "num_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load_configs(tmp_path)
    with pytest.raises(ModelError, match="this Transformer2DModel does not look at a text"):
        found.family.linears(found.denoiser)


def test_dit_s_published_class_name_is_its_own_by_its_norms(build_pipeline: Callable[..., Any], tmp_path: Path) -> None:
    build_pipeline("dit").save_pretrained(tmp_path)
    names = {"0": "tench, Tinca tinca", "207": "golden retriever"}
    edit_index(tmp_path, transformer=["diffusers", "Transformer2DModel"], id2label=names)
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "Transformer2DModel"}))
    loaded = load_pipeline(tmp_path)
    assert loaded.family.name == load_configs(tmp_path).family.name == load_configs(path).family.name == "dit"
    assert type(loaded.denoiser).__name__ == type(load_configs(path).denoiser).__name__ == "DiTTransformer2DModel"
    labels = Labels(count=1000, numbers={"tench": 0, "Tinca tinca": 0, "golden retriever": 207})
    assert loaded.defaults == Defaults(height=32, width=32, num_inference_steps=50, guidance_scale=4.0, labels=labels)


def test_names_of_classes_that_there_are_not_are_refused(build_pipeline: Callable[..., Any], tmp_path: Path) -> None:
    build_pipeline("dit").save_pretrained(tmp_path)
    edit_index(tmp_path, id2label={"1000": "nothing"})
    with pytest.raises(
        ModelError, match=r"id2label of model_index.json gives no names of one of 1000 classes by '1000'"
    ):
        load_pipeline(tmp_path)


def test_a_dit_of_other_classes_than_its_pipeline_guides_by_is_refused(build_denoiser: Callable[..., Any]) -> None:
    denoiser = build_denoiser("dit", num_embeds_ada_norm=10)
    with pytest.raises(ModelError, match="has 10 classes, and diffusers' pipeline guides by class 1000"):
        FAMILIES["dit"].linears(denoiser)
