"""A toy network with the exporter's traps in it, its exports, and a builder that does what a test says."""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from obsdiff_export import build as build_module
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


@dataclass
class Scripted:
    """A builder whose `compile` runs a script in the building process."""

    folder: Path
    script: str
    name: str = "scripted"
    extra: str = "scripted"
    release: str = "1.0"
    gpu: str = ""
    times_tactics: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        body = textwrap.indent(textwrap.dedent(self.script), " " * 8)
        source = f"class Scripted:\n    def compile(self, request, log):\n{body}\n"
        self.folder.mkdir(exist_ok=True)
        (self.folder / "scripted_builder.py").write_text(source)
        self.environment = {"PYTHONPATH": str(self.folder)}

    def missing(self) -> str:
        return ""

    def version(self) -> str:
        return self.release

    def device(self) -> str:
        return self.gpu

    def targets(self, asked):
        return tuple(asked) or ("8.6",)

    def check(self, flags, targets):
        pass

    def compile(self, request, log):
        raise AssertionError("runs elsewhere")


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "place_of", lambda builder: "scripted_builder:Scripted")
    return lambda script: Scripted(tmp_path / "scripted", script)
