"""Tiny random denoisers of every family, built from configurations."""

from collections.abc import Callable
from functools import partial
from typing import Any

from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    ControlNetModel,
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import nn


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


ONE_LEVEL: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "block_out_channels": (16,),
    "transformer_layers_per_block": 1,
    "attention_head_dim": 4,
}
"""Changes of a UNet that is soon exported."""


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


def controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """Of a UNet; its outputs are zeros before they are trained. A latent pixel is two pixels wide."""
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    for convolution in (*network.controlnet_down_blocks, network.controlnet_mid_block):
        nn.init.normal_(convolution.weight, std=0.2)
    nn.init.normal_(network.controlnet_cond_embedding.conv_out.weight, std=0.2)
    return network


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


def chroma_transformer(**changes: Any) -> ChromaTransformer2DModel:
    """Two joint and two single blocks of 4 heads of 8."""
    config: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 24,
        "axes_dims_rope": (2, 2, 4),
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 32,
        "approximator_layers": 1,
    }
    return ChromaTransformer2DModel(**{**config, **changes})


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


def ltx_transformer(**changes: Any) -> LTXVideoTransformer3DModel:
    """Two blocks of 4 heads of 8, normalised together, and 128 neurons; two channels of all heads are not turned."""
    config: dict[str, Any] = {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
        "in_channels": 4,
        "out_channels": 4,
        "caption_channels": 24,
        "num_layers": 2,
    }
    return LTXVideoTransformer3DModel(**config | changes)


def wan_i2v_transformer(*, sees: bool = True, **changes: Any) -> WanTransformer3DModel:
    """One whose films begin with a picture, and which is told what an image encoder sees in it, if it `sees`."""
    config = {"image_dim": 16, "added_kv_proj_dim": 36} if sees else {}
    return wan_transformer(**{"in_channels": 12, **config, **changes})


def wan_flf2v_transformer(**changes: Any) -> WanTransformer3DModel:
    """One whose films end with a picture, too; places of what is seen are random, where diffusers makes zeros."""
    found = wan_i2v_transformer(**{"pos_embed_seq_len": 514, **changes})
    nn.init.normal_(found.condition_embedder.image_embedder.pos_embed)
    return found


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
    "chroma": chroma_transformer,
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
    "wan_flf2v": wan_flf2v_transformer,
    "wan22_i2v": partial(wan_i2v_transformer, sees=False),
    "ltx": ltx_transformer,
    "dit": dit_transformer,
    "zimage": zimage_transformer,
}
