"""Draws inside Triton Inference Server: a Python model whose networks are the other models of its repository.

`obsdiff triton` writes the repository, and in it a model.py that hands Triton's requests to an `Orchestrator`. What one
batch of requests asks for goes through the denoiser together wherever the shapes agree. `pb_utils` is Triton's
`triton_python_backend_utils`, which exists in its processes only.

Shapes: n images of a request, h w height and width in pixels.
"""

import io
import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from obsdiff_runtime.backends.numbers import DTYPES
from obsdiff_runtime.bundle import Bundle, ComponentEntry, TensorEntry, open_bundle
from obsdiff_runtime.controls import steering
from obsdiff_runtime.drawing import Drawing, companies, step_together
from obsdiff_runtime.errors import CancelledError, ConfigError, ObsdiffError, RunError
from obsdiff_runtime.pipeline import Pipeline
from obsdiff_runtime.server.options import Bounds
from obsdiff_runtime.version import __version__

log = logging.getLogger(__name__)

DESCRIPTION: Final = "bundle"
"""Folder of the orchestrator's version that holds what is left of the bundle without its networks."""
SEEDS: Final = 2**32
MAX_STEPS, MAX_PIXELS, MAX_PROMPT, DENOISER_ROWS = "max_steps", "max_pixels", "max_prompt_characters", "denoiser_rows"
"""Parameters of the orchestrator's configuration."""


def model_of(name: str, component: str) -> str:
    """What the model of a component is called beside an orchestrator of that name."""
    return f"{name}_{component}"


def is_batched(component: ComponentEntry) -> bool:
    """Whether the first axis of every input and output is the batch, which Triton then adds and counts itself."""
    return all(port.shape[:1] == ("batch",) for port in (*component.inputs, *component.outputs))


def is_bare(port: TensorEntry) -> bool:
    """Whether nothing is left of the shape without the batch; Triton knows no empty shapes, so it is called (n, 1)."""
    return len(port.shape) == 1


def numpy_dtype(port: TensorEntry) -> np.dtype:
    """Of the arrays that pass between Triton's models."""
    return np.dtype(DTYPES.get(port.dtype.upper(), port.dtype))


