"""OpenVINO: runs the bundle's graphs on a CPU, where it has them in bfloat16 too."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from obsdiff_runtime.backends.feeds import check_names
from obsdiff_runtime.bundle import Bundle, ComponentEntry, TensorEntry
from obsdiff_runtime.errors import CompatibilityError, ConfigError, MissingPackageError


class OpenVinoSession:
    """A graph compiled by OpenVINO; see `backends.Session`."""

    def __init__(self, compiled: Any, entry: ComponentEntry, name: str, precision: str) -> None:
        self._request = compiled.create_infer_request()
        self._name = name
        self.inputs: tuple[TensorEntry, ...] = entry.inputs
        self.outputs: tuple[TensorEntry, ...] = entry.outputs
        self.device = f"OpenVINO on the CPU, {precision}"

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        dtypes = {entry.name: np.dtype(entry.dtype) for entry in self.inputs}
        check_names(self._name, list(dtypes), inputs)
        feeds = {name: np.ascontiguousarray(array, dtype=dtypes[name]) for name, array in inputs.items()}
        shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in feeds.items())
        if not all(_fits(feeds[entry.name].shape, entry.shape) for entry in self.inputs):  # it computes on, and wrongly
            wanted = ", ".join(f"{entry.name} {tuple(entry.shape)}" for entry in self.inputs)
            raise ConfigError(f"{self._name} does not take {shapes}: it takes {wanted}")
        try:
            found = self._request.infer(feeds)
        except RuntimeError as error:
            raise ConfigError(f"{self._name} does not take {shapes}: {_last_line(error)}") from error
        names = [entry.name for entry in self.outputs] if outputs is None else outputs
        arrays = {name: np.array(found[name]) for name in names}  # the request's own buffers are written over
        return {
            name: array.astype(np.float32) if array.dtype == np.float16 else array for name, array in arrays.items()
        }


@dataclass(frozen=True)
class OpenVino:
    """OpenVINO's CPU plugin in one precision; see `backends.Backend`.

    Attributes:
        precision: "f32", which is exact, or "bf16", which is for CPUs with AMX or AVX512-BF16.
    """

    precision: str

    def open_session(self, bundle: Bundle, component: str, *, threads: int | None = None) -> OpenVinoSession:
        core = _import().Core()
        able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if self.precision == "bf16" and "BF16" not in able:
            raise CompatibilityError("this CPU has no bfloat16 (AMX or AVX512-BF16); take --backend openvino")
        entry = bundle.manifest.components[component]
        if entry.dtype == "bfloat16":
            raise CompatibilityError(f"{component}: its inputs are bfloat16, which numpy has no type for")
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": self.precision, "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        path = bundle.onnx(component)
        try:
            compiled = core.compile_model(str(path), "CPU", options)
        except RuntimeError as error:
            raise CompatibilityError(f"OpenVINO cannot load {component} ({path}): {_last_line(error)}") from error
        return OpenVinoSession(compiled, entry, component, self.precision)

    def versions(self) -> dict[str, str]:
        return {"openvino": _import().__version__}


def _import() -> Any:
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "openvino is absent: pip install 'obsdiff[openvino]', or without torch pip install "
            "'obsdiff-runtime[openvino]'"
        ) from error
    return openvino


def _fits(shape: tuple[int, ...], wanted: Sequence[int | str]) -> bool:
    """Whether sizes are those wanted, where these are numbers."""
    return len(shape) == len(wanted) and all(
        size == expected for size, expected in zip(shape, wanted, strict=True) if isinstance(expected, int)
    )


def _last_line(error: Exception) -> str:
    """The innermost of what OpenVINO stacks up."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
