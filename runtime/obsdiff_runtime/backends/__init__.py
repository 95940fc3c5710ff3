"""What executes a component. A backend is a line in BACKENDS, and a module here where it is a library of its own."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from obsdiff_runtime.backends import openvino, ort, trt
from obsdiff_runtime.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from obsdiff_runtime.bundle import Bundle, TensorEntry


class Session(Protocol):
    """One loaded component."""

    @property
    def inputs(self) -> "tuple[TensorEntry, ...]": ...

    @property
    def outputs(self) -> "tuple[TensorEntry, ...]": ...

    @property
    def device(self) -> str:
        """What it really runs on, for reports: "CPUExecutionProvider"."""
        ...

    def run(self, inputs: "Mapping[str, np.ndarray]", outputs: Sequence[str] | None = None) -> "dict[str, np.ndarray]":
        """Runs the component once.

        Args:
            inputs: every input by name; floating ones are cast to the component's dtype.
            outputs: names of those wanted; all if None.

        Returns:
            Outputs by name, floating ones in float32.

        Raises:
            ConfigError: an input is missing or unknown, or its shape is not one the component takes.
            ResourceError: memory is too small for it.
        """
        ...


class Backend(Protocol):
    def open_session(self, bundle: "Bundle", component: str, *, threads: int | None = None) -> Session:
        """Loads a component; `threads` of the host it may use, all of them if None.

        Raises:
            MissingPackageError: the backend's package is not installed.
            CompatibilityError: the backend cannot run this component here.
        """
        ...

    def versions(self) -> dict[str, str]:
        """Versions of what executes, for reports."""
        ...


BACKENDS: Final[dict[str, Backend]] = {
    "onnxruntime": ort.OnnxRuntime(ort.CPU),
    "onnxruntime_cuda": ort.OnnxRuntime(ort.CUDA),
    "openvino": openvino.OpenVino("f32"),
    "openvino_bf16": openvino.OpenVino("bf16"),
    trt.TENSORRT.package: trt.TENSORRT,
    trt.RTX.package: trt.RTX,
}


def backend(name: str) -> Backend:
    """The backend of that name; ConfigError with the list if there is none."""
    if name not in BACKENDS:
        raise ConfigError(f"no backend {name!r}; there are {', '.join(BACKENDS)}")
    return BACKENDS[name]
