"""Tiny random diffusers pipelines and the bundles made of them; everything heavy is imported when it is used.

Pipelines share networks, and a network is exported once. Its weights depend on nothing but what it is, so that the
processes of pytest-xdist share bundles too.
"""

import copy
import fcntl
import functools
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kinds import never_traced_again, uneven

CAPTIONS = (
    "a large red circle above a small blue square",
    "a small green triangle",
    "two yellow stars, left of a purple ring",
    "It's  an ODD\tcaption: 42 pieces!",
)


def seeded(make: Callable[..., Any]) -> Callable[..., Any]:
    """One network for each set of arguments, with the same weights in every process."""

    @functools.cache
    @functools.wraps(make)
    def made(**options: Any) -> Any:
        import torch

        torch.manual_seed(zlib.crc32(f"{make.__name__} {sorted(options.items())}".encode()))
        return make(**options)

    return made


def cut(make: Callable[..., Any]) -> Callable[..., Any]:
    """The denoiser as pruning leaves it: blocks of different numbers of heads and neurons."""

    @functools.wraps(make)
    def made(**options: Any) -> Any:
        from obsdiff.families.table import family_of
        from obsdiff.shrinking import shrink

        denoiser = make(**options)
        shrink(denoiser, family_of(denoiser), uneven(denoiser))
        return denoiser

    return made


def clip_tokenizer(**options: Any) -> Any:
    """A CLIP tokenizer that knows the first three letters of the captions' words; a trainer breaks ties by chance."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], str] = {}
    for word in " ".join(CAPTIONS).lower().split():
        first, *others = [*word[:-1], f"{word[-1]}</w>"][:3]
        for other in others:
            first = merges.setdefault((first, other), first + other)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *dict.fromkeys(merges.values())]
    vocabulary = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=16, **options)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    words = sorted({piece for caption in CAPTIONS for piece in caption.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in words] + [(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def llama_tokenizer() -> Any:
    """Llama's pads in front of the text."""
    from transformers import LlamaTokenizer

    words = sorted({piece for caption in CAPTIONS for piece in caption.split()})
    letters = sorted({letter for word in words for letter in word})
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", "▁", *letters])}
    return LlamaTokenizer(
        vocab=vocabulary, merges=[], pad_token="<pad>", bos_token="</s>", add_bos_token=False, add_eos_token=True
    )


@seeded
def clip(*, width: int, projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width + 4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


@seeded
def _vae(*, channels: tuple[int, ...]) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    ).eval()


def vae(*, channels: tuple[int, ...] = (8, 16), **options: Any) -> Any:
    """The same weights under another configuration."""
    view = copy.copy(_vae(channels=channels))
    view.register_to_config(**options)
    return view


@seeded
def t5_encoder() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


@seeded
@cut
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


@seeded
@cut
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


def lcm_pipeline() -> Any:
    """Its denoiser was distilled to few steps, and is told the scale of guidance."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    return LatentConsistencyModelPipeline(
        unet=unet(cross_attention_dim=12, time_cond_proj_dim=16),
        scheduler=LCMScheduler(),
        vae=vae(),
        text_encoder=clip(width=12, projection=False),
        tokenizer=clip_tokenizer(),
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


def flux_pipeline() -> Any:
    """With a schedule that depends on the size, as FLUX.1-dev's."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    return FluxPipeline(
        transformer=flux_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=128
        ),
        vae=vae(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=clip(width=12, projection=False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


def kontext_pipeline() -> Any:
    """FLUX.1 told a picture."""
    from diffusers import FluxKontextPipeline

    return FluxKontextPipeline(**flux_pipeline().components)


@seeded
@cut
def flux_transformer() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    ).eval()


def flux2_pipeline(*, dev: bool = False) -> Any:
    """Of a text encoder that reads its first three layers, not such as the 27th: those take long to export."""
    import diffusers

    kind: Any = diffusers.Flux2Pipeline if dev else diffusers.Flux2KleinPipeline

    class Early(kind):
        def __call__(self, *args: Any, text_encoder_out_layers: Any = (1, 2, 3), **given: Any) -> Any:
            return super().__call__(*args, text_encoder_out_layers=text_encoder_out_layers, **given)

    Early.__name__ = kind.__name__
    pipeline = Early(
        transformer=flux2_transformer(guidance_embeds=dev),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=patch_vae(),
        text_encoder=mistral3() if dev else qwen3(),
        tokenizer=mistral_tokenizer() if dev else qwen3_tokenizer(),
    )
    if dev:
        pipeline.system_message = "Say what it looks like."  # the real one is long
    return pipeline


@seeded
@cut
def flux2_transformer(*, guidance_embeds: bool) -> Any:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    ).eval()


