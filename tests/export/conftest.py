"""A toy network with the exporter's traps in it, and its exports."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from obsdiff_export.component import Component
from obsdiff_export.onnx import OnnxModel, export


class Toy(nn.Module):
    """Linears on 2-D (Gemm) and 3-D (MatMul) inputs, equal biases, float64 inside, a squeeze that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.up = nn.Linear(16, 32)
        self.gate = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16, bias=False)
        self.register_buffer("table", torch.linspace(0, 1, 16))
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.gate.bias)

    def forward(self, tokens: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        angles = timestep.double()[:, None] * torch.arange(4, dtype=torch.float64)
        time = torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.embed.weight.dtype)  # (batch, 8)
        shift = self.embed(time)  # (batch, 16)
        x = (tokens + shift[:, None] + self.table).squeeze(1)  # (batch, length, 16): nothing to squeeze
        hidden = self.up(x) * nn.functional.gelu(self.gate(x))
        return self.down(hidden) + x, shift


def make_toy() -> Component:
    def inputs(batch: int, length: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(batch)
        return {
            "tokens": torch.randn(batch, length, 16, generator=generator),
            "timestep": torch.linspace(1, 900, batch),
        }

    return Component(
        name="toy",
        module=Toy().eval(),
        inputs=inputs(2, 5),
        dynamic_axes={"tokens": {0: "batch", 1: "length"}, "timestep": {0: "batch"}},
        outputs=("out", "shift"),
        config={"_class_name": "Toy", "width": 16},
        more_inputs=(inputs(3, 7), inputs(1, 9)),
    )


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def toy() -> Component:
    torch.manual_seed(0)
    return make_toy()


@dataclass(frozen=True)
class Exports:
    """The toy in every dtype, exported once."""

    float32: OnnxModel
    float16: OnnxModel
    bfloat16: OnnxModel


@pytest.fixture(scope="session")
def exports(toy: Component, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    folder = tmp_path_factory.mktemp("toy")
    return Exports(*(export(toy, folder / name, dtype=getattr(torch, name)) for name in Exports.__annotations__))
