"""Tiny random diffusers pipelines and the bundles made of them; everything heavy is imported when it is used.

Pipelines share networks, and a network is exported once.
"""

import copy
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CAPTIONS = (
    "a large red circle above a small blue square",
    "a small green triangle",
    "two yellow stars, left of a purple ring",
    "It's  an ODD\tcaption: 42 pieces!",
)


def clip_tokenizer(**options: Any) -> Any:
    """A CLIP tokenizer whose merges are learned from the captions."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(CAPTIONS, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=16, **options)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    words = sorted({piece for caption in CAPTIONS for piece in caption.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in words] + [(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


@functools.cache
def clip(*, width: int, projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width + 4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


@functools.cache
def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    ).eval()


def vae(**options: Any) -> Any:
    """The same weights under another configuration."""
    view = copy.copy(_vae())
    view.register_to_config(**options)
    return view


@functools.cache
def t5_encoder() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


@functools.cache
def sd3_transformer() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=28,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    ).eval()


def sd3_pipeline(*, t5: bool = False) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    tokenizer, second = clip_tokenizer(), clip_tokenizer(pad_token="!")
    return StableDiffusion3Pipeline(
        transformer=sd3_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=clip(width=8, projection=True),
        tokenizer=tokenizer,
        text_encoder_2=clip(width=12, projection=True),
        tokenizer_2=second,
        text_encoder_3=t5_encoder() if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    )


def unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        **options,
    ).eval()


def sd_pipeline() -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        unet=unet(cross_attention_dim=12),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        vae=vae(),
        text_encoder=clip(width=12, projection=False),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer, second = clip_tokenizer(), clip_tokenizer(pad_token="!")
    return StableDiffusionXLPipeline(
        unet=unet(
            cross_attention_dim=24,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=16 + 6 * 4,
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
        ),
        vae=vae(scaling_factor=0.13),
        text_encoder=clip(width=12, projection=False),
        tokenizer=tokenizer,
        text_encoder_2=clip(width=12, projection=True),
        tokenizer_2=second,
        add_watermarker=False,
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd3": sd3_pipeline,
    "sd3_t5": lambda: sd3_pipeline(t5=True),
    "sd": sd_pipeline,
    "sdxl": sdxl_pipeline,
}


def write_bundle(pipeline: Any, folder: Path, *, sparsity: str = "dense") -> Path:
    """What `obsdiff export` leaves, without engines."""
    from obsdiff.families.table import family_of
    from obsdiff_runtime.bundle import ComponentEntry, Defaults, Manifest, TensorEntry, write_manifest

    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    family = family_of(denoiser)
    components = {}
    for component in family.components(pipeline, height=32, width=32):
        model = _exported(component, folder / component.name)
        inputs, outputs = (
            tuple(TensorEntry(name=port.name, dtype=port.dtype, shape=port.shape) for port in ports)
            for ports in (model.inputs, model.outputs)
        )
        components[component.name] = ComponentEntry(
            onnx=f"{component.name}/model.onnx", dtype=model.dtype, inputs=inputs, outputs=outputs
        )
    pipeline.save_config(folder)
    for name in ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3"):
        if getattr(pipeline, name, None) is not None:
            getattr(pipeline, name).save_pretrained(folder / name)
    write_manifest(
        folder,
        Manifest(
            created_by="a test",
            family=family.name,
            pipeline_class=type(pipeline).__name__,
            sparsity=sparsity,
            defaults=Defaults(height=32, width=32, num_inference_steps=4, guidance_scale=3.0, max_sequence_length=5),
            components=components,
        ),
    )
    return folder


_EXPORTED: dict[tuple[str, int], Any] = {}


def _exported(component: Any, folder: Path) -> Any:
    """An OnnxModel; a network that was exported for another bundle is copied."""
    import torch

    from obsdiff_export.onnx import export

    key = (component.name.removesuffix("_2"), next(component.module.parameters()).data_ptr())
    if key not in _EXPORTED:
        _EXPORTED[key] = export(component, folder, dtype=torch.float32)
    else:
        shutil.copytree(_EXPORTED[key].path.parent, folder)
        (folder / "config.json").write_text(json.dumps(component.config))
    return _EXPORTED[key]


@pytest.fixture(scope="session", params=list(PIPELINES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny random diffusers pipeline and its bundle, one pair for each way of sampling."""
    return _pair(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def sd_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("sd", tmp_path_factory)


@pytest.fixture(scope="session")
def sd3_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _pair("sd3", tmp_path_factory)[1]


_PAIRS: dict[str, tuple[Any, Path]] = {}


def _pair(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    import torch

    if name not in _PAIRS:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        pipeline = PIPELINES[name]()
        pipeline.set_progress_bar_config(disable=True)
        _PAIRS[name] = pipeline, write_bundle(pipeline, tmp_path_factory.mktemp(name) / "bundle")
    return _PAIRS[name]


@pytest.fixture
def make_clip_tokenizer() -> Callable[..., Any]:
    return clip_tokenizer


@pytest.fixture
def make_t5_tokenizer() -> Callable[[], Any]:
    return t5_tokenizer
