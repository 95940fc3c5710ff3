"""Tiny random pipelines of every family, built from configurations; no network, no stored files."""

import json
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import eyes
import numpy as np
import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from obsdiff.families import flux
from obsdiff.families.table import family_of
from obsdiff.sampling import velocity_of

TEXT_TOKENS = 12
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
T5_SIZES: dict[str, int] = {
    "vocab_size": 32,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 3,
}


@pytest.fixture(autouse=True)
def _quiet_and_single_threaded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    diffusers_logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test takes engines from the user's cache, nor leaves any there."""
    monkeypatch.setenv("OBSDIFF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def sd3_transformer(**changes: Any) -> SD3Transformer2DModel:
    """Three blocks of 4 heads of 8; the last one drops its text."""
    config: dict[str, Any] = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 24,
        "pos_embed_max_size": 12,
    }
    return SD3Transformer2DModel(**{**config, **changes})


def sd35_transformer(**changes: Any) -> SD3Transformer2DModel:
    """As SD3.5-medium: a second attention in the first blocks, normalised queries and keys."""
    return sd3_transformer(**{"dual_attention_layers": (0, 1), "qk_norm": "rms_norm", **changes})


def sd15_unet(**changes: Any) -> UNet2DConditionModel:
    config: dict[str, Any] = {
        "sample_size": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
    }
    return UNet2DConditionModel(**{**config, **changes})


def sdxl_unet(**changes: Any) -> UNet2DConditionModel:
    config: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 24,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    }
    return sd15_unet(**{**config, **changes})


def flux_transformer(**changes: Any) -> FluxTransformer2DModel:
    """Two joint and two single blocks of 4 heads of 8, distilled with guidance."""
    config: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (2, 2, 4),
        "guidance_embeds": True,
    }
    return FluxTransformer2DModel(**{**config, **changes})


def flux2_transformer(**changes: Any) -> Flux2Transformer2DModel:
    """Two joint and two single blocks of 4 heads of 8, as klein's; dev's is distilled with guidance."""
    config: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 24,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (2, 2, 2, 2),
        "guidance_embeds": False,
    }
    return Flux2Transformer2DModel(**{**config, **changes})


def pixart_transformer(**changes: Any) -> PixArtTransformer2DModel:
    """Three blocks of 4 heads of 12, told its resolution, as alpha's at 1024 pixels."""
    config: dict[str, Any] = {
        "sample_size": 128,
        "num_layers": 3,
        "attention_head_dim": 12,
        "num_attention_heads": 4,
        "cross_attention_dim": 48,
        "caption_channels": 24,
    }
    return PixArtTransformer2DModel(**{**config, **changes})


def pixart_sigma_transformer(**changes: Any) -> PixArtTransformer2DModel:
    """As sigma's: told no resolution."""
    return pixart_transformer(**{"use_additional_conditions": False, "interpolation_scale": 2, **changes})


def auraflow_transformer(**changes: Any) -> AuraFlowTransformer2DModel:
    config: dict[str, Any] = {
        "sample_size": 16,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pos_embed_max_size": 256,
    }
    return AuraFlowTransformer2DModel(**config | changes)


def sana_transformer(**changes: Any) -> SanaTransformer2DModel:
    """Three blocks of 6 heads of 8 over the image and 4 of 12 over the text, and 120 neurons."""
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 6,
        "attention_head_dim": 8,
        "num_layers": 3,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 48,
        "caption_channels": 24,
        "sample_size": 16,
    }
    return SanaTransformer2DModel(**{**config, **changes})


SPRINT: dict[str, Any] = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads", "num_layers": 2}
"""What makes a Sana one that is told its guidance."""


def qwen_transformer(**changes: Any) -> QwenImageTransformer2DModel:
    """Three blocks of 3 heads of 8; the text of the last one goes nowhere."""
    config: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 24,
        "axes_dims_rope": (2, 2, 4),
    }
    return QwenImageTransformer2DModel(**{**config, **changes})


