"""Real networks, tiny and random, against torch in float32 at three sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from obsdiff_export.component import Component
from obsdiff_export.onnx import export
from obsdiff_export.parity import compare

Sizes = tuple[int, int, int, int]
"""batch, height and width (twice an odd number, or not), tokens"""

SIZES: tuple[Sizes, ...] = ((2, 12, 20, 5), (3, 28, 4, 7), (1, 8, 4, 2))


def component(net: nn.Module, forward: Callable[..., Any], make, axes, outputs: tuple[str, ...]) -> Component:
    """The network under another forward; its weights keep their names."""
    net.__class__ = type("Flat", (type(net),), {"forward": forward})
    first, *more = [make(*sizes) for sizes in SIZES]
    return Component(
        name="tiny",
        module=net.eval(),
        inputs=first,
        dynamic_axes=axes,
        outputs=outputs,
        config={},
        more_inputs=tuple(more),
    )


def sd3() -> Component:
    net = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=15,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )

    def make(batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        return {
            "hidden_states": torch.randn(batch, 4, height, width),
            "encoder_hidden_states": torch.randn(batch, tokens, 24),
            "pooled_projections": torch.randn(batch, 20),
            "timestep": torch.linspace(999.5, 1, batch),
        }

    axes = {
        "hidden_states": {0: "batch", 2: "height", 3: "width"},
        "encoder_hidden_states": {0: "batch", 1: "text_tokens"},
        "pooled_projections": {0: "batch"},
        "timestep": {0: "batch"},
    }

    def forward(self: Any, hidden_states, encoder_hidden_states, pooled_projections, timestep) -> Tensor:
        inputs = (hidden_states, encoder_hidden_states, pooled_projections, timestep)
        return SD3Transformer2DModel.forward(self, *inputs, return_dict=False)[0]

    return component(net, forward, make, axes, ("out_hidden_states",))


def sdxl() -> Component:
    net = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )

    def make(batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        return {
            "sample": torch.randn(batch, 4, height, width),
            "timestep": torch.linspace(999, 1, batch),
            "encoder_hidden_states": torch.randn(batch, tokens, 24),
            "text_embeds": torch.randn(batch, 20),
            "time_ids": torch.full((batch, 6), 1024.0),
        }

    def forward(self: Any, sample, timestep, encoder_hidden_states, text_embeds, time_ids) -> Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        inputs = (sample, timestep, encoder_hidden_states)
        return UNet2DConditionModel.forward(self, *inputs, added_cond_kwargs=added, return_dict=False)[0]

    axes = {
        "sample": {0: "batch", 2: "height", 3: "width"},
        "timestep": {0: "batch"},
        "encoder_hidden_states": {0: "batch", 1: "text_tokens"},
        "text_embeds": {0: "batch"},
        "time_ids": {0: "batch"},
    }
    return component(net, forward, make, axes, ("out_sample",))


def vae_decoder() -> Component:
    net = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )

    def make(batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        return {"latent_sample": torch.randn(batch, 4, height, width)}

    def forward(self: Any, latent_sample: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latent_sample))

    return component(net, forward, make, {"latent_sample": {0: "batch", 2: "height", 3: "width"}}, ("sample",))


@pytest.mark.parametrize("make", [sd3, vae_decoder], ids=lambda make: make.__name__)
def test_a_float32_graph_agrees_with_torch_and_keeps_the_names(make, tmp_path):
    tiny = make()
    model = export(tiny, tmp_path, dtype=torch.float32)
    assert compare(tiny, model).max_relative_error <= 1e-5  # rounding in another order; the contract is 1e-4
    read = {name for name, _ in tiny.module.named_parameters()}
    if make is vae_decoder:
        read = {name for name in read if name.startswith(("decoder.", "post_quant_conv."))}
    assert read <= {name.removesuffix("::T") for name in model.weights}


def test_sdxl_in_float16_joins_its_float32_embeddings(tmp_path):
    tiny = sdxl()
    model = export(tiny, tmp_path, dtype=torch.float16)
    assert compare(tiny, model).measured == "float16"
