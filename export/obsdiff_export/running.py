"""Engines of TensorRT that are built to be run at once, on the GPU that is here."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from obsdiff_export.build import BUILDERS, Engine, build
from obsdiff_export.builders.request import Builder, Flags
from obsdiff_export.measuring import Measurer, OnnxRuntimeCpu, TensorRtLinear
from obsdiff_export.ports import read_ports
from obsdiff_export.profiles import Size, profiles_for
from obsdiff_runtime.backends.trt import TENSORRT
from obsdiff_runtime.errors import CompatibilityError, ConfigError

DTYPES: Final = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def obstacle() -> str:
    """Why no such engine can be built and run here, "" where one can."""
    return BUILDERS["tensorrt"].missing() or TENSORRT.obstacle()


def build_for(
    graph: Path, folder: Path, builder: Builder, sizes: Mapping[str, Size], targets: tuple[str, ...], *, sparse: bool
) -> Engine:
    """An engine of one profile, from a graph whose dynamic axes are of these sizes."""
    ports, _ = read_ports(graph)
    profiles = profiles_for(ports, [sizes])
    return build(graph, folder, builder=builder, profiles=profiles, flags=Flags(sparse=sparse), targets=targets)


@contextmanager
def running(engine: Engine, name: str, inputs: Mapping[str, Any]) -> Iterator[Callable[[], object]]:
    """Runs it once more and waits for its end; inputs and outputs stay on the GPU."""
    session = TENSORRT.open_plan(engine.path, name=name)
    try:
        session.run(inputs)
        yield session.rerun
    finally:
        session.close()


def measurer_of(backend: str, dtype: str | None, threads: int | None, folder: Path) -> Measurer:
    """What times linears.

    Args:
        backend: "tensorrt" or "cpu".
        dtype: "fp16", "bf16" or "fp32"; None: the backend's usual one.
        threads: of ONNX Runtime; None: all cores.
        folder: for graphs and engines.

    Raises:
        ConfigError: no such backend, or a precision that it does not time.
        CompatibilityError: it cannot run here.
    """
    known = {"tensorrt": tuple(DTYPES), "cpu": ("fp32",)}
    if backend not in known:
        raise ConfigError(f"--backend {backend}: unknown; there are {', '.join(known)}")
    if dtype is not None and dtype not in known[backend]:
        raise ConfigError(f"--dtype {dtype}: --backend {backend} times {', '.join(known[backend])}")
    if backend == "cpu":
        return OnnxRuntimeCpu(threads)
    if why := obstacle():
        raise CompatibilityError(f"--backend tensorrt: {why}")
    return linears(DTYPES[dtype or "fp16"], folder)


def linears(dtype: str, folder: Path) -> TensorRtLinear:
    """What times linears on the GPU that is here.

    Args:
        dtype: "float16", "bfloat16" or "float32".
        folder: for graphs and engines.
    """
    builder = BUILDERS["tensorrt"]

    @contextmanager
    def run(graph: Path, place: Path, sparse: bool) -> Iterator[Callable[[], object]]:
        (x,), _ = read_ports(graph)
        shape = tuple(int(size) for size in x.shape)
        inputs = {x.name: np.random.default_rng(1).standard_normal(shape, dtype=np.float32)}
        engine = build_for(graph, place / "engine", builder, {}, (), sparse=sparse)
        with running(engine, "engine", inputs) as rerun:
            yield rerun

    return TensorRtLinear(
        run,
        folder,
        device=TENSORRT.load()[1].device().name,
        versions={"tensorrt": builder.version()},
        dtype=dtype,
    )