def lumina2_transformer(**changes: Any) -> Lumina2Transformer2DModel:
    """Four blocks of 6 heads of 8 that share 3 keys and values; two of them are refiners, which run in another order
    than that in which they are written down."""
    config: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "hidden_size": 48,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 6,
        "num_kv_heads": 3,
        "multiple_of": 16,
        "ffn_dim_multiplier": 0.5,
        "axes_dim_rope": (4, 2, 2),
        "axes_lens": (300, 64, 64),
        "cap_feat_dim": 24,
    }
    return Lumina2Transformer2DModel(**config | changes)


def hunyuan_transformer(**changes: Any) -> HunyuanDiT2DModel:
    """Four blocks of 4 heads of 8, the last with a skip, told sizes as up to version 1.1."""
    config: dict[str, Any] = {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 16,
        "hidden_size": 32,
        "num_layers": 4,
        "cross_attention_dim": 16,
        "cross_attention_dim_t5": 24,
        "pooled_projection_dim": 16,
        "text_len": 5,
        "text_len_t5": 8,
    }
    return HunyuanDiT2DModel(**{**config, **changes})


def wan_transformer(**changes: Any) -> WanTransformer3DModel:
    """Two blocks of 3 heads of 12, normalised together, and 96 neurons."""
    config: dict[str, Any] = {
        "num_attention_heads": 3,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 16,
        "ffn_dim": 96,
        "num_layers": 2,
    }
    return WanTransformer3DModel(**{**config, **changes})


def wan_i2v_transformer(*, sees: bool = True, **changes: Any) -> WanTransformer3DModel:
    """One whose films begin with a picture, and which is told what an image encoder sees in it, if it `sees`."""
    config = {"image_dim": 16, "added_kv_proj_dim": 36} if sees else {}
    return wan_transformer(**{"in_channels": 12, **config, **changes})


def dit_transformer(**changes: Any) -> DiTTransformer2DModel:
    """Three blocks of 4 heads of 8 and 128 neurons; it also gives a variance. It draws 16 x 16 latents alone."""
    config: dict[str, Any] = {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "sample_size": 16,
        "patch_size": 2,
    }
    return DiTTransformer2DModel(**{**config, **changes})


def zimage_transformer(**changes: Any) -> ZImageTransformer2DModel:
    """Four blocks of 6 heads of 8, two of them refiners, and 128 neurons."""
    config: dict[str, Any] = {
        "in_channels": 4,
        "dim": 48,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 6,
        "n_kv_heads": 6,
        "cap_feat_dim": 24,
        "axes_dims": [4, 2, 2],
        "axes_lens": [300, 64, 64],
    }
    denoiser = ZImageTransformer2DModel(**config | changes)
    for token in (denoiser.x_pad_token, denoiser.cap_pad_token):  # zeros before they are trained
        nn.init.normal_(token)
    return denoiser


DENOISERS: dict[str, Callable[..., nn.Module]] = {
    "sd3": sd3_transformer,
    "sd35": sd35_transformer,
    "sd15": sd15_unet,
    "sdxl": sdxl_unet,
    "flux": flux_transformer,
    "flux2": flux2_transformer,
    "pixart": pixart_transformer,
    "pixart_sigma": pixart_sigma_transformer,
    "auraflow": auraflow_transformer,
    "sana": sana_transformer,
    "sana_sprint": lambda **changes: sana_transformer(**SPRINT | changes),
    "qwen": qwen_transformer,
    "lumina2": lumina2_transformer,
    "hunyuan": hunyuan_transformer,
    "wan": wan_transformer,
    "wan_i2v": wan_i2v_transformer,
    "wan22_i2v": partial(wan_i2v_transformer, sees=False),
    "dit": dit_transformer,
    "zimage": zimage_transformer,
}


