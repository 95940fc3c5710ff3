"""ONNX Runtime: runs the bundle's graphs as they are, on the CPU or by its own kernels on an NVIDIA GPU."""

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from obsdiff_runtime.backends.feeds import check_names
from obsdiff_runtime.bundle import AUTOENCODER, Bundle, TensorEntry
from obsdiff_runtime.errors import CompatibilityError, ConfigError, MissingPackageError, ResourceError, first_line

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
PROVIDER_OPTIONS: Final[dict[str, dict[str, str]]] = {CUDA: {"use_tf32": "0"}}
"""A float32 graph is computed in float32."""

DTYPES: Final[dict[str, str]] = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}

_NO_MEMORY: Final = re.compile("Failed to allocate memory|bad_alloc|out of memory", re.IGNORECASE)

EXACT_INTEGERS: Final = ("session.x64quantprecision", "1")
"""Option of a session: without it, sums of 8-bit products saturate at 16 bits on CPUs that have no VNNI."""


class OrtSession:
    """A graph in ONNX Runtime; see `backends.Session`."""

    def __init__(self, session: Any, name: str) -> None:
        self._session = session
        self._name = name
        self.inputs = tuple(_entry(value) for value in session.get_inputs())
        self.outputs = tuple(_entry(value) for value in session.get_outputs())
        self.device: str = session.get_providers()[0]
        self._dtypes = {entry.name: np.dtype(entry.dtype) for entry in self.inputs}

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        check_names(self._name, list(self._dtypes), inputs)
        names = [entry.name for entry in self.outputs] if outputs is None else list(outputs)
        feeds = {name: np.ascontiguousarray(array, dtype=self._dtypes[name]) for name, array in inputs.items()}
        try:
            arrays = self._session.run(names, feeds)
        except _run_errors() as error:
            shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in feeds.items())
            if _NO_MEMORY.search(str(error)):
                raise ResourceError(f"{self._name}: memory is too small for {shapes}: {first_line(error)}") from error
            raise ConfigError(f"{self._name} does not take {shapes}: {first_line(error)}") from error
        return {
            name: array.astype(np.float32) if array.dtype == np.float16 else array
            for name, array in zip(names, arrays, strict=True)
        }


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime with one execution provider; see `backends.Backend`."""

    provider: str

    def open_session(self, bundle: Bundle, component: str, *, threads: int | None = None) -> OrtSession:
        return open_graph(
            bundle.onnx(component),
            name=component,
            threads=threads,
            provider=self.provider,
            plan_memory=component not in AUTOENCODER,  # which is given tiles of several shapes
        )

    def versions(self) -> dict[str, str]:
        return versions()


def open_graph(
    path: Path,
    *,
    name: str | None = None,
    threads: int | None = None,
    provider: str = CPU,
    plan_memory: bool = True,
) -> OrtSession:
    """Loads an ONNX file.

    Args:
        path: the graph; its external data lies beside it.
        name: what messages call it; the path if None.
        threads: of the host, all if None.
        provider: the execution provider; others are no fallback for it.
        plan_memory: reserve what a run needs as one piece, and keep one for each shape.

    Raises:
        MissingPackageError: onnxruntime is not installed.
        CompatibilityError: the graph cannot be loaded, or would run on another provider.
    """
    onnxruntime = _import()
    if provider not in onnxruntime.get_available_providers():
        available = ", ".join(onnxruntime.get_available_providers())
        advice = "; pip install 'obsdiff-runtime[gpu]', in an environment without [cpu]" if provider == CUDA else ""
        raise CompatibilityError(
            f"onnxruntime {onnxruntime.__version__} here has no {provider}; it has {available}{advice}"
        )
    label = name or str(path)
    if provider == CUDA:
        _find_cuda(onnxruntime)
    try:
        session = onnxruntime.InferenceSession(
            str(path),
            _options(onnxruntime, threads, plan_memory),
            providers=[(provider, PROVIDER_OPTIONS.get(provider, {}))],
            enable_fallback=0,
        )
    except _run_errors() as error:
        raise CompatibilityError(
            f"onnxruntime {onnxruntime.__version__} cannot load {label} ({path}): {first_line(error)}"
        ) from error
    used = session.get_providers()
    if used[0] != provider:
        raise CompatibilityError(
            f"{label}: {provider} was asked for, but onnxruntime chose {used[0]}; obsdiff doctor says what is missing"
        )
    for value in session.get_inputs():
        if DTYPES.get(value.type) in (None, "bfloat16"):
            raise CompatibilityError(f"{label}: input {value.name} is a {value.type}, which numpy has no type for")
    return OrtSession(session, label)


def versions() -> dict[str, str]:
    return {"onnxruntime": _import().__version__}


def _import() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "onnxruntime is absent: pip install 'obsdiff[cpu]', or without torch pip install 'obsdiff-runtime[cpu]'"
        ) from error
    return onnxruntime


def _find_cuda(onnxruntime: Any) -> None:
    """Loads CUDA's libraries from where pip puts them, without torch.

    What that prints of those it misses says nothing that the session's own error does not. And where cuDNN has no fused
    kernel for a convolution, ONNX Runtime logs an error, then takes an unfused one: only fatal errors are let through.
    """
    onnxruntime.set_default_logger_severity(4)
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()


def _options(onnxruntime: Any, threads: int | None, plan_memory: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.enable_mem_pattern = plan_memory
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    # Without it the threads of one session still spin when the next one starts.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry(*EXACT_INTEGERS)
    return options


def _run_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile,
            state.NotImplemented, state.RuntimeException)  # fmt: skip


def _entry(value: Any) -> TensorEntry:
    shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return TensorEntry(name=value.name, dtype=DTYPES.get(value.type, value.type), shape=shape)