class TritonSession:
    """A model of the server as a session; see `backends.Session`."""

    device = "Triton"

    def __init__(self, pb_utils: Any, model: str, component: ComponentEntry) -> None:
        self._pb_utils, self._model, self._batched = pb_utils, model, is_batched(component)
        self.inputs, self.outputs = component.inputs, component.outputs

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """See `backends.Session.run`.

        Raises:
            ConfigError: the model does not take these inputs.
            RunError: Triton could not run it.
        """
        names = [port.name for port in self.inputs]
        if sorted(names) != sorted(inputs):
            raise ConfigError(f"{self._model} takes {', '.join(names)}; not {', '.join(inputs) or 'nothing'}")
        wanted = [port.name for port in self.outputs] if outputs is None else list(outputs)
        pb_utils = self._pb_utils
        response = pb_utils.InferenceRequest(
            model_name=self._model,
            requested_output_names=wanted,
            inputs=[pb_utils.Tensor(port.name, self._sent(port, inputs[port.name])) for port in self.inputs],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if response.has_error():
            error = response.error()
            kind = ConfigError if error.code() == pb_utils.TritonError.INVALID_ARG else RunError
            raise kind(f"{self._model}: {error.message()}")
        found = {port.name: port for port in self.outputs}
        return {name: self._received(found[name], response) for name in wanted}

    def _sent(self, port: TensorEntry, array: np.ndarray) -> np.ndarray:
        sent = np.ascontiguousarray(array, dtype=numpy_dtype(port))
        return sent.reshape(-1, 1) if self._batched and is_bare(port) else sent

    def _received(self, port: TensorEntry, response: Any) -> np.ndarray:
        array: np.ndarray = self._pb_utils.get_output_tensor_by_name(response, port.name).as_numpy()
        if self._batched and is_bare(port):
            array = array.reshape(-1)
        return array.astype(np.float32) if array.dtype == np.float16 else array


@dataclass(frozen=True)
class TritonModels:
    """The models beside an orchestrator, as a backend; see `backends.Backend`."""

    pb_utils: Any
    name: str

    def open_session(self, bundle: Bundle, component: str, *, threads: int | None = None) -> TritonSession:
        """`threads` is of no use here: the models have configurations of their own."""
        return TritonSession(self.pb_utils, model_of(self.name, component), bundle.component(component))

    def versions(self) -> dict[str, str]:
        return {"obsdiff-runtime": __version__}


@dataclass(kw_only=True, eq=False)
class _Order:
    """A request, and what becomes of it."""

    request: Any
    drawings: list[Drawing] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    error: Exception | None = None

    @property
    def is_cancelled(self) -> bool:
        asked: Callable[[], bool] | None = getattr(self.request, "is_cancelled", None)  # Triton 23.10 and newer
        return asked is not None and asked()


class Orchestrator:
    """Answers Triton's requests for images."""

    def __init__(self, pipeline: Pipeline, pb_utils: Any, bounds: Bounds, denoiser_rows: int) -> None:
        """Takes what it calls.

        Args:
            pipeline: over `TritonModels`.
            pb_utils: `pb_utils`.
            bounds: of a request; its deadline is Triton's to watch.
            denoiser_rows: the most that one run of the denoiser takes.
        """
        self._pipeline, self._pb_utils = pipeline, pb_utils
        self._bounds, self._denoiser_rows = bounds, denoiser_rows

    @classmethod
    def open(cls, told: Mapping[str, str], pb_utils: Any) -> "Orchestrator":
        """From the arguments that Triton gives `TritonPythonModel.initialize`.

        Raises:
            BundleError: the files beside model.py are not those that were written there.
        """
        config = json.loads(told["model_config"])
        parameters = {name: int(value["string_value"]) for name, value in config["parameters"].items() if name in OURS}
        folder = Path(told["model_repository"]) / told["model_version"] / DESCRIPTION
        bundle = open_bundle(folder, networks=False)
        bounds = Bounds(
            prompt_characters=parameters[MAX_PROMPT], pixels=parameters[MAX_PIXELS], steps=parameters[MAX_STEPS]
        )
        pipeline = Pipeline(bundle, backend=TritonModels(pb_utils, told["model_name"]))
        return cls(pipeline, pb_utils, bounds, parameters[DENOISER_ROWS])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response to each request, in their order; what is wrong with one is that one's answer alone."""
        orders = [self._begin(request) for request in requests]
        while running := [order for order in orders if self._goes_on(order)]:
            for company in companies([each for order in running for each in order.drawings], self._denoiser_rows):
                step_together(company, self._pipeline.step)
        return [self._answer(order) for order in orders]

    def _begin(self, request: Any) -> _Order:
        order = _Order(request=request)
        try:
            for call in self._calls(request):
                order.seeds.append(call["seed"])
                order.drawings += self._pipeline.begin(**call)
        except Exception as error:
            order.error = error
        return order

    def _calls(self, request: Any) -> list[dict[str, Any]]:
        """Arguments of `Pipeline.begin` for each image of a request."""
        columns = {name: self._column(request, name) for name in INPUTS}
        calls = []
        for row in range(len(columns["prompt"] or ())):
            call = {name: values[row] for name, values in columns.items() if values is not None}
            texts: dict[str, str] = {name: str(call[name]) for name in ("prompt", "negative_prompt") if name in call}
            image = call.pop("init_image", None)
            if image is not None:
                call["image"] = image
            call.setdefault("seed", secrets.randbelow(SEEDS))
            sizes = (call.get(name) for name in ("num_inference_steps", "guidance_scale", "height", "width"))
            settings = self._pipeline.resolver.resolve(
                *sizes,
                image=image,
                mask="mask" in call,
                control=steering(call.get("control"), call.get("control_scale")),
                strength=call.get("strength"),
            )
            self._bounds.check(texts, settings, self._pipeline.bundle.manifest.defaults)
            calls.append(call)
        return calls

    def _column(self, request: Any, name: str) -> list[Any] | None:
        """One value for each image; None where the request is silent."""
        tensor = self._pb_utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            return None
        array = tensor.as_numpy()
        if name in PICTURES:
            return list(array)
        values = array.reshape(-1).tolist()
        try:
            return [value.decode() if isinstance(value, bytes) else value for value in values]
        except UnicodeDecodeError:
            raise ConfigError(f"{name} is no valid Unicode text") from None

    def _goes_on(self, order: _Order) -> bool:
        order.error = order.error or next((each.error for each in order.drawings if each.error is not None), None)
        if order.error is None and order.is_cancelled:
            order.error = CancelledError("the request was cancelled")
        return order.error is None and any(not drawing.is_over for drawing in order.drawings)

    def _answer(self, order: _Order) -> Any:
        try:
            if order.error is not None:
                raise order.error
            outputs = self._outputs(order, set(order.request.requested_output_names()))
        except Exception as error:
            return self._pb_utils.InferenceResponse(output_tensors=[], error=self._told(error))
        return self._pb_utils.InferenceResponse(output_tensors=outputs)

    def _outputs(self, order: _Order, wanted: set[str]) -> list[Any]:
        found: dict[str, np.ndarray] = {"seed": np.array(order.seeds, np.int64).reshape(-1, 1)}
        if wanted & {"image", "png"}:
            pictures = [self._pipeline.decode(drawing.sample) for drawing in order.drawings]
            if "image" in wanted:
                if len({picture.shape for picture in pictures}) > 1:
                    raise ConfigError("image holds pictures of one size only; ask for png, or in several requests")
                found["image"] = np.ascontiguousarray(np.stack(pictures))  # (n, h, w, 3)
            if "png" in wanted:
                found["png"] = np.array([[_png(picture)] for picture in pictures], dtype=np.object_)  # (n, 1)
        return [self._pb_utils.Tensor(name, array) for name, array in found.items() if name in wanted]

    def _told(self, error: Exception) -> Any:
        """An error as Triton knows it; one that is not expected says nothing of the server's inside."""
        kinds = self._pb_utils.TritonError
        match error:
            case ConfigError():
                return kinds(str(error), kinds.INVALID_ARG)
            case CancelledError():
                return kinds(str(error), kinds.CANCELLED)
            case ObsdiffError():
                return kinds(str(error), kinds.INTERNAL)
            case _:
                log.error("a request failed", exc_info=error)
                return kinds("the model failed at this request; Triton's log says why", kinds.INTERNAL)


INPUTS: Final = (
    "prompt",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "height",
    "width",
    "init_image",
    "mask",
    "strength",
    "control",
    "control_scale",
)
PICTURES: Final = ("init_image", "mask", "control")
OURS: Final = (MAX_STEPS, MAX_PIXELS, MAX_PROMPT, DENOISER_ROWS)


def _png(picture: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png", compress_level=1)
    return file.getvalue()
