"""Tiny autoencoders."""

import copy
from typing import Any

from networks.cut.weights import seeded


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


@seeded
def ltx_vae() -> Any:
    """As that of LTX-Video 0.9.5, told how noisy latents are, but for a level in space alone and one in time alone."""
    import torch
    from diffusers import AutoencoderKLLTXVideo

    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4, 8, 16, 32),
        down_block_types=("LTXVideo095DownBlock3D",) * 3,
        spatio_temporal_scaling=(True,) * 3,
        layers_per_block=(1,) * 4,
        downsample_type=("spatiotemporal",) * 3,
        decoder_block_out_channels=(8, 16, 32),
        decoder_spatio_temporal_scaling=(True,) * 3,
        decoder_layers_per_block=(1,) * 4,
        decoder_inject_noise=(False,) * 4,
        upsample_residual=(True,) * 3,
        upsample_factor=(2,) * 3,
        timestep_conditioning=True,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    vae.latents_mean.copy_(torch.tensor([-0.7, 0.1, 0.9, 0.2]))
    vae.latents_std.copy_(torch.tensor([2.8, 1.4, 0.6, 1.2]))
    return vae.eval()