def clip_tokenizer() -> CLIPTokenizer:
    """One token a letter."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_TOKENS)


def clip_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    config = T5Config(**T5_SIZES)
    return tokenizer, T5EncoderModel(config).eval()


def bert() -> tuple[BertTokenizer, BertModel]:
    """One token a letter."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return tokenizer, BertModel(config).eval()


def gemma2() -> tuple[GemmaTokenizer, Gemma2Model]:
    """One token a letter; what is none of them is unknown."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)
    config = Gemma2Config(
        vocab_size=len(tokens),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
    )
    return tokenizer, Gemma2Model(config).eval()


def qwen3(
    kind: type[Qwen3ForCausalLM | Qwen3Model] = Qwen3ForCausalLM, hidden_size: int = 8, num_hidden_layers: int = 28
) -> tuple[Qwen2Tokenizer, Qwen3ForCausalLM | Qwen3Model]:
    """One token a letter, and a layer more than FLUX.2 reads."""
    marks = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*letters, *marks])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=marks[:2])
    tokenizer.chat_template = CHAT_TEMPLATE
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        intermediate_size=8,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    return tokenizer, kind(config).eval()


def patch_autoencoder() -> AutoencoderKLFlux2:
    """Two levels of 2 x 2 patches: a latent pixel is four pixels wide."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def qwen() -> tuple[Qwen2Tokenizer, Qwen2_5_VLForConditionalGeneration]:
    """One token a letter, and its vision is as small as its configuration allows."""
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    text = {
        "vocab_size": len(tokens),
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 24}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return tokenizer, Qwen2_5_VLForConditionalGeneration(config).eval()


def film_autoencoder() -> AutoencoderKLQwenImage:
    """Two levels: a latent pixel is two pixels wide."""
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=0,
        temperal_downsample=[True],
        latents_mean=[-0.7, 0.1, 0.9, 0.2],
        latents_std=[2.8, 1.4, 0.6, 1.2],
    )


def deep_autoencoder() -> AutoencoderDC:
    """Two levels: a latent pixel is two pixels wide."""
    levels: dict[str, Any] = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "EfficientViTBlock"),
            "block_out_channels": (16, 32),
            "qkv_multiscales": ((), (5,)),
            "layers_per_block": (1, 1),
        }.items()
    }
    return AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=0.41, **levels)


