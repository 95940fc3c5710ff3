"""One engine on the GPU.

Buffers of the largest shapes that an engine takes are reserved when it is loaded: their addresses never change, and no
run allocates. The first run of a shape is a plain one, in which TensorRT sets itself up; the second is recorded as a
CUDA graph where that is possible, and later ones launch it. A new shape drops the graph, which holds one shape only.
TensorRT-RTX records graphs itself: its kernels of a shape may be replaced while it runs.
"""

import logging
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np

from obsdiff_runtime import shapes as profiles
from obsdiff_runtime.backends.feeds import check_names
from obsdiff_runtime.backends.numbers import DTYPES, from_device, storage, to_device
from obsdiff_runtime.bundle import TensorEntry
from obsdiff_runtime.cuda import Cuda, Stream
from obsdiff_runtime.errors import CompatibilityError, ConfigError, ObsdiffError, ResourceError, RunError
from obsdiff_runtime.shapes import Profile, Range

Shape = tuple[int, ...]

VENDOR_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "": ("ILogger", "Runtime", "TensorIOMode", "TensorLocation", "__version__"),
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "create_execution_context",
        "device_memory_size_v2",
        "get_tensor_dtype",
        "get_tensor_location",
        "get_tensor_mode",
        "get_tensor_name",
        "get_tensor_profile_shape",
        "get_tensor_shape",
        "get_weight_streaming_automatic_budget",
        "num_io_tensors",
        "num_optimization_profiles",
        "streamable_weights_size",
        "weight_streaming_budget_v2",
    ),
    "IExecutionContext": (
        "execute_async_v3",
        "get_tensor_shape",
        "infer_shapes",
        "set_input_shape",
        "set_optimization_profile_async",
        "set_tensor_address",
    ),
    "TensorIOMode": ("INPUT",),
    "TensorLocation": ("HOST",),
}
"""What every version and package must have, by class ("": the module); a test holds the real bindings to it. Used only
where they are: init_libnvinfer_plugins, EngineStat and ICudaEngine.get_engine_stat, CudaGraphStrategy and
ICudaEngine.create_runtime_config, IExecutionContext.is_stream_capturable."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of the GPU that an engine takes, in bytes.

    Attributes:
        weights_bytes: None where this version of TensorRT does not tell.
        activations_bytes: of the largest profile.
        buffers_bytes: of inputs and outputs.
    """

    weights_bytes: int | None
    activations_bytes: int
    buffers_bytes: int


