"""The CUDA runtime through cuda-python: device buffers, one stream, graphs; error codes become errors of ours.

`import cuda.bindings.runtime`, or `cuda.cudart` as it was called before cuda-python 12.6; imported when first used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from obsdiff_runtime.errors import CompatibilityError, MissingPackageError, ObsdiffError, ResourceError, RunError

RUNTIME_NAMES: Final = (
    "cudaDeviceAttr",
    "cudaDeviceGetAttribute",
    "cudaError_t",
    "cudaFree",
    "cudaGetDevice",
    "cudaGetDeviceProperties",
    "cudaGetErrorName",
    "cudaGetErrorString",
    "cudaGraphDestroy",
    "cudaGraphExecDestroy",
    "cudaGraphInstantiate",
    "cudaGraphLaunch",
    "cudaMalloc",
    "cudaMemGetInfo",
    "cudaMemcpyAsync",
    "cudaMemcpyKind",
    "cudaStreamBeginCapture",
    "cudaStreamCaptureMode",
    "cudaStreamCreateWithFlags",
    "cudaStreamDestroy",
    "cudaStreamEndCapture",
    "cudaStreamNonBlocking",
    "cudaStreamSynchronize",
)
"""What is used of cuda-python; a test holds the real package to it."""

ALIGNMENT: Final = 256
"""Of device buffers, in bytes; cudaMalloc gives it, TensorRT asks for it."""

_NO_GPU: Final = ("cudaErrorInsufficientDriver", "cudaErrorNoDevice", "cudaErrorStubLibrary", "cudaErrorInvalidDevice")


@dataclass(frozen=True, kw_only=True)
class Device:
    """The GPU in use: its name, its compute capability ("8.6"), and its memory in all."""

    name: str
    capability: str
    memory_bytes: int


class Stream:
    """A stream, and memory of the current GPU. Everything is freed by `close`, in the reverse order."""

    def __init__(self, cuda: "Cuda") -> None:
        self._cuda = cuda
        self._stream = cuda.call("cudaStreamCreateWithFlags", cuda.runtime.cudaStreamNonBlocking)
        self.handle = cuda.handle_of(self._stream)
        self.reserved_bytes = 0
        self._release: list[Callable[[], object]] = [lambda: cuda.call("cudaStreamDestroy", self._stream)]
        self._graph: Any = None

    def reserve(self, size: int) -> int:
        """Address of `size` bytes of device memory, at least one.

        Raises:
            ResourceError: the GPU has not that much left.
        """
        address = int(self._cuda.call("cudaMalloc", max(size, 1)))
        self._release.append(lambda: self._cuda.call("cudaFree", address))
        self.reserved_bytes += max(size, 1)
        return address

    def write(self, address: int, array: np.ndarray) -> None:
        """Copies to the device; `array` is contiguous and stays as it is until `wait` returns."""
        kind = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._cuda.call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)

    def read(self, address: int, array: np.ndarray) -> None:
        """Copies from the device; `array` is contiguous and holds the values once `wait` has returned."""
        kind = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._cuda.call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)

    def wait(self) -> None:
        """Returns when everything enqueued so far is done."""
        self._cuda.call("cudaStreamSynchronize", self._stream)

    def capture(self, enqueue: Callable[[], None]) -> None:
        """Records what `enqueue` puts on the stream, for `launch`; it is not run now.

        Raises:
            ObsdiffError: what `enqueue` raised, or CUDA because of what it did; nothing is recorded then.
        """
        self.forget()
        # Thread local: what other threads do meanwhile, allocating say, would break a global capture.
        mode = self._cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._cuda.call("cudaStreamBeginCapture", self._stream, mode)
        try:
            enqueue()
        except ObsdiffError:
            _, *unfinished = self._cuda.runtime.cudaStreamEndCapture(self._stream)  # fails because of what is raised
            if unfinished and unfinished[0]:
                self._cuda.runtime.cudaGraphDestroy(unfinished[0])
            raise
        graph = self._cuda.call("cudaStreamEndCapture", self._stream)
        try:
            self._graph = self._cuda.call("cudaGraphInstantiate", graph, 0)
        finally:
            self._cuda.call("cudaGraphDestroy", graph)

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def launch(self) -> None:
        """Puts the recorded graph on the stream."""
        self._cuda.call("cudaGraphLaunch", self._graph, self._stream)

    def forget(self) -> None:
        """Drops the recorded graph; the stream must be idle."""
        graph, self._graph = self._graph, None
        if graph is not None:
            self._cuda.call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Frees everything; may be called again."""
        self.forget()
        while self._release:
            self._release.pop()()