@seeded
def patch_vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
    ).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def qwen3_tokenizer() -> Any:
    """One token a byte, and the template of Qwen3 for a prompt that is to be answered without thinking."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    tokenizer = Qwen2Tokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": tokens[-3:-1]})
    tokenizer.chat_template = (
        "{%- for message in messages %}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}"
        "{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
        "{%- endif %}"
    )
    return tokenizer


@seeded
def qwen3(*, layers: int = 4) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=264,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return Qwen3ForCausalLM(config).eval()


def mistral_tokenizer() -> Any:
    """In place of a processor, which reads images and needs torchvision: one token a byte, padded in front.

    It puts marks around a text that is no template's.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *marks]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        additional_special_tokens=marks[3:],
        chat_template=(
            "{{- bos_token }}{%- for message in messages %}"
            "{%- set mark = 'SYSTEM_PROMPT' if message.role == 'system' else 'INST' %}"
            "{{- '[' + mark + ']' + message.content[0].text + '[/' + mark + ']' }}{%- endfor %}"
        ),
    )


@seeded
def mistral3() -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}
    text = MistralConfig(vocab_size=264, num_hidden_layers=4, num_key_value_heads=1, **sizes)
    vision = PixtralVisionConfig(num_hidden_layers=1, image_size=16, patch_size=4, **sizes)
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)).eval()


def pixart_pipeline(*, sigma: bool = False) -> Any:
    """Alpha's is told the image's size; sigma's is not."""
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtAlphaPipeline,
        PixArtSigmaPipeline,
    )

    return (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
        transformer=pixart_transformer(use_additional_conditions=not sigma),
        scheduler=DPMSolverMultistepScheduler(),
        vae=vae(scaling_factor=0.13),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    )


@seeded
@cut
def pixart_transformer(*, use_additional_conditions: bool) -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        sample_size=128,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        cross_attention_dim=24,
        caption_channels=32,
        use_additional_conditions=use_additional_conditions,
    ).eval()


def auraflow_pipeline() -> Any:
    """Its text is padded, and its T5 told where."""
    from diffusers import AuraFlowPipeline, FlowMatchEulerDiscreteScheduler

    return AuraFlowPipeline(
        transformer=auraflow_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=vae(scaling_factor=0.13),
        text_encoder=umt5_encoder(),
        tokenizer=llama_tokenizer(),
    )


@seeded
@cut
def auraflow_transformer() -> Any:
    from diffusers import AuraFlowTransformer2DModel

    return AuraFlowTransformer2DModel(
        sample_size=16,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pos_embed_max_size=17**2,  # an odd side, whose middle is not between two places
    ).eval()


@seeded
def umt5_encoder() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return UMT5EncoderModel(config).eval()


def sana_pipeline() -> Any:
    """With the sampler and the autoencoder of Sana, and a denoiser of 2048 pixels, which is told places."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    return SanaPipeline(
        transformer=sana_transformer(),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=deep_vae(),
        text_encoder=gemma2(),
        tokenizer=gemma_tokenizer(),
    )


def sana_sprint_pipeline() -> Any:
    """The networks of Sana, but for the denoiser."""
    from diffusers import SanaSprintPipeline, SCMScheduler

    components = sana_pipeline().components | {"transformer": sana_sprint_transformer(), "scheduler": SCMScheduler()}
    return SanaSprintPipeline(**components)


@seeded
@cut
def sana_sprint_transformer() -> Any:
    return _sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads")


@seeded
@cut
def sana_transformer() -> Any:
    return _sana_transformer(interpolation_scale=1.0)


def _sana_transformer(**options: Any) -> Any:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=32,
        sample_size=16,
        **options,
    ).eval()


@seeded
def deep_vae() -> Any:
    from diffusers import AutoencoderDC

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
    return AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=0.41, **levels).eval()


def gemma_tokenizer() -> Any:
    """One token a letter; what is none is unknown."""
    from transformers import GemmaTokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    return GemmaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[], add_bos_token=True)


@seeded
def gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
    )
    return Gemma2Model(config).eval()


def qwen_pipeline() -> Any:
    """With a schedule that depends on the size and ends above zero, as Qwen-Image's."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    return QwenImagePipeline(
        transformer=qwen_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_image_seq_len=16,
            max_image_seq_len=128,
            max_shift=0.9,
            shift_terminal=0.02,
        ),
        vae=film_vae(),
        text_encoder=qwen_language_model(),
        tokenizer=qwen_tokenizer(),
    )


