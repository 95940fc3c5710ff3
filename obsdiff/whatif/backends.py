"""What `whatif` times on: TensorRT where it can run, else torch on the GPU, else ONNX Runtime on the CPU."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from obsdiff.settings import Settings
from obsdiff.whatif.steps import OrtRunner, Runner
from obsdiff_export import running
from obsdiff_export.build import BUILDERS, choose_builder
from obsdiff_export.builders.request import Builder
from obsdiff_export.measuring import Measurer, OnnxRuntimeCpu
from obsdiff_export.profiles import Size
from obsdiff_runtime.backends.trt import TENSORRT
from obsdiff_runtime.errors import CompatibilityError, ConfigError, MissingPackageError

BACKENDS: Final = ("auto", "tensorrt", "torch", "cpu")

DTYPES: Final[Mapping[str, str]] = {
    **running.DTYPES,
    "int8": "int8",
    "fp8": "float8",
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """What times linears, and what runs a whole graph, or why nothing does."""

    measurer: Measurer
    runner: Runner | str


def place_of(backend: str, settings: Settings, *, threads: int | None, folder: Path) -> Place:
    """The backend of that name, or for "auto" the best that runs here.

    Args:
        backend: of BACKENDS.
        settings: dtype, and whether engines are to be built even where none can be timed.
        threads: of ONNX Runtime; None: all cores.
        folder: for engines.

    Raises:
        ConfigError: no such backend, or a precision that it does not time.
        CompatibilityError: it cannot run here.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"--backend {backend}: unknown; there are {', '.join(BACKENDS)}")
    obstacle = running.obstacle()
    if backend == "tensorrt" and obstacle:
        raise CompatibilityError(f"--backend tensorrt: {obstacle}")
    if backend == "torch" and not torch.cuda.is_available():
        raise CompatibilityError("--backend torch: this torch sees no CUDA GPU; take --backend cpu, or --gpu NAME")
    if backend == "tensorrt" or (backend == "auto" and not obstacle):
        return _tensorrt(dtype_of(settings, "fp16", "fp16", "bf16", "fp32"), folder)
    if backend == "torch" or (backend == "auto" and torch.cuda.is_available()):
        from obsdiff_export.semi_structured import TorchCuda

        why = f"torch times linears alone, and engines cannot run here: {obstacle}"
        return Place(measurer=TorchCuda(dtype_of(settings, "fp16", "fp16", "bf16")), runner=why)
    dtype_of(settings, "fp32", "fp32", *(("fp16", "bf16") if settings.trt else ()))
    runner: Runner = _built_only(settings, folder) if settings.trt else OrtRunner(threads=threads)
    return Place(measurer=OnnxRuntimeCpu(threads), runner=runner)


def dtype_of(settings: Settings, default: str, *known: str) -> str:
    """The precision asked for, by ONNX's name.

    Raises:
        ConfigError: it is none of those that are known here.
    """
    asked = settings.dtype if settings.dtype not in (None, "auto") else default
    if asked not in known:
        raise ConfigError(f"--dtype {asked}: what is here times {', '.join(known)}; --gpu NAME estimates others")
    return DTYPES[asked]


@dataclass(frozen=True, kw_only=True)
class EngineRunner:
    """Engines of one builder; where they cannot run they are built all the same, and that is said."""

    builder: Builder
    dtype: torch.dtype
    folder: Path
    obstacle: str = ""
    targets: tuple[str, ...] = ()
    sparse: str = ""

    @contextmanager
    def open(
        self, name: str, graph: Path, sizes: Mapping[str, Size], inputs: Mapping[str, Any], *, sparse: bool
    ) -> Iterator[Callable[[], object]]:
        place = self.folder / name.replace(":", "-").replace(" ", "-")
        engine = running.build_for(graph, place, self.builder, sizes, self.targets, sparse=sparse)
        if self.obstacle:
            raise CompatibilityError(
                f"built by {engine.backend} {engine.backend_version} in {engine.seconds:.1f} s, "
                f"{engine.bytes / 2**20:.1f} MiB, but not timed: {self.obstacle}"
            )
        with running.running(engine, name, inputs) as run:
            yield run


def _tensorrt(dtype: str, folder: Path) -> Place:
    runner = EngineRunner(builder=BUILDERS["tensorrt"], dtype=getattr(torch, dtype), folder=folder / "steps")
    return Place(measurer=running.linears(dtype, folder / "linears"), runner=runner)


def _built_only(settings: Settings, folder: Path) -> EngineRunner:
    """Engines that nothing here can run.

    Raises:
        MissingPackageError: nothing here can build one either.
    """
    builder = choose_builder()
    if builder.name == "tensorrt":
        raise MissingPackageError(f"engines are built but not run here: {TENSORRT.obstacle()}")
    return EngineRunner(
        builder=builder,
        dtype=getattr(torch, dtype_of(settings, "fp16", "fp32", "fp16", "bf16")),
        folder=folder / "steps",
        obstacle=f"engines of {builder.name} are not run here; take a machine with TensorRT and a GPU",
        targets=tuple(settings.targets or ()),
        sparse=f"{builder.name} ignores sparse weights" if builder.name == "tensorrt_rtx" else "",
    )