class TrtSession:
    """See `backends.Session`. Runs of several threads wait for each other.

    Attributes:
        device: "NVIDIA H200 (9.0)".
        memory: what it takes there.
    """

    def __init__(
        self,
        vendor: Any,
        runtime: Any,
        engine: Any,
        driver: Cuda,
        *,
        name: str,
        device: str,
        messages: Sequence[str],
        ports: Mapping[str, TensorEntry],
        cuda_graphs: bool,
    ) -> None:
        self._name, self._messages, self.device = name, messages, device
        self._runtime, self._engine = runtime, engine  # the context needs both
        self._ports = _ports(vendor, engine, name, ports)
        self._symbols = {port.name: port.shape for port in ports.values()}
        inputs = [entry for entry, is_input in self._ports if is_input]
        self.inputs = tuple(inputs)
        self.outputs = tuple(entry for entry, is_input in self._ports if not is_input)
        self._profiles = _profiles(engine, inputs)
        _stream_weights(engine)
        self._own_graphs = cuda_graphs
        self._context = self._make_context(vendor, cuda_graphs)
        self._stream = Stream(driver)
        self._free = weakref.finalize(self, self._stream.close)
        self._free.atexit = False  # the driver is gone by then
        self._lock = threading.Lock()
        self._profile, self._shapes, self._warm = 0, dict[str, Shape](), False
        self.graph = "none yet" if cuda_graphs else "off"
        self._addresses = self._reserve()
        self.memory = Memory(
            weights_bytes=_weights_bytes(vendor, engine),
            activations_bytes=int(engine.device_memory_size_v2),
            buffers_bytes=self._stream.reserved_bytes,
        )

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """See `backends.Session.run`.

        Raises:
            ConfigError: an input or output is missing or unknown, or no profile holds the shapes; names the nearest.
            RunError: the GPU or TensorRT failed.
            ResourceError: no memory is left on the GPU.
        """
        feeds, wanted = self._feeds(inputs), self._wanted(outputs)
        with self._lock:
            self._check_open()
            self._prepare({name: tuple(array.shape) for name, array in feeds.items()})
            for name, array in feeds.items():
                self._stream.write(self._addresses[name], array)
            self._launch()
            results = {
                entry.name: np.empty(tuple(self._context.get_tensor_shape(entry.name)), storage(entry.dtype))
                for entry in wanted
            }
            for name, array in results.items():
                self._stream.read(self._addresses[name], array)
            self._stream.wait()
        return {entry.name: from_device(results[entry.name], entry.dtype) for entry in wanted}

    def rerun(self) -> None:
        """Computes again from the inputs of the last run, which lie on the GPU; returns when it is done.

        For timing: nothing is copied.
        """
        with self._lock:
            self._check_open()
            if not self._shapes:
                raise ConfigError(f"{self._name} has not run yet; there is nothing to run again")
            self._launch()
            self._stream.wait()

    def close(self) -> None:
        """Frees the GPU's memory; may be called again."""
        with self._lock:
            self._free()
            self._context = self._engine = self._runtime = None

    def _make_context(self, vendor: Any, cuda_graphs: bool) -> Any:
        strategies = getattr(vendor, "CudaGraphStrategy", None)
        if strategies is None:
            context = self._engine.create_execution_context()
        else:  # TensorRT-RTX
            config = self._engine.create_runtime_config()
            config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if cuda_graphs else strategies.DISABLED
            context, self._own_graphs = self._engine.create_execution_context(config), False
        if context is None:
            raise ResourceError(
                f"{self._name} does not fit on {self.device}: its activations take "
                f"{int(self._engine.device_memory_size_v2)} bytes ({self._said()}); "
                "end other programs on it, or build for smaller sizes: obsdiff build BUNDLE"
            )
        return context

    def _reserve(self) -> dict[str, int]:
        """Addresses of buffers that hold the largest shapes of any profile."""
        sizes = {entry.name: 1 for entry, _ in self._ports}
        for index, profile in enumerate(self._profiles):
            self._apply(index, {name: limits.max for name, limits in profile.items()})
            for entry, _ in self._ports:
                shape = tuple(self._context.get_tensor_shape(entry.name))
                if any(size < 0 for size in shape):
                    raise CompatibilityError(
                        f"{self._name}: the size of {entry.name} depends on values, not on shapes alone: {shape}; "
                        "such an engine cannot be run here"
                    )
                sizes[entry.name] = max(sizes[entry.name], prod(shape) * storage(entry.dtype).itemsize)
        addresses = {name: self._stream.reserve(size) for name, size in sizes.items()}
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise RunError(f"{self._name}: TensorRT took no buffer for {name}: {self._said()}")
        return addresses

    def _feeds(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        check_names(self._name, [entry.name for entry in self.inputs], inputs)
        return {entry.name: to_device(inputs[entry.name], entry.dtype) for entry in self.inputs}

    def _wanted(self, outputs: Sequence[str] | None) -> list[TensorEntry]:
        known = {entry.name: entry for entry in self.outputs}
        unknown = [name for name in outputs or () if name not in known]
        if unknown:
            raise ConfigError(f"{self._name} gives {', '.join(known)}; not {', '.join(unknown)}")
        return [known[name] for name in (known if outputs is None else outputs)]

    def _prepare(self, shapes: Mapping[str, Shape]) -> None:
        """Tells TensorRT the shapes, where they are new."""
        if shapes == self._shapes:
            return
        index = profiles.choose(self._profiles, shapes)
        if index is None:
            raise ConfigError(
                f"{self._name}: {profiles.refusal(self._profiles, shapes, self._symbols)}. Ask for another size, or "
                "build an engine that holds it: obsdiff build BUNDLE --profile SIZES"
            )
        self._stream.forget()
        self._shapes, self._warm = {}, False
        if self._own_graphs:
            self.graph = "none yet"
        self._apply(index, shapes)
        missing = self._context.infer_shapes()
        if missing:
            raise RunError(f"{self._name}: TensorRT does not know the shape of {', '.join(missing)}: {self._said()}")
        self._shapes = dict(shapes)

    def _apply(self, index: int, shapes: Mapping[str, Shape]) -> None:
        if index != self._profile:
            if not self._context.set_optimization_profile_async(index, self._stream.handle):
                raise RunError(f"{self._name}: TensorRT refused its profile {index}: {self._said()}")
            self._stream.wait()
            self._profile = index
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise RunError(f"{self._name}: TensorRT refused {name} {shape} in profile {index}: {self._said()}")

    def _launch(self) -> None:
        try:
            if self._own_graphs and self._warm and not self._stream.captured:
                self._record()
            if self._stream.captured:
                self._stream.launch()
            else:
                self._enqueue()
            self._warm = True
        except ObsdiffError:
            self._shapes = {}  # the next run starts afresh
            raise

    def _record(self) -> None:
        capturable = getattr(self._context, "is_stream_capturable", None)
        try:
            if capturable is not None and not capturable(self._stream.handle):
                raise RunError("TensorRT says that this engine cannot be recorded")
            self._stream.capture(self._enqueue)
            self.graph = "recorded"
        except ObsdiffError as error:
            self._own_graphs = False
            self.graph = f"cannot be recorded: {error}"
            log.warning("%s runs without a CUDA graph: %s", self._name, error)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise RunError(f"{self._name}: TensorRT did not run it: {self._said()}")

    def _said(self) -> str:
        return "; ".join(self._messages) or "it does not say why"

    def _check_open(self) -> None:
        if self._context is None:
            raise ConfigError(f"{self._name} was closed")


def _ports(vendor: Any, engine: Any, name: str, known: Mapping[str, TensorEntry]) -> list[tuple[TensorEntry, bool]]:
    """Every input and output with True for an input; dynamic axes are called as in the graph."""
    found = []
    for index in range(engine.num_io_tensors):
        tensor = engine.get_tensor_name(index)
        dtype = str(getattr(engine.get_tensor_dtype(tensor), "name", "unknown"))
        if dtype not in DTYPES or engine.get_tensor_location(tensor) == vendor.TensorLocation.HOST:
            where = "of its shapes" if dtype in DTYPES else f"in {dtype}"
            raise CompatibilityError(f"{name}: {tensor} holds values {where}; only plain tensors can be given and got")
        shape = tuple(engine.get_tensor_shape(tensor))
        names = known[tensor].shape if tensor in known else tuple(f"{tensor}.{axis}" for axis in range(len(shape)))
        axes = tuple(names[axis] if size < 0 else int(size) for axis, size in enumerate(shape))
        is_input = engine.get_tensor_mode(tensor) == vendor.TensorIOMode.INPUT
        found.append((TensorEntry(name=tensor, dtype=DTYPES[dtype], shape=axes), is_input))
    return found


def _profiles(engine: Any, inputs: Sequence[TensorEntry]) -> list[Profile]:
    return [
        {entry.name: _range(engine, entry, index) for entry in inputs}
        for index in range(max(int(engine.num_optimization_profiles), 1))
    ]


def _range(engine: Any, entry: TensorEntry, profile: int) -> Range:
    fixed = tuple(size for size in entry.shape if isinstance(size, int))
    if len(fixed) == len(entry.shape):
        return Range(min=fixed, opt=fixed, max=fixed)
    low, best, high = (tuple(shape) for shape in engine.get_tensor_profile_shape(entry.name, profile))
    return Range(min=low, opt=best, max=high)


def _stream_weights(engine: Any) -> None:
    """Keeps as many weights on the GPU as fit, where the engine was built to stream them; by default all have to."""
    if engine.streamable_weights_size > 0:
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()


def _weights_bytes(vendor: Any, engine: Any) -> int | None:
    stats = getattr(vendor, "EngineStat", None)
    if stats is None or not hasattr(engine, "get_engine_stat"):
        return None
    return int(engine.get_engine_stat(stats.TOTAL_WEIGHTS_SIZE))
