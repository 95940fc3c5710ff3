"""A small network of each family, built by TensorRT-RTX: what the real engine makes of its linears."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from networks.whole.denoisers import ONE_LEVEL
from obsdiff.families import references
from obsdiff.families.table import FAMILIES
from obsdiff_export.build import BUILDERS, build
from obsdiff_export.onnx import export
from obsdiff_export.pattern import check
from obsdiff_export.profiles import profiles_for
from obsdiff_export.proof.layers import layers_of_log
from obsdiff_export.proof.receipt import load
from obsdiff_runtime.references import TOKENS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed"),
]

WAN_OPENING = ("wan_i2v", "wan_flf2v", "wan22_i2v")
FEWER: dict[str, dict[str, Any]] = {
    "sd3": {"num_layers": 2},
    **{kind: ONE_LEVEL for kind in ("sd15", "sdxl")},
    "auraflow": {"num_mmdit_layers": 1, "num_single_dit_layers": 1},
    "zimage": {"n_layers": 1},
    **{
        kind: {"num_layers": 1}
        for kind in ("pixart", "sana", "sana_sprint", "qwen", "lumina2", "dit", "ltx", "wan", "wan_ti2v", *WAN_OPENING)
    },
    **{kind: {"num_layers": 1, "num_single_layers": 1} for kind in ("flux", "flux2", "chroma")},
}
"""Blocks: one of each kind, but for HunyuanDiT, whose skips need four."""

SIZES = {
    "batch": (1, 2, 4),
    "frames": (1, 3, 21),
    "height": 8,
    "width": 8,
    "text_tokens": (1, 7, 20),
    TOKENS: (0, 8, 16),
}


@pytest.mark.stage("engine")
@pytest.mark.parametrize(
    ("kind", "family", "one", "other"),
    [
        ("sd3", "sd3", "transformer_blocks.0.norm1.linear.weight", "transformer_blocks.1.norm1.linear.weight"),
        ("sd15", "unet", "attn2.to_k.weight", "attn2.to_v.weight"),
        ("sdxl", "unet", "attn2.to_k.weight", "attn2.to_v.weight"),
        ("pixart", "pixart", "attn2.to_k.weight", "attn2.to_v.weight"),
        ("auraflow", "auraflow", "single_transformer_blocks.0.ff.linear_1.weight", "ff.linear_2.weight"),
        ("sana", "sana", "attn2.to_k.weight", "attn2.to_v.weight"),
        ("sana_sprint", "sana", "attn2.to_k.weight", "attn2.to_v.weight"),
        ("chroma", "chroma", "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_k.weight"),
        ("flux2", "flux2", "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_k.weight"),
        ("qwen", "qwen", "transformer_blocks.0.attn.to_k.weight", "transformer_blocks.0.attn.to_v.weight"),
        ("lumina2", "lumina2", "layers.0.attn.to_k.weight", "layers.0.attn.to_v.weight"),
        ("zimage", "zimage", "layers.0.attention.to_k.weight", "layers.0.attention.to_v.weight"),
        ("hunyuan", "hunyuan", "attn2.to_k.weight", "attn2.to_v.weight"),
        ("dit", "dit", "transformer_blocks.0.attn1.to_q.weight", "transformer_blocks.0.attn1.to_k.weight"),
        ("ltx", "ltx", "attn2.to_k.weight", "attn2.to_v.weight"),
        ("wan", "wan", "blocks.0.attn2.to_k.weight", "blocks.0.attn2.to_v.weight"),
        ("wan_ti2v", "wan", "blocks.0.attn2.to_k.weight", "blocks.0.attn2.to_v.weight"),
        ("wan_i2v", "wan", "blocks.0.attn2.add_k_proj.weight", "blocks.0.attn2.add_v_proj.weight"),
        ("wan_flf2v", "wan", "blocks.0.attn2.add_k_proj.weight", "blocks.0.attn2.add_v_proj.weight"),
        ("wan22_i2v", "wan", "blocks.0.attn2.to_k.weight", "blocks.0.attn2.to_v.weight"),
        ("flux", "flux", "single_transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.proj_mlp.weight"),
    ],
)
def test_every_linear_is_in_the_real_engine_and_linears_of_one_input_are_merged(
    kind: str, family: str, one: str, other: str, build_pipeline: Callable[..., DiffusionPipeline], tmp_path: Path
) -> None:
    pipeline = build_pipeline(kind, **FEWER.get(kind, {}))
    denoiser, name = getattr(pipeline, FAMILIES[family].denoiser), type(pipeline).__name__
    masks = references.masks_frames(name, pipeline.config)
    component = references.component(
        FAMILIES[family], denoiser, name, height=64, width=64, vae_scale=8, frame_mask=masks
    )
    model = export(component, tmp_path / component.name, dtype=torch.float16)
    engine = build(
        model.path,
        tmp_path / "engines",
        builder=BUILDERS["tensorrt_rtx"],
        profiles=profiles_for(model.inputs, [SIZES]),
        targets=("8.9",),
        patterns=check(model.path, 2, 4),
    )
    layers = layers_of_log(engine.log_path.read_text(encoding="utf-8"))
    proof = load(engine.receipt_path).proof
    missing = [layer.weight for layer in proof.layers if not layer.layer]
    assert missing in ([], ["patch_embed.proj.weight"], ["proj_in.weight"])  # of 4 channels, fused into what is around
    assert {layer.dtype for layer in proof.layers} <= {"float16"}
    computing = {layer.layer for layer in proof.layers}  # of activations alone, Sana multiplies in float32
    products = [layer for layer in layers if layer.kind == "gemm" and layer.name in computing]
    assert {tensor.dtype for layer in products for tensor in layer.inputs} == {"float16"}
    merged = {layer.weight: layer.merged for layer in proof.layers}
    assert any(other in mate for name, mates in merged.items() if one in name for mate in mates)
