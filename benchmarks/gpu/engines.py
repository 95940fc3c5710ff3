"""The A/B of TensorRT engines on an SD3 block: the same 2:4 weights with and without the flag, and dense ones."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from gpu import models
from gpu.rows import Options, Sheet
from obsdiff_export import onnx, pattern
from obsdiff_export.build import choose_builder
from obsdiff_export.builders.request import Flags
from obsdiff_export.component import Component
from obsdiff_export.contest import build_faster
from obsdiff_export.ports import read_ports
from obsdiff_export.profiles import profile_for
from obsdiff_export.proof import receipt

LAYERS = 1


class Blocks(nn.Module):
    """The first blocks of a denoiser; the last one that keeps its text is the last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(list(model.get_submodule("transformer_blocks").children())[:-1])

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        text, image = encoder_hidden_states, hidden_states
        for block in self.blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb)
        return image, text


def run(sheet: Sheet, options: Options) -> None:
    with sheet.case(what=f"{LAYERS} SD3 block(s), 2:4") as row, tempfile.TemporaryDirectory() as scratch:
        builder = choose_builder()
        graphs = _graphs(Path(scratch), options)
        ports, _ = read_ports(graphs["dense"])
        found = build_faster(
            graphs["pruned"],
            Path(scratch) / "engines",
            builder=builder,
            profiles=[profile_for(ports, {})],
            flags=Flags(),
            patterns=pattern.check(graphs["pruned"], 2, 4),
            dense=graphs["dense"],
            budget_seconds=sheet.left() * 0.8,
        )
        row.case["builder"] = f"{builder.name} {builder.version()}"
        row.figures |= {f"{name}_ms": spread.p50_ms for name, spread in found.spreads.items()}
        row.figures |= {"builds": len(found.builds), "build_seconds": sum(made.seconds for made in found.builds)}
        if found.decision.comparison is not None:
            row.figures["sparse_speedup"] = found.decision.comparison.speedup
        proven = receipt.sparsity_statement(receipt.load(found.shipped.receipt_path))
        row.note = f"{found.decision.why}\nthe shipped engine: {proven}"
        row.error = "; ".join(failure.message for failure in found.failures)


def _graphs(folder: Path, options: Options) -> dict[str, Path]:
    """Both graphs, in float16."""
    dense = models.dense(options, LAYERS + 1)
    given = models.block_inputs(dense, models.inputs(dense, options))
    paths = {}
    for name in ("dense", "pruned"):
        blocks = Blocks(dense).eval()
        if name == "pruned":
            for linear in blocks.modules():
                if isinstance(linear, nn.Linear) and linear.in_features % 4 == 0:
                    linear.weight = nn.Parameter(models.forced(linear.weight), requires_grad=False)
        component = Component(
            name="transformer",
            module=blocks.float().cpu(),
            inputs={key: tensor.float().cpu() for key, tensor in given.items()},
            dynamic_axes={},
            outputs=("image", "text"),
            config={},
        )
        paths[name] = onnx.export(component, folder / name, dtype=torch.float16).path
    return paths