class Cuda:
    """cuda-python's runtime API with errors raised."""

    def __init__(self, runtime: Any, handle_of: Callable[[Any], int]) -> None:
        self.runtime = runtime
        self.handle_of = handle_of

    def call(self, name: str, *arguments: object) -> Any:
        """What a function of the API returns beside its error code: None, a value, or a tuple of them.

        Raises:
            CompatibilityError: there is no GPU or no driver that fits.
            ResourceError: no device memory is left.
            RunError: anything else that CUDA reports.
        """
        try:
            error, *values = getattr(self.runtime, name)(*arguments)
        except RuntimeError as failure:  # cuda-python before 12.6, where the driver's library is absent
            raise _no_gpu(f"{name}: {failure}") from failure
        if error != self.runtime.cudaError_t.cudaSuccess:
            raise self._error(name, error, arguments)
        return None if not values else values[0] if len(values) == 1 else tuple(values)

    def device(self) -> Device:
        """The GPU in use.

        Raises:
            CompatibilityError: there is none, or its driver is too old.
        """
        index, attributes = self.call("cudaGetDevice"), self.runtime.cudaDeviceAttr
        major, minor = (
            self.call("cudaDeviceGetAttribute", attribute, index)
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        )
        properties = self.call("cudaGetDeviceProperties", index)
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        memory_bytes = int(self.call("cudaMemGetInfo")[1])
        return Device(name=name.rstrip("\0"), capability=f"{major}.{minor}", memory_bytes=memory_bytes)

    def _error(self, name: str, error: Any, arguments: tuple[object, ...]) -> ObsdiffError:
        code = str(getattr(error, "name", error))
        text = self.runtime.cudaGetErrorString(error)[1]
        said = f"{name}: {text.decode() if isinstance(text, bytes) else text} ({code})"
        if code in _NO_GPU:
            return _no_gpu(said)
        if code == "cudaErrorMemoryAllocation":
            wanted = f"; {arguments[0]} bytes were asked for" if name == "cudaMalloc" else ""
            return ResourceError(
                f"the GPU is out of memory{wanted}: {said}; end other programs on it, or build for smaller sizes"
            )
        return RunError(f"the GPU failed: {said}; `dmesg` and `nvidia-smi` may say why")


def load(extra: str = "trt") -> Cuda:
    """cuda-python; `extra` of obsdiff is what to install where it is absent.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        try:
            from cuda.bindings import runtime
        except ModuleNotFoundError:
            from cuda import cudart as runtime
    except ImportError as error:
        raise MissingPackageError(
            f"cuda-python is absent: pip install 'obsdiff[{extra}]', or without torch 'obsdiff-runtime[{extra}]'"
        ) from error
    return Cuda(runtime, _handles())


def _no_gpu(said: str) -> CompatibilityError:
    return CompatibilityError(
        f"no NVIDIA GPU can be used here: {said}. `nvidia-smi` should list one; if it does, its driver is older than "
        "cuda-python: update the driver, or pip install 'cuda-python<13'"
    )


def _handles() -> Callable[[Any], int]:
    """What gives a CUDA object's address: int() is on its way out since cuda-python 13."""
    try:
        from cuda.bindings.utils import get_cuda_native_handle
    except ImportError:
        return int
    return get_cuda_native_handle  # type: ignore[no-any-return]