def qwen_edit_pipeline(*, plus: bool = True) -> Any:
    """The networks of Qwen-Image but for what reads, and the denoiser, which modulates pictures as at timestep 0."""
    import diffusers
    import eyes

    name = "QwenImageEditPlusPipeline" if plus else "QwenImageEditPipeline"
    denoiser = qwen_transformer(zero_cond_t=True) if plus else qwen_transformer()
    components = {**qwen_pipeline().components, "transformer": denoiser}
    return eyes.seeing(getattr(diffusers, name), components, seeing_language_model())


@seeded
def seeing_language_model() -> Any:
    import eyes

    return eyes.language_model(32)


@seeded
@cut
def qwen_transformer(**changes: Any) -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(2, 2, 4),
        **changes,
    ).eval()


@seeded
def film_vae() -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=0,
        temperal_downsample=[True],
        latents_mean=[-0.7, 0.1, 0.9, 0.2],
        latents_std=[2.8, 1.4, 0.6, 1.2],
    ).eval()


def qwen_tokenizer() -> Any:
    """One token a byte."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return Qwen2Tokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])


@seeded
def qwen_language_model() -> Any:
    """Qwen2.5-VL, whose vision is as small as its configuration allows."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 32}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def lumina2_pipeline() -> Any:
    """With an autoencoder of two levels, which diffusers' pipeline takes for four."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline

    pipeline = Lumina2Pipeline(
        transformer=lumina2_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=gemma2(),
        tokenizer=gemma_tokenizer(),
    )
    pipeline.system_prompt = "draw"
    pipeline.vae_scale_factor = 2
    return pipeline


@seeded
@cut
def lumina2_transformer() -> Any:
    from diffusers import Lumina2Transformer2DModel

    return Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 64, 64),
        cap_feat_dim=32,
    ).eval()


def zimage_pipeline() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    return ZImagePipeline(
        transformer=zimage_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=qwen3(layers=2).model,
        tokenizer=qwen3_tokenizer(),
    )


@seeded
@cut
def zimage_transformer() -> Any:
    import torch
    from diffusers import ZImageTransformer2DModel

    denoiser = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[300, 64, 64],
    ).eval()
    for token in (denoiser.x_pad_token, denoiser.cap_pad_token):  # zeros before they are trained
        torch.nn.init.normal_(token)
    return denoiser


def hunyuan_pipeline() -> Any:
    """Its call counts on 8 pixels a side of a latent pixel. The published sampler draws noise; this one does not."""
    from diffusers import DDIMScheduler, HunyuanDiTPipeline

    return HunyuanDiTPipeline(
        vae=vae(channels=(4, 4, 4, 8), scaling_factor=0.13),
        text_encoder=bert(),
        tokenizer=bert_tokenizer(),
        transformer=hunyuan_transformer(),
        scheduler=DDIMScheduler(**HUNYUAN_SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


HUNYUAN_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.03,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
}


@seeded
@cut
def hunyuan_transformer() -> Any:
    """Told sizes, as up to version 1.1; the last block has a skip. The lengths of text are those of its pipeline."""
    from diffusers import HunyuanDiT2DModel

    return HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=16,
        num_layers=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        text_len=77,
        text_len_t5=256,
    ).eval()


def bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})


@seeded
def bert() -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return BertModel(config).eval()


def wan_pipeline() -> Any:
    """A latent pixel is four pixels wide, and a latent frame four frames long."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5_encoder(),
        vae=wan_vae(),
        transformer=wan_transformer(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def wan_ti2v_pipeline() -> Any:
    """A latent pixel is two patches of the autoencoder wide; the denoiser is told a timestep for each token."""
    pipeline = wan_pipeline()
    vae = wan_ti2v_vae()
    return type(pipeline)(**{**pipeline.components, "vae": vae}, expand_timesteps=True)


def wan22_pipeline() -> Any:
    """Two denoisers in turn: of four steps each takes two."""
    pipeline = wan_pipeline()
    pipeline.register_modules(transformer_2=wan22_transformer())
    pipeline.register_to_config(boundary_ratio=0.875)
    return pipeline


def wan_i2v_pipeline() -> Any:
    """Films that begin with a picture, in which an image encoder sees as many tokens as CLIP's."""
    from diffusers import WanImageToVideoPipeline
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    parts = {**wan_pipeline().components, "transformer": wan_transformer(**OPENING, image_dim=16, added_kv_proj_dim=24)}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return WanImageToVideoPipeline(**parts, image_encoder=clip_vision(), image_processor=processor)


def wan22_i2v_pipeline() -> Any:
    """Likewise, by two denoisers in turn, without an image encoder."""
    from diffusers import WanImageToVideoPipeline

    given = {"transformer": wan_transformer(**OPENING), "transformer_2": wan22_transformer(**OPENING)}
    return WanImageToVideoPipeline(**{**wan_pipeline().components, **given}, boundary_ratio=0.875)


OPENING = {"in_channels": 12, "num_layers": 1}
"""Latents, which frames are given, and latents of these; of a transformer that is soon exported."""


@seeded
def clip_vision() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=2
    )
    return CLIPVisionModel(config).eval()


