"""A GPU that is none: `cuda.bindings.runtime` and `tensorrt` with the semantics their documentation gives.

The device's memory is bytes by address. A stream holds work that is done when it is waited for, in order, so that
whoever reads too early reads what was there before. Recording puts work aside instead. A context sets itself up in
the first run of a shape and cannot be recorded before; changing its shapes makes an earlier recording invalid.
"""

import enum
import json
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

MAGIC = b"fake plan "


class Error(enum.Enum):
    cudaSuccess = 0  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorInsufficientDriver = 35  # noqa: N815
    cudaErrorIllegalAddress = 700  # noqa: N815
    cudaErrorStreamCaptureUnsupported = 900  # noqa: N815
    cudaErrorStreamCaptureInvalidated = 901  # noqa: N815


class FailedError(Exception):
    def __init__(self, error: Error) -> None:
        self.error = error


Work = Callable[[], None]


class Handle:
    """A stream or a graph; streams have work to do, or are being recorded."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.queue: list[Work] = []
        self.recording: list[Work] | None = None
        self.broken = False

    def __int__(self) -> int:
        return self.number


class Gpu:
    """The device, and what a test sees of it."""

    errors = Error

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.capacity_bytes = 1 << 20
        self.free_address = 0x1000
        self.streams: dict[int, Handle] = {}
        self.graphs: list[Handle] = []
        self.calls: list[str] = []
        self.capability = (9, 0)
        self.driver = True
        self.fail: dict[str, Error] = {}
        self.refuse_recording = False
        self.refuse_running = False

    @property
    def used_bytes(self) -> int:
        return sum(block.nbytes for block in self.memory.values())

    def block(self, address: int) -> np.ndarray:
        if address not in self.memory:
            raise FailedError(Error.cudaErrorIllegalAddress)
        return self.memory[address]

    def put(self, stream: Handle, work: Work) -> None:
        (stream.queue if stream.recording is None else stream.recording).append(work)


def host(address: int, size: int) -> np.ndarray:
    import ctypes

    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (size,))


class FakeRuntime(types.ModuleType):
    """cuda.bindings.runtime: functions that return an error and, in success, values."""

    cudaError_t = Error  # noqa: N815
    cudaStreamNonBlocking = 1  # noqa: N815
    cudaMemcpyKind = enum.Enum("cudaMemcpyKind", "cudaMemcpyHostToDevice cudaMemcpyDeviceToHost")  # noqa: N815
    cudaStreamCaptureMode = enum.Enum("cudaStreamCaptureMode", "cudaStreamCaptureModeThreadLocal")  # noqa: N815
    cudaDeviceAttr = enum.Enum(  # noqa: N815
        "cudaDeviceAttr", "cudaDevAttrComputeCapabilityMajor cudaDevAttrComputeCapabilityMinor"
    )

    def __init__(self, gpu: Gpu) -> None:
        super().__init__("cuda.bindings.runtime")
        self.gpu = gpu
        for name in dir(type(self)):
            if name.startswith("do_"):
                setattr(self, name[3:], self.checked(name[3:], getattr(self, name)))

    def checked(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        values = 1 if name in VALUED else 0

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.gpu.calls.append(name)
            try:
                if not self.gpu.driver:
                    raise FailedError(Error.cudaErrorInsufficientDriver)
                if name in self.gpu.fail:
                    raise FailedError(self.gpu.fail[name])
                result = function(*arguments)
            except FailedError as failure:
                return (failure.error, *[None] * values)
            return (Error.cudaSuccess,) if result is None else (Error.cudaSuccess, result)

        return call

    def cudaGetErrorString(self, error: Error) -> tuple[Error, bytes]:  # noqa: N802
        return Error.cudaSuccess, error.name.removeprefix("cudaError").encode()

    def do_cudaGetDevice(self) -> int:  # noqa: N802
        return 0

    def do_cudaDeviceGetAttribute(self, attribute: Any, device: int) -> int:  # noqa: N802
        return self.gpu.capability[attribute.value - 1]

    def do_cudaGetDeviceProperties(self, device: int) -> Any:  # noqa: N802
        return types.SimpleNamespace(name=b"Fake GPU\0\0")

    def do_cudaMemGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return self.gpu.capacity_bytes - self.gpu.used_bytes, self.gpu.capacity_bytes

    def do_cudaMalloc(self, size: int) -> int:  # noqa: N802
        if self.gpu.used_bytes + size > self.gpu.capacity_bytes:
            raise FailedError(Error.cudaErrorMemoryAllocation)
        self.gpu.free_address += 256 * (size // 256 + 1)
        self.gpu.memory[self.gpu.free_address] = np.full(size, 0xCD, np.uint8)
        return self.gpu.free_address

    def do_cudaFree(self, address: int) -> None:  # noqa: N802
        self.gpu.block(address)
        del self.gpu.memory[address]

    def do_cudaStreamCreateWithFlags(self, flags: int) -> Handle:  # noqa: N802
        stream = Handle(len(self.gpu.streams) + 7)
        self.gpu.streams[stream.number] = stream
        return stream

    def do_cudaStreamDestroy(self, stream: Handle) -> None:  # noqa: N802
        del self.gpu.streams[stream.number]

    def do_cudaStreamSynchronize(self, stream: Handle) -> None:  # noqa: N802
        if stream.recording is not None:
            stream.broken = True
            raise FailedError(Error.cudaErrorStreamCaptureUnsupported)
        time.sleep(1e-4)  # other threads get their chance
        queue, stream.queue = stream.queue, []
        for work in queue:
            work()

    def do_cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: Handle) -> None:  # noqa: N802
        to_device = kind is self.cudaMemcpyKind.cudaMemcpyHostToDevice

        def copy() -> None:
            block = self.gpu.block(target if to_device else source)
            if size > block.nbytes:
                raise FailedError(Error.cudaErrorIllegalAddress)
            if to_device:
                block[:size] = host(source, size)
            elif size:
                host(target, size)[:] = block[:size]

        self.gpu.put(stream, copy)

    def do_cudaStreamBeginCapture(self, stream: Handle, mode: Any) -> None:  # noqa: N802
        stream.recording, stream.broken = [], False

    def do_cudaStreamEndCapture(self, stream: Handle) -> Handle:  # noqa: N802
        recording, stream.recording = stream.recording, None
        if stream.broken or recording is None:
            raise FailedError(Error.cudaErrorStreamCaptureInvalidated)
        graph = Handle(len(self.gpu.graphs) + 100)
        graph.queue = recording
        self.gpu.graphs.append(graph)
        return graph

    def do_cudaGraphInstantiate(self, graph: Handle, flags: int) -> Handle:  # noqa: N802
        made = Handle(graph.number + 1000)
        made.queue = list(graph.queue)
        self.gpu.graphs.append(made)
        return made

    def do_cudaGraphLaunch(self, graph: Handle, stream: Handle) -> None:  # noqa: N802
        assert graph in self.gpu.graphs
        for work in graph.queue:
            self.gpu.put(stream, work)

    def do_cudaGraphDestroy(self, graph: Handle) -> None:  # noqa: N802
        self.gpu.graphs.remove(graph)

    do_cudaGraphExecDestroy = do_cudaGraphDestroy  # noqa: N815


VALUED = {
    "cudaGetDevice",
    "cudaDeviceGetAttribute",
    "cudaGetDeviceProperties",
    "cudaMemGetInfo",
    "cudaMalloc",
    "cudaStreamCreateWithFlags",
    "cudaStreamEndCapture",
    "cudaGraphInstantiate",
}


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    BF16 = 7
    INT64 = 8
    FP8 = 6


STORED = {"FLOAT": np.float32, "HALF": np.float16, "BF16": np.uint16, "INT64": np.int64, "FP8": np.uint8}

TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT", start=0)
TensorLocation = enum.Enum("TensorLocation", "DEVICE HOST", start=0)
Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)


class ILogger:
    Severity = Severity

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class FakeTensorRt(types.ModuleType):
    """tensorrt, with one network: y = 2 x + k, where x is (batch, width) and k (batch, 1), int64."""

    ILogger, TensorIOMode, TensorLocation, DataType = ILogger, TensorIOMode, TensorLocation, DataType

    def __init__(self, gpu: Gpu, name: str, version: str) -> None:
        super().__init__(name)
        self.gpu, self.__version__ = gpu, version
        self.Runtime = lambda logger: types.SimpleNamespace(
            deserialize_cuda_engine=lambda plan: self.deserialize(plan, logger)
        )

    def deserialize(self, plan: bytes, logger: ILogger) -> "FakeEngine | None":
        data = json.loads(plan[len(MAGIC) :]) if plan.startswith(MAGIC) else {"version": "?"}
        if data["version"] != self.__version__:
            logger.log(Severity.INFO, "loading")
            logger.log(Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization assertion failed")
            return None
        return FakeEngine(self.gpu, data, logger)


class FakeEngine:
    def __init__(self, gpu: Gpu, data: dict[str, Any], logger: ILogger) -> None:
        self.gpu, self.data, self.logger = gpu, data, logger
        self.num_io_tensors = len(data["tensors"])
        self.num_optimization_profiles = len(data["profiles"])
        self.device_memory_size_v2 = 4096
        self.streamable_weights_size = data.get("streamable", 0)
        self.weight_streaming_budget_v2 = self.streamable_weights_size

    def get_weight_streaming_automatic_budget(self) -> int:
        return self.streamable_weights_size // 2

    def get_tensor_name(self, index: int) -> str:
        return list(self.data["tensors"])[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self.data["tensors"][name]["dtype"]]

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(self.data["tensors"][name]["shape"])

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.OUTPUT if name == "y" else TensorIOMode.INPUT

    def get_tensor_location(self, name: str) -> Any:
        return TensorLocation[self.data["tensors"][name].get("location", "DEVICE")]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        return [list(shape) for shape in self.data["profiles"][profile][name]]

    def create_execution_context(self) -> "FakeContext | None":
        if self.device_memory_size_v2 > self.gpu.capacity_bytes:
            self.logger.log(Severity.ERROR, "Error Code 2: OutOfMemory")
            return None
        return FakeContext(self)


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.gpu = engine, engine.gpu
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.generation = 0
        self.set_up_for = -1

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if not 0 <= index < self.engine.num_optimization_profiles:
            return False
        self.profile, self.shapes, self.generation = index, {}, self.generation + 1
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        if len(shape) != len(low) or any(not a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            self.engine.logger.log(Severity.ERROR, f"Supplied binding dimension {shape} for {name} is out of range")
            return False
        if self.shapes.get(name) != shape:
            self.generation += 1
        self.shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in ("x", "k") if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> list[int]:
        if self.engine.data.get("values_decide") and name == "y":
            return [-1, 3]
        return list(self.shapes.get("x" if name == "y" else name, (-1, -1)))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, handle: int) -> bool:
        stream = self.gpu.streams[handle]
        if self.gpu.refuse_running or self.infer_shapes() or set(self.addresses) != {"x", "k", "y"}:
            self.engine.logger.log(Severity.ERROR, "IExecutionContext::enqueueV3: Error Code 3: API Usage Error")
            return False
        if stream.recording is not None and (self.gpu.refuse_recording or self.set_up_for != self.generation):
            self.engine.logger.log(Severity.ERROR, "operation not permitted when stream is capturing")
            stream.broken = True
            return False
        self.set_up_for = generation = self.generation
        shapes, addresses = dict(self.shapes), dict(self.addresses)

        def compute() -> None:
            assert generation == self.generation, "a recording of other shapes was run"
            batch, width = shapes["x"]
            dtype = self.engine.data["tensors"]["x"]["dtype"]
            x = self.gpu.block(addresses["x"]).view(STORED[dtype])[: batch * width].reshape(batch, width)
            k = self.gpu.block(addresses["k"]).view(np.int64)[:batch].reshape(batch, 1)
            if dtype == "BF16":
                wide = (x.astype(np.uint32) << 16).view(np.float32)
                y = ((2 * wide + k).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            else:
                y = (2 * x + k).astype(x.dtype)
            self.gpu.block(addresses["y"])[: y.nbytes] = y.reshape(-1).view(np.uint8)

        self.gpu.put(stream, compute)
        return True


def write_plan(
    path: Path, *, profiles: list[tuple[int, int, int]], dtype: str = "FLOAT", version: str = "10.3.0", **more: Any
) -> Path:
    """A plan whose batch may be (smallest, best, largest) in each profile; x is 3 wide."""
    dynamic = any(low != high for low, _, high in profiles)
    batch = -1 if dynamic else profiles[0][0]
    tensors = {
        "x": {"dtype": dtype, "shape": [batch, 3]},
        "k": {"dtype": "INT64", "shape": [batch, 1]},
        "y": {"dtype": dtype, "shape": [batch, 3]},
    }
    ranges = [{name: [[size, width] for size in sizes] for name, width in (("x", 3), ("k", 1))} for sizes in profiles]
    for name, change in more.pop("tensors", {}).items():
        tensors[name].update(change)
    data = {"version": version, "tensors": tensors, "profiles": ranges, **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(MAGIC + json.dumps(data).encode())
    return path


@pytest.fixture
def plan() -> Callable[..., Path]:
    return write_plan


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """The fake GPU, with both packages in `sys.modules`."""
    from obsdiff_runtime.backends import trt

    device = Gpu()
    bindings = types.ModuleType("cuda.bindings")
    runtime = FakeRuntime(device)
    bindings.runtime = runtime  # type: ignore[attr-defined]
    package = types.ModuleType("cuda")
    package.bindings = bindings  # type: ignore[attr-defined]
    for name, module in {
        "cuda": package,
        "cuda.bindings": bindings,
        "cuda.bindings.runtime": runtime,
        "cuda.bindings.utils": None,
        "tensorrt": FakeTensorRt(device, "tensorrt", "10.3.0"),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    trt._logger.cache_clear()
    yield device
    trt._logger.cache_clear()
