"""Eight bits and 2:4 through TensorRT-RTX: what builds, and what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from obsdiff_export.build import BUILDERS, build
from obsdiff_export.builders.request import Flags
from obsdiff_export.component import Component
from obsdiff_export.formats import FORMATS, Format, stored_scale
from obsdiff_export.onnx import OnnxModel, export
from obsdiff_export.parity import compare
from obsdiff_export.pattern import check
from obsdiff_export.profiles import profiles_for
from obsdiff_export.quantizing import LinearScales, Quantization
from obsdiff_runtime.errors import CompatibilityError

pytestmark = pytest.mark.skipif(
    bool(BUILDERS["tensorrt_rtx"].missing()), reason=f"TensorRT-RTX: {BUILDERS['tensorrt_rtx'].missing()}"
)
SIZES = {"batch": (1, 2, 4), "height": 8, "width": 8, "text_tokens": 5}


class TinySd3(SD3Transformer2DModel):
    def __init__(self) -> None:
        super().__init__(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20,
            pos_embed_max_size=12, qk_norm="rms_norm",
        )  # fmt: skip

    def forward(self, sample: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(sample, text, pooled, timestep, return_dict=False)[0]


class TinyUnet(UNet2DConditionModel):
    def __init__(self) -> None:
        super().__init__(
            sample_size=8, block_out_channels=(16,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("UpBlock2D",), cross_attention_dim=24, attention_head_dim=8, norm_num_groups=4,
        )  # fmt: skip

    def forward(self, sample: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(sample, timestep, text, return_dict=False)[0]


def component_of(make: type[nn.Module]) -> Component:
    torch.manual_seed(0)
    inputs = {
        "sample": torch.randn(2, 4, 12, 20),
        "text": torch.randn(2, 5, 24),
        "pooled": torch.randn(2, 20),
        "timestep": torch.tensor([900.0, 3.0]),
    }
    axes = {
        "sample": {0: "batch", 2: "height", 3: "width"},
        "text": {0: "batch", 1: "text_tokens"},
        "pooled": {0: "batch"},
        "timestep": {0: "batch"},
    }
    if make is TinyUnet:
        del inputs["pooled"], axes["pooled"]
    return Component(
        name="tiny", module=make().eval(), inputs=inputs, dynamic_axes=axes, outputs=("out_sample",), config={}
    )


def quantized(component: Component, format: Format, dtype: torch.dtype, *, outputs: bool):
    """The component in 2:4 and eight bits inside its blocks, by the ranges of its own example."""
    module = copy.deepcopy(component.module)
    linears = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and "transformer_blocks" in name and "norm" not in name
    }
    reach: dict[str, tuple[float, float]] = {}
    handles = [
        part.register_forward_hook(
            lambda _, args, out, name=name: reach.update({name: (float(args[0].abs().max()), float(out.abs().max()))})
        )
        for name, part in linears.items()
    ]
    with torch.no_grad():
        module(**component.inputs)
    for handle in handles:
        handle.remove()
    scales = {}
    for name, part in linears.items():
        weight = part.weight.data
        weight.view(-1, 4)[:, :2] = 0
        largest = weight.abs().amax(1) if format.per_output else weight.abs().amax()
        scale = stored_scale(largest / format.largest, dtype)
        weight.copy_(format.rounded(weight, scale[:, None] if format.per_output else scale))
        entering, leaving = (stored_scale(torch.tensor(value / format.largest), dtype) for value in reach[name])
        scales[name] = LinearScales(weight=scale, input=entering, output=leaving if outputs else None)
    return replace(component, module=module), Quantization(format=format, linears=scales)


def engine_of(model: OnnxModel, folder, targets):
    return build(
        model.path,
        folder,
        builder=BUILDERS["tensorrt_rtx"],
        profiles=profiles_for(model.inputs, [SIZES]),
        flags=Flags(sparse=True),
        targets=targets,
    )


@pytest.mark.parametrize(
    ("make", "name", "dtype", "outputs", "targets"),
    [
        (TinySd3, "int8", torch.float16, True, ("8.6", "8.9", "12.0")),
        (TinyUnet, "int8", torch.bfloat16, False, ("8.6",)),
        (TinySd3, "fp8", torch.float16, True, ("8.9", "12.0")),
    ],
)
def test_rtx_builds_eight_bits_with_2_4(tmp_path, make, name, dtype, outputs, targets):
    component, quantization = quantized(component_of(make), FORMATS[name], dtype, outputs=outputs)
    model = export(component, tmp_path / "tiny", dtype=dtype, quantization=quantization)
    assert all(report.holds for report in check(model.path, 2, 4, quantization.linears) if report.zeros)
    if dtype != torch.bfloat16:
        assert compare(component, model, quantization=quantization).max_relative_error < 5e-2
    engine = engine_of(model, tmp_path / "engines", targets)
    assert engine.targets == targets
    assert engine.bytes > 0


def test_rtx_refuses_fp8_where_the_hardware_has_none(toy, tmp_path):
    scales = LinearScales(weight=torch.tensor(2.0**-10), input=torch.tensor(2.0**-6))
    quantization = Quantization(format=FORMATS["fp8"], linears={"up": scales})
    model = export(toy, tmp_path / "toy", dtype=torch.float16, quantization=quantization)
    with pytest.raises(CompatibilityError, match=r"number format that 8\.6 lacks .*float8 8\.9"):
        build(
            model.path,
            tmp_path / "engines",
            builder=BUILDERS["tensorrt_rtx"],
            profiles=profiles_for(model.inputs, [{"batch": (1, 2, 4), "length": (1, 5, 16)}]),
            targets=("8.6",),
        )