@seeded
@cut
def wan_transformer(**changes: Any) -> Any:
    from diffusers import WanTransformer3DModel

    config: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 32,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "cross_attn_norm": True,
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**config | changes).eval()


@seeded
def wan22_transformer(**changes: Any) -> Any:
    """One like the other in all but its weights."""
    import torch
    from diffusers import WanTransformer3DModel

    config = wan_transformer(**changes).config  # draws, unless it was made before
    torch.manual_seed(1)
    return WanTransformer3DModel.from_config(config).eval()


@seeded
def wan_vae(**changes: Any) -> Any:
    """Of a step in space alone and two in space and time, as Wan 2.1's, but for the first."""
    from diffusers import AutoencoderKLWan

    config: dict[str, Any] = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 1, 1],
        "num_res_blocks": 0,
        "temperal_downsample": [True, True],
        "latents_mean": [-0.7, 0.1, 0.9, 0.2],
        "latents_std": [2.8, 1.4, 0.6, 1.2],
        "scale_factor_temporal": 4,
        "scale_factor_spatial": 4,
    }
    return AutoencoderKLWan(**config | changes).eval()


def wan_ti2v_vae() -> Any:
    """Its blocks have shortcuts, and its pixels are patches of two a side."""
    return wan_vae(is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=8)


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd3": sd3_pipeline,
    "sd3_t5": lambda: sd3_pipeline(t5=True),
    "sd": sd_pipeline,
    "lcm": lcm_pipeline,
    "sdxl": sdxl_pipeline,
    "flux": flux_pipeline,
    "flux2": flux2_pipeline,
    "flux2_dev": lambda: flux2_pipeline(dev=True),
    "pixart_alpha": pixart_pipeline,
    "pixart_sigma": lambda: pixart_pipeline(sigma=True),
    "auraflow": auraflow_pipeline,
    "sana": sana_pipeline,
    "sana_sprint": sana_sprint_pipeline,
    "qwen": qwen_pipeline,
    "lumina2": lumina2_pipeline,
    "zimage": zimage_pipeline,
    "hunyuan": hunyuan_pipeline,
    "wan": wan_pipeline,
}
FILMS = ("wan",)


def dit_pipeline() -> Any:
    """It draws classes, and takes no prompt."""
    from diffusers import DDIMScheduler, DiTPipeline

    return DiTPipeline(
        transformer=dit_transformer(),
        vae=vae(scaling_factor=0.13),
        scheduler=DDIMScheduler(beta_schedule="linear", beta_end=0.02, clip_sample=False),
        id2label={0: "tench, Tinca tinca", 134: "crane", 207: "golden retriever", 517: "crane"},
    )


@seeded
@cut
def dit_transformer() -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        patch_size=2,
    ).eval()


OTHERS: dict[str, Callable[[], Any]] = {
    "dit": dit_pipeline,
    "kontext": kontext_pipeline,
    "qwen_edit": qwen_edit_pipeline,
    "qwen_edit_first": lambda: qwen_edit_pipeline(plus=False),
    "wan22": wan22_pipeline,
    "wan_ti2v": wan_ti2v_pipeline,
    "wan_i2v": wan_i2v_pipeline,
    "wan22_i2v": wan22_i2v_pipeline,
}
"""Pipelines whose calls are others, each with a file of tests: class_conditional, references, turns, openings."""