def autoencoder(shift_factor: float | None = None, channels: tuple[int, ...] = (8, 16)) -> AutoencoderKL:
    """Two levels: a latent pixel is two pixels wide."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        shift_factor=shift_factor,
    )


def sd3_pipeline(*, with_t5: bool = False, **changes: Any) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    encoders = [CLIPTextModelWithProjection(clip_config(tokenizer, width)).eval() for width in (8, 16)]
    tokenizer_3, text_encoder_3 = t5() if with_t5 else (None, None)
    return StableDiffusion3Pipeline(
        transformer=sd35_transformer(**changes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(shift_factor=0.1).eval(),
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def sd15_pipeline(**changes: Any) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        unet=sd15_unet(**changes).eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        vae=autoencoder().eval(),
        text_encoder=CLIPTextModel(clip_config(tokenizer, 16)).eval(),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline(**changes: Any) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        unet=sdxl_unet(**changes).eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        vae=autoencoder().eval(),
        text_encoder=CLIPTextModel(clip_config(tokenizer, 8)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, 16)).eval(),
        tokenizer_2=tokenizer,
        add_watermarker=False,
    )


def flux_pipeline(**changes: Any) -> FluxPipeline:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    tokenizer_2, text_encoder_2 = t5()
    return FluxPipeline(
        transformer=flux_transformer(**changes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(shift_factor=0.1).eval(),
        text_encoder=CLIPTextModel(clip_config(tokenizer, 16)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


def kontext_pipeline(**changes: Any) -> FluxKontextPipeline:
    """FLUX.1 told a picture."""
    return FluxKontextPipeline(**flux_pipeline(**changes).components)


def flux2_pipeline(**changes: Any) -> Flux2KleinPipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = qwen3()
    return Flux2KleinPipeline(
        transformer=flux2_transformer(**changes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=patch_autoencoder().eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def pixart_pipeline(*, sigma: bool = False, **changes: Any) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = t5()
    build = pixart_sigma_transformer if sigma else pixart_transformer
    return (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
        transformer=build(**changes).eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        vae=autoencoder().eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def auraflow_pipeline(**changes: Any) -> AuraFlowPipeline:
    torch.manual_seed(0)
    tokenizer, _ = t5()
    config = UMT5Config(**T5_SIZES)
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(config).eval(),
        vae=autoencoder().eval(),
        transformer=auraflow_transformer(**changes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def sana_pipeline(**changes: Any) -> SanaPipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = gemma2()
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=deep_autoencoder().eval(),
        transformer=sana_transformer(**changes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def sana_sprint_pipeline(**changes: Any) -> SanaSprintPipeline:
    """The networks of Sana, but for the denoiser."""
    components = sana_pipeline(**SPRINT | changes).components
    return SanaSprintPipeline(**components | {"scheduler": SCMScheduler()})


def qwen_pipeline(**changes: Any) -> QwenImagePipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = qwen()
    return QwenImagePipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=film_autoencoder().eval(),
        transformer=qwen_transformer(**changes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
    )


def qwen_edit_pipeline(**changes: Any) -> QwenImageEditPlusPipeline:
    """As of 2511, whose denoiser modulates pictures as at timestep 0."""
    components = qwen_pipeline(zero_cond_t=True, **changes).components
    return eyes.seeing(QwenImageEditPlusPipeline, components, eyes.language_model(24))


def lumina2_pipeline(**changes: Any) -> Lumina2Pipeline:
    """A latent pixel is eight pixels wide, whatever the autoencoder, says the pipeline."""
    torch.manual_seed(0)
    tokenizer, text_encoder = gemma2()
    pipeline = Lumina2Pipeline(
        transformer=lumina2_transformer(**changes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(shift_factor=0.1, channels=(8, 8, 8, 16)).eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )
    pipeline.system_prompt = "draw"
    return pipeline


def hunyuan_pipeline(**changes: Any) -> HunyuanDiTPipeline:
    """Its call counts on 8 pixels a side of a latent pixel, and on the published lengths of text."""
    torch.manual_seed(0)
    tokenizer, text_encoder = bert()
    tokenizer_2, text_encoder_2 = t5()
    return HunyuanDiTPipeline(
        vae=autoencoder(channels=(4, 4, 4, 8)).eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=hunyuan_transformer(**{"text_len": 77, "text_len_t5": 256, **changes}).eval(),
        scheduler=DDPMScheduler(clip_sample=False, steps_offset=1, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


def wan_pipeline(patch: int | None = None, **changes: Any) -> WanPipeline:
    """A latent pixel is four pixels wide, and a latent frame four frames long.

    With a patch it is one of Wan 2.2 TI2V: its autoencoder's blocks have shortcuts, its pixels are patches of so many a
    side, and its denoiser is told a timestep for each token.
    """
    torch.manual_seed(0)
    tokenizer, _ = t5()
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=0,
        temperal_downsample=[True, True],
        latents_mean=[-0.7, 0.1, 0.9, 0.2],
        latents_std=[2.8, 1.4, 0.6, 1.2],
        is_residual=patch is not None,
        in_channels=3 * (patch or 1) ** 2,
        out_channels=3 * (patch or 1) ** 2,
        patch_size=patch,
        scale_factor_temporal=4,
        scale_factor_spatial=4 * (patch or 1),
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(UMT5Config(**T5_SIZES)).eval(),
        vae=vae.eval(),
        transformer=wan_transformer(**changes).eval(),
        expand_timesteps=patch is not None,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def wan22_pipeline(patch: int | None = None, **changes: Any) -> WanPipeline:
    """Two denoisers in turn: of four steps each takes two."""
    pipeline = wan_pipeline(patch, **changes)
    torch.manual_seed(1)
    pipeline.register_modules(transformer_2=wan_transformer(**changes).eval())
    pipeline.register_to_config(boundary_ratio=0.875)
    return pipeline


def wan_i2v_pipeline(**changes: Any) -> WanImageToVideoPipeline:
    """Films that begin with a picture, in which an image encoder sees as many tokens as CLIP's."""
    parts = {**wan_pipeline().components, "transformer": wan_i2v_transformer(**changes).eval()}
    torch.manual_seed(2)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=2
    )
    return WanImageToVideoPipeline(
        **parts,
        image_encoder=CLIPVisionModel(vision).eval(),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )


