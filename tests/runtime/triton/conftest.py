"""A stand-in for Triton Inference Server: it loads a model repository and answers as Triton's documentation says.

Configurations are read by Triton's own protobuf schema. Models of the onnxruntime backend run in ONNX Runtime after the
checks that Triton makes of names, types, shapes and batch sizes; models of the Python backend run from their model.py,
which finds here what `triton_python_backend_utils` is to it.
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

NUMPY = {
    "TYPE_FP32": np.float32,
    "TYPE_FP16": np.float16,
    "TYPE_INT64": np.int64,
    "TYPE_INT32": np.int32,
    "TYPE_UINT8": np.uint8,
    "TYPE_BOOL": np.bool_,
    "TYPE_STRING": np.object_,
}


def read_config(path: Path) -> Any:
    """An inference.ModelConfig; an unknown field, or a value of the wrong type, is an error."""
    from google.protobuf import text_format

    return text_format.Parse(path.read_text(encoding="utf-8"), _schema().ModelConfig())


def _schema() -> ModuleType:
    """Triton's schema alone: the package around it wants gRPC."""
    tritonclient = pytest.importorskip("tritonclient", reason="needs tritonclient: pip install 'obsdiff[dev]'")
    name = "triton_model_config_pb2"
    if name not in sys.modules:
        place = Path(tritonclient.__path__[0]) / "grpc" / "model_config_pb2.py"
        sys.modules[name] = _load(name, place)
    return sys.modules[name]


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert array.flags.c_contiguous, f"{name}: Triton takes contiguous arrays"
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor], error: TritonError | None = None) -> None:
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class Request:
    """What `execute` is given."""

    def __init__(self, tensors: Sequence[Tensor], wanted: Sequence[str], cancelled: bool) -> None:
        self._tensors, self._wanted, self._cancelled = list(tensors), list(wanted), cancelled

    def inputs(self) -> list[Tensor]:
        return self._tensors

    def requested_output_names(self) -> list[str]:
        return self._wanted

    def is_cancelled(self) -> bool:
        return self._cancelled


class RefusedError(Exception):
    """Triton would not run the model."""


