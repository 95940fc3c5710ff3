"""Tiny denoisers as pruning leaves them."""

from typing import Any

from networks.cut.weights import cut, seeded


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


@seeded
@cut
def unet(*, levels: int = 1, **options: Any) -> Any:
    """Of one level, which is soon exported, or of two."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16)[:levels],
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D")[:levels],
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")[-levels:],
        attention_head_dim=4,
        **options,
    ).eval()


@seeded
def controlnet(*, levels: int = 1, **options: Any) -> Any:
    """Of such a UNet, whole; its outputs are zeros before they are trained. A latent pixel is two pixels wide."""
    import torch
    from diffusers import ControlNetModel

    network = ControlNetModel(
        block_out_channels=(8, 16)[:levels],
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D")[:levels],
        attention_head_dim=4,
        conditioning_embedding_out_channels=(4, 8),
        **options,
    )
    outputs = (
        *network.controlnet_down_blocks,
        network.controlnet_mid_block,
        network.controlnet_cond_embedding.conv_out,
    )
    for convolution in outputs:
        torch.nn.init.normal_(convolution.weight, std=0.2)
    return network.eval()


@seeded
@cut
def flux_transformer(*, in_channels: int = 16) -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    ).eval()


@seeded
@cut
def chroma_transformer() -> Any:
    from diffusers import ChromaTransformer2DModel

    return ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=16,
        approximator_hidden_dim=24,
        approximator_layers=1,
    ).eval()


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


OPENING = {"in_channels": 12, "num_layers": 1}
"""Latents, which frames are given, and latents of these; of a transformer that is soon exported."""


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
@cut
def ltx_transformer() -> Any:
    """Two channels of all heads are not turned."""
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        in_channels=4,
        out_channels=4,
        caption_channels=32,
        num_layers=2,
    ).eval()


@seeded
def wan_flf2v_transformer() -> Any:
    """One that is told what is seen in two pictures; places of that are random, where diffusers makes zeros."""
    import torch

    found = wan_transformer(**OPENING, image_dim=16, added_kv_proj_dim=24, pos_embed_seq_len=514)
    torch.nn.init.normal_(found.condition_embedder.image_embedder.pos_embed)
    return found


@seeded
def wan22_transformer(**changes: Any) -> Any:
    """One like the other in all but its weights."""
    import torch
    from diffusers import WanTransformer3DModel

    config = wan_transformer(**changes).config  # draws, unless it was made before
    torch.manual_seed(1)
    return WanTransformer3DModel.from_config(config).eval()


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