def wan22_i2v_pipeline(**changes: Any) -> WanImageToVideoPipeline:
    """Likewise, by two denoisers in turn, without an image encoder."""
    parts, first, second = wan_pipeline().components, *(wan_i2v_transformer(sees=False, **changes) for _ in range(2))
    given = {"transformer": first.eval(), "transformer_2": second.eval()}
    return WanImageToVideoPipeline(**{**parts, **given}, boundary_ratio=0.875)


def zimage_pipeline(**changes: Any) -> ZImagePipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = qwen3(Qwen3Model, hidden_size=24, num_hidden_layers=2)
    return ZImagePipeline(
        transformer=zimage_transformer(**changes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(shift_factor=0.1).eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def dit_pipeline(**changes: Any) -> DiTPipeline:
    torch.manual_seed(0)
    return DiTPipeline(
        transformer=dit_transformer(**changes).eval(),
        vae=autoencoder().eval(),
        scheduler=DDIMScheduler(beta_schedule="linear", beta_end=0.02, clip_sample=False),
        id2label={0: "tench, Tinca tinca", 207: "golden retriever", 208: "Labrador retriever"},
    )


PIPELINES: dict[str, Callable[..., DiffusionPipeline]] = {
    "sd3": sd3_pipeline,
    "sd15": sd15_pipeline,
    "sdxl": sdxl_pipeline,
    "flux": flux_pipeline,
    "kontext": kontext_pipeline,
    "flux2": flux2_pipeline,
    "pixart": pixart_pipeline,
    "pixart_sigma": partial(pixart_pipeline, sigma=True),
    "auraflow": auraflow_pipeline,
    "sana": sana_pipeline,
    "sana_sprint": sana_sprint_pipeline,
    "qwen": qwen_pipeline,
    "qwen_edit": qwen_edit_pipeline,
    "lumina2": lumina2_pipeline,
    "hunyuan": hunyuan_pipeline,
    "wan": wan_pipeline,
    "wan22": wan22_pipeline,
    "wan_ti2v": partial(wan_pipeline, patch=2),
    "wan_i2v": wan_i2v_pipeline,
    "wan22_i2v": wan22_i2v_pipeline,
    "dit": dit_pipeline,
    "zimage": zimage_pipeline,
}


def chroma_pipeline() -> ChromaPipeline:
    tokenizer, text_encoder = t5()
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(shift_factor=0.1).eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


UNDESCRIBED: dict[str, Callable[[], DiffusionPipeline]] = {"chroma": chroma_pipeline}


@pytest.fixture
def build_undescribed() -> Callable[[str], DiffusionPipeline]:
    """build_undescribed("chroma"): a pipeline whose denoiser no family describes.

    T5 reads the prompts of all of them, whatever the real one has.
    """

    def build(kind: str) -> DiffusionPipeline:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "`FluxPosEmbed` is deprecated", FutureWarning
            )  # diffusers' own, of Chroma
            pipeline = UNDESCRIBED[kind]()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build


@pytest.fixture
def build_denoiser() -> Callable[..., nn.Module]:
    """build_denoiser(a key of DENOISERS, **config): a seeded random denoiser in eval mode."""

    def build(kind: str, **changes: Any) -> nn.Module:
        torch.manual_seed(0)
        return DENOISERS[kind](**changes).eval()

    return build


@pytest.fixture
def build_pipeline() -> Callable[..., DiffusionPipeline]:
    """build_pipeline(a key of PIPELINES, **config): a seeded random pipeline; sd3 takes with_t5=True."""

    def build(kind: str, **changes: Any) -> DiffusionPipeline:
        pipeline = PIPELINES[kind](**changes)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build


@pytest.fixture
def denoise() -> Callable[[nn.Module], torch.Tensor]:
    """denoise(denoiser): its output on a fixed input of batch 2, 12 x 16 latents and 7 text tokens."""

    def run(denoiser: Any) -> torch.Tensor:
        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(denoiser.dtype)

        config = denoiser.config
        sample, time = noise(2, config.in_channels, 12, 16), torch.tensor([900.0, 300.0])
        with torch.no_grad():
            if isinstance(denoiser, SD3Transformer2DModel):
                text, pooled = noise(2, 7, config.joint_attention_dim), noise(2, config.pooled_projection_dim)
                return denoiser(sample, text, pooled, time, return_dict=False)[0]
            if isinstance(denoiser, FluxTransformer2DModel):
                inputs = {
                    "hidden_states": noise(2, config.in_channels // 4, 12, 16),
                    "encoder_hidden_states": noise(2, 7, config.joint_attention_dim),
                    "pooled_projections": noise(2, config.pooled_projection_dim),
                    "timestep": time,
                    "guidance": torch.tensor([3.5, 2.0]),
                }
                return denoiser(**flux.arguments(inputs), return_dict=False)[0]
            if isinstance(denoiser, AuraFlowTransformer2DModel):
                return denoiser(sample, noise(2, 7, config.joint_attention_dim), time / 1000, return_dict=False)[0]
            if family_of(denoiser).name in ("flux2", "pixart", "sana", "qwen", "lumina2", "hunyuan", "wan", "zimage"):
                family = family_of(denoiser)
                shape = {"batch": 2, "size": (12, 16), "text_tokens": 7, "pixels": (24, 32)}
                told = family.arguments(family.example(denoiser, **shape))
                return velocity_of(denoiser, denoiser(**told, return_dict=False), told)
            if isinstance(denoiser, DiTTransformer2DModel):  # draws squares alone
                labels = torch.tensor([207, 1000])
                return denoiser(noise(2, config.in_channels, 16, 16), time, labels, return_dict=False)[0]
            added = {"text_embeds": noise(2, 16), "time_ids": torch.ones(2, 6)}
            text = noise(2, 7, config.cross_attention_dim)
            return denoiser(sample, time, text, added_cond_kwargs=added, return_dict=False)[0]

    return run


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures of shapes of their own, and a file that is none."""
    place = tmp_path_factory.mktemp("pictures")
    for name, size in {"b.png": (90, 70, 3), "a.jpg": (96, 128, 3)}.items():
        pixels = np.random.default_rng(len(name)).integers(0, 255, size, dtype=np.uint8)
        Image.fromarray(pixels).resize((size[1] // 8, size[0] // 8)).resize((size[1], size[0])).save(place / name)
    (place / "notes.txt").write_text("no picture")
    return place


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3 pipeline without T5, saved by diffusers. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("models") / "sd3"
    sd3_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd3_t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3 pipeline with T5, saved by diffusers. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("models") / "sd3-t5"
    sd3_pipeline(with_t5=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DiT pipeline as published: its index has the names of classes, which diffusers does not write."""
    folder = tmp_path_factory.mktemp("models") / "dit"
    dit_pipeline().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": "tench, Tinca tinca", "207": "golden retriever", "208": "Labrador retriever"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def sd15_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1.5 pipeline, saved by diffusers. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("models") / "sd15"
    sd15_pipeline().save_pretrained(folder)
    return folder