class Server:
    """A repository that is loaded.

    Attributes:
        configs: inference.ModelConfig by the model's name.
        runs: of each model of the onnxruntime backend, the batch sizes, 0 where it has no batch.
        break_run: called with a model's name and its inputs before it runs.
    """

    def __init__(self, repository: Path) -> None:
        self.configs = {path.parent.name: read_config(path) for path in sorted(repository.glob("*/config.pbtxt"))}
        self.runs: dict[str, list[int]] = {name: [] for name in self.configs}
        self.break_run: Callable[[str, Mapping[str, np.ndarray]], None] = lambda name, inputs: None
        self._sessions: dict[str, Any] = {}
        self._python: dict[str, Any] = {}
        sys.modules["triton_python_backend_utils"] = self._vendor()
        for name, config in self.configs.items():
            assert config.name == name, "Triton wants the folder's name"
            self._open(config, repository / name / "1")

    def close(self) -> None:
        del sys.modules["triton_python_backend_utils"]

    def _open(self, config: Any, version: Path) -> None:
        from google.protobuf import json_format

        if config.backend == "python":
            model = _load("model", version / "model.py").TritonPythonModel()
            told = json_format.MessageToDict(config, preserving_proto_field_name=True)
            model.initialize(
                {
                    "model_config": json.dumps(told),
                    "model_name": config.name,
                    "model_repository": str(version.parent),
                    "model_version": version.name,
                }
            )
            self._python[config.name] = model
        elif config.backend == "onnxruntime":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            session = onnxruntime.InferenceSession(version / config.default_model_filename, options)
            for ports, nodes in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
                self._compare(config, ports, nodes)
            self._sessions[config.name] = session

    @staticmethod
    def _compare(config: Any, ports: Any, nodes: Any) -> None:
        """What the onnxruntime backend checks as it loads a model."""
        assert [port.name for port in ports] == [node.name for node in nodes]
        kinds = {"tensor(float)": "TYPE_FP32", "tensor(float16)": "TYPE_FP16", "tensor(int64)": "TYPE_INT64"}
        for port, node in zip(ports, nodes, strict=True):
            assert _kind(port) == kinds[node.type]
            own = list(port.reshape.shape) if port.HasField("reshape") else list(port.dims)
            graph = [size if isinstance(size, int) else -1 for size in node.shape]
            assert ([-1] if config.max_batch_size else []) + own == graph, (config.name, port.name)

    def infer(self, model: str, inputs: Mapping[str, Any], wanted: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """What a client gets; RefusedError with code and message where it gets an error."""
        response = self.ask(model, [inputs], wanted)[0]
        if response.has_error():
            raise RefusedError(response.error().code(), response.error().message())
        return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}

    def ask(
        self, model: str, batch: Sequence[Mapping[str, Any]], wanted: Sequence[str] = (), cancelled: Sequence[int] = ()
    ) -> list[InferenceResponse]:
        """Responses of a model of the Python backend to requests that Triton's dynamic batcher put together."""
        config = self.configs[model]
        names = list(wanted) or [port.name for port in config.output]
        requests = []
        for index, inputs in enumerate(batch):
            arrays = {name: _array(name, value) for name, value in inputs.items()}
            self._check(config, arrays)
            tensors = [Tensor(name, array) for name, array in arrays.items()]
            requests.append(Request(tensors, names, index in cancelled))
        assert sum(len(each.inputs()[0].as_numpy()) for each in requests) <= config.max_batch_size
        responses: list[InferenceResponse] = self._python[model].execute(requests)
        assert len(responses) == len(requests)
        for response in responses:
            ports = {port.name: port for port in config.output}
            for tensor in response.output_tensors():
                assert tensor.as_numpy().dtype == NUMPY[_kind(ports[tensor.name()])]
                _check_dims(ports[tensor.name()].dims, tensor.as_numpy().shape[1:], tensor.name())
        return responses

    def _check(self, config: Any, arrays: Mapping[str, np.ndarray]) -> None:
        """What Triton checks of every request.

        Raises:
            RefusedError: an input is missing, unknown, of another type or shape, or there are too many rows.
        """
        ports = {port.name: port for port in config.input}
        unknown = sorted(arrays.keys() - ports.keys())
        missing = [name for name, port in ports.items() if name not in arrays and not port.optional]
        if unknown or missing:
            raise RefusedError(TritonError.INVALID_ARG, f"{config.name}: unknown {unknown}, missing {missing}")
        for name, array in arrays.items():
            if array.dtype != NUMPY[_kind(ports[name])]:
                raise RefusedError(TritonError.INVALID_ARG, f"{config.name}: {name} is {array.dtype}")
            _check_dims(ports[name].dims, array.shape[1:] if config.max_batch_size else array.shape, name)
        if config.max_batch_size and max(len(array) for array in arrays.values()) > config.max_batch_size:
            raise RefusedError(TritonError.INVALID_ARG, f"{config.name}: more than {config.max_batch_size} rows")

    def _run(self, name: str, arrays: Mapping[str, np.ndarray], wanted: Sequence[str]) -> list[Tensor]:
        config = self.configs[name]
        self._check(config, arrays)
        self.break_run(name, arrays)
        self.runs[name].append(len(next(iter(arrays.values()))) if config.max_batch_size else 0)
        shaped = {port.name: _reshaped(port, arrays[port.name], outwards=False) for port in config.input}
        outputs = self._sessions[name].run(list(wanted), shaped)
        ports = {port.name: port for port in config.output}
        return [
            Tensor(out, np.ascontiguousarray(_reshaped(ports[out], array, outwards=True)))
            for out, array in zip(wanted, outputs, strict=True)
        ]

    def _vendor(self) -> ModuleType:
        server = self

        class InferenceRequest:
            def __init__(
                self,
                model_name: str,
                requested_output_names: Sequence[str],
                inputs: Sequence[Tensor],
                preferred_memory: tuple[str, int],
            ) -> None:
                assert preferred_memory == ("CPU", 0), "as_numpy() takes no tensor that lies on a GPU"
                self._model, self._wanted, self._inputs = model_name, requested_output_names, inputs

            def exec(self) -> InferenceResponse:
                try:
                    arrays = {tensor.name(): tensor.as_numpy() for tensor in self._inputs}
                    return InferenceResponse(server._run(self._model, arrays, self._wanted))
                except RefusedError as refusal:
                    return InferenceResponse([], TritonError(refusal.args[1], refusal.args[0]))

        def named(tensors: Sequence[Tensor], name: str) -> Tensor | None:
            return next((tensor for tensor in tensors if tensor.name() == name), None)

        vendor: Any = ModuleType("triton_python_backend_utils")
        vendor.Tensor, vendor.TritonError = Tensor, TritonError
        vendor.InferenceRequest, vendor.InferenceResponse = InferenceRequest, InferenceResponse
        vendor.TRITONSERVER_MEMORY_CPU = "CPU"
        vendor.PreferredMemory = lambda kind, device: (kind, device)
        vendor.get_input_tensor_by_name = lambda request, name: named(request.inputs(), name)
        vendor.get_output_tensor_by_name = lambda response, name: named(response.output_tensors(), name)
        found: ModuleType = vendor
        return found