LIKE = {
    "kontext": "flux",
    "qwen_edit": "qwen",
    "qwen_edit_first": "qwen_edit",
    **{name: "wan" for name in ("wan22", "wan_ti2v", "wan_i2v", "wan22_i2v")},
}
"""Pipelines that share all networks with another but for those in OWN, or the denoiser's graph."""

OWN = {
    "qwen_edit": ("transformer", "text_encoder", "vision_encoder"),
    "qwen_edit_first": ("transformer", "text_encoder"),
    "wan_ti2v": ("transformer", "vae_decoder", "vae_decoder_next", "vae_encoder"),
}


def write_bundle(
    pipeline: Any, folder: Path, *, sparsity: str = "dense", like: Path | None = None, own: tuple[str, ...] = ()
) -> Path:
    """What `obsdiff export` leaves, without engines; `like` is a bundle of the same networks but for its `own`."""
    from obsdiff import turns
    from obsdiff.delivery import copy_rest
    from obsdiff.families import exporting
    from obsdiff.families.table import family_of
    from obsdiff_runtime.bundle import ComponentEntry, Defaults, Manifest, TensorEntry, open_bundle, write_manifest

    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    family = family_of(denoiser)
    components = {} if like is None else dict(open_bundle(like).manifest.components)
    own = own or (family.denoiser,)
    for name in components.keys() - set(own):
        shutil.copytree(like / name, folder / name)
    components = {name: entry for name, entry in components.items() if name not in own}
    for component in exporting.components(family, pipeline, height=32, width=32):
        if component.name in components:
            continue
        others = _extremes(pipeline, denoiser) if component.name == family.denoiser else ()
        model = _exported(component, folder / component.name, others)
        inputs, outputs = (
            tuple(TensorEntry(name=port.name, dtype=port.dtype, shape=port.shape) for port in ports)
            for ports in (model.inputs, model.outputs)
        )
        components[component.name] = ComponentEntry(
            onnx=f"{component.name}/model.onnx", dtype=model.dtype, inputs=inputs, outputs=outputs
        )
    copy_rest(pipeline, folder)
    write_manifest(
        folder,
        Manifest(
            created_by="a test",
            family=family.name,
            pipeline_class=type(pipeline).__name__,
            sparsity=sparsity,
            defaults=Defaults(
                height=32,
                width=32,
                num_inference_steps=4,
                guidance_scale=3.0,
                num_frames=9 if family.name in FILMS else None,
                max_sequence_length=_longest(pipeline),
            ),
            components=components,
            turns=turns.of(pipeline, family) if len(turns.names(pipeline.config, family)) > 1 else {},
        ),
    )
    return folder


def _longest(pipeline: Any) -> int:
    """Text tokens; of a processor's, what is around the pictures counts, and beside an image encoder's it is fixed."""
    if hasattr(pipeline, "processor"):
        return 60
    return 5 if getattr(pipeline, "image_encoder", None) is None else 512


_EXPORTED: dict[tuple[str, int, frozenset[str]], Any] = {}


_EXTREMES: dict[str, tuple[tuple[int, ...], ...]] = {
    "auraflow": ((2, 2), (34, 34), (6, 20)),  # up to all of its grid
    "dit": ((16, 16),) * 3,
    "pixart": ((2, 2), (128, 128), (6, 100)),
    "sd3": ((2, 2), (16, 16), (6, 14)),
    "wan": ((1, 2, 2), (3, 6, 14), (9, 10, 4)),
}
"""Sizes of latents: the least, much, and lopsided."""


def _extremes(pipeline: Any, denoiser: Any) -> tuple[Any, ...]:
    """Further inputs that the denoiser's graph has to be right on: from one token of text and image up."""
    from obsdiff.families import references
    from obsdiff.families.table import family_of

    family, kind = family_of(denoiser), type(pipeline).__name__
    masked = references.masked if references.masks_frames(pipeline.config) else dict
    sizes = _EXTREMES.get(family.name, ((2, 2), (64, 64), (6, 50)))
    return tuple(
        masked(
            {
                **family.example(denoiser, batch=batch, size=size, text_tokens=text, pixels=(64, 96)),
                **references.example(denoiser, kind, batch=batch, tokens=told),
            }
        )
        for batch, text, told, size in zip((1, 3, 2), (1, 66, 32), (0, 9, 1), sizes, strict=True)
    )


