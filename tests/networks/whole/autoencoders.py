"""Tiny random autoencoders."""

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
)


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


def whole_film_autoencoder() -> AutoencoderKLLTXVideo:
    """Three levels of patches of four pixels: a latent pixel is 32 pixels wide, and a latent frame 8 frames long."""
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    vae.latents_mean.copy_(torch.tensor([-0.7, 0.1, 0.9, 0.2]))
    vae.latents_std.copy_(torch.tensor([2.8, 1.4, 0.6, 1.2]))
    return vae


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