def _kind(port: Any) -> str:
    name: str = port.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[port.data_type].name
    return name


def _check_dims(dims: Sequence[int], shape: Sequence[int], name: str) -> None:
    fits = len(dims) == len(shape) and all(dim in (-1, size) for dim, size in zip(dims, shape, strict=False))
    if not fits:
        raise RefusedError(TritonError.INVALID_ARG, f"{name}: {tuple(shape)} is not {tuple(dims)}")


def _reshaped(port: Any, array: np.ndarray, *, outwards: bool) -> np.ndarray:
    if not port.HasField("reshape"):
        return array
    sizes = port.dims if outwards else port.reshape.shape
    return array.reshape(len(array), *sizes)


def _array(name: str, value: Any) -> np.ndarray:
    """One image's input, or a column of several, as a client sends it."""
    if isinstance(value, np.ndarray):
        return value
    kinds = {"seed": np.int64, "guidance_scale": np.float32, "strength": np.float32, "control_scale": np.float32}
    values = value if isinstance(value, list) else [value]
    if isinstance(values[0], str):
        return np.array([[text.encode()] for text in values], dtype=np.object_)
    return np.array([[each] for each in values], dtype=kinds.get(name, np.int32))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """serve(bundle, images=..., ...): the bundle's repository under the name "draw", loaded."""
    from obsdiff.triton.configs import Choice
    from obsdiff.triton.repository import write_repository
    from obsdiff_runtime.bundle import open_bundle
    from obsdiff_runtime.server.options import DEFAULT_BOUNDS

    servers: list[Server] = []

    def load(bundle: Path, **options: Any) -> Server:
        choice = Choice(
            **{"name": "draw", "images": 4, "instances": 1, "threads": 1, "bounds": DEFAULT_BOUNDS, **options}
        )
        folder = tmp_path / f"repository-{len(servers)}"
        write_repository(open_bundle(bundle), folder, choice)
        servers.append(Server(folder))
        return servers[-1]

    yield load
    for server in servers[-1:]:
        server.close()


@pytest.fixture
def config_of() -> Callable[[Path], Any]:
    """config_of(path of a config.pbtxt): inference.ModelConfig."""
    return read_config


@pytest.fixture
def refused() -> type[Exception]:
    """What `Server.infer` raises; its arguments are Triton's code and message."""
    return RefusedError