def _exported(component: Any, folder: Path, others: tuple[Any, ...]) -> Any:
    """An OnnxModel that computes what torch does; a network that was exported for another bundle is copied."""
    import torch

    from obsdiff_export.onnx import export
    from obsdiff_export.parity import compare

    # T5 is told what is padding in one pipeline and not in another; of Gemma-2 they read different layers
    ports = frozenset([*component.inputs, *component.outputs])
    key = (component.name.removesuffix("_2"), next(component.module.parameters()).data_ptr(), ports)
    if key not in _EXPORTED:
        with never_traced_again():
            _EXPORTED[key] = export(component, folder, dtype=torch.float32)
        compare(replace(component, more_inputs=component.more_inputs + others), _EXPORTED[key])
    else:
        shutil.copytree(_EXPORTED[key].path.parent, folder)
        (folder / "config.json").write_text(json.dumps(component.config))
    return _EXPORTED[key]


@pytest.fixture(scope="session", params=[name for name in PIPELINES if name not in FILMS])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny random diffusers pipeline of pictures and its bundle, one pair for each way of sampling."""
    return _pair(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def sd_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("sd", tmp_path_factory)


@pytest.fixture(scope="session")
def lcm_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("lcm", tmp_path_factory)


@pytest.fixture(scope="session")
def pixart_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("pixart_alpha", tmp_path_factory)


@pytest.fixture(scope="session")
def sana_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("sana", tmp_path_factory)


@pytest.fixture(scope="session")
def sana_sprint_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("sana_sprint", tmp_path_factory)


@pytest.fixture(scope="session")
def flux2_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("flux2", tmp_path_factory)


@pytest.fixture(scope="session")
def flux2_dev_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("flux2_dev", tmp_path_factory)


@pytest.fixture(scope="session")
def qwen_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("qwen", tmp_path_factory)


@pytest.fixture(scope="session")
def qwen_edit_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("qwen_edit", tmp_path_factory)


@pytest.fixture(scope="session")
def qwen_edit_first_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("qwen_edit_first", tmp_path_factory)


@pytest.fixture(scope="session")
def lumina2_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("lumina2", tmp_path_factory)


@pytest.fixture(scope="session")
def zimage_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("zimage", tmp_path_factory)


@pytest.fixture(scope="session")
def auraflow_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("auraflow", tmp_path_factory)


@pytest.fixture(scope="session")
def hunyuan_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("hunyuan", tmp_path_factory)


@pytest.fixture(scope="session")
def dit_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("dit", tmp_path_factory)


@pytest.fixture(scope="session")
def kontext_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("kontext", tmp_path_factory)


@pytest.fixture(scope="session")
def wan_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("wan", tmp_path_factory)


@pytest.fixture(scope="session")
def wan_ti2v_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("wan_ti2v", tmp_path_factory)


@pytest.fixture(scope="session")
def wan22_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("wan22", tmp_path_factory)


@pytest.fixture(scope="session")
def wan22_i2v_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("wan22_i2v", tmp_path_factory)


@pytest.fixture(scope="session")
def sd3_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _pair("sd3", tmp_path_factory)[1]


@pytest.fixture
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """make_bundle(a key of PIPELINES): its bundle."""
    return lambda name: _pair(name, tmp_path_factory)[1]


@pytest.fixture
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """make_pair(a key of PIPELINES): it and its bundle."""
    return lambda name: _pair(name, tmp_path_factory)


_PAIRS: dict[str, tuple[Any, Path]] = {}


def _pair(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    import torch

    if name not in _PAIRS:
        torch.set_num_threads(1)
        pipeline = {**PIPELINES, **OTHERS}[name]()
        pipeline.set_progress_bar_config(disable=True)
        place = _shared(tmp_path_factory) / name
        folder = place / "bundle"
        with _only_here(place):
            if not (folder / "obsdiff.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
                like = _pair(LIKE[name], tmp_path_factory)[1] if name in LIKE else None
                write_bundle(pipeline, folder, like=like, own=OWN.get(name, ()))
        _PAIRS[name] = pipeline, folder
    return _PAIRS[name]


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the tests, whichever of its processes asks."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "bundles"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def _only_here(place: Path) -> Iterator[None]:
    """No other process is in such a block with the same place meanwhile."""
    with place.with_name(f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def make_clip_tokenizer() -> Callable[..., Any]:
    return clip_tokenizer


@pytest.fixture
def make_t5_tokenizer() -> Callable[[], Any]:
    return t5_tokenizer


@pytest.fixture
def make_llama_tokenizer() -> Callable[[], Any]:
    return llama_tokenizer
