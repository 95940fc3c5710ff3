"""What Triton is told of each model of a bundle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from obsdiff.triton.pbtxt import Enum, Message, parameters
from obsdiff_runtime.bundle import ComponentEntry, EngineEntry, Manifest, TensorEntry
from obsdiff_runtime.controls import PICTURE
from obsdiff_runtime.errors import CompatibilityError
from obsdiff_runtime.kinds.table import kind_of
from obsdiff_runtime.server.options import Bounds
from obsdiff_runtime.triton import DENOISER_ROWS, MAX_PIXELS, MAX_PROMPT, MAX_STEPS, is_bare, is_batched

TYPES: Final = {
    "float": "TYPE_FP32",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "double": "TYPE_FP64",
    "float64": "TYPE_FP64",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}
"""Of tensors that Triton's Python backend can hand over as numpy's."""
GRAPH: Final = "model.onnx"
ONE_AT_A_TIME: Final = ("vae_decoder", "vae_encoder")
"""Components that need the most memory of all for each picture."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How large and how many.

    Attributes:
        name: of the orchestrator; the models of components begin with it.
        images: that requests of one batch may ask for together.
        instances: of the orchestrator, each a process.
        threads: of the host for each network that ONNX Runtime runs on it; 0: all.
        bounds: of a request.
    """

    name: str
    images: int
    instances: int
    threads: int
    bounds: Bounds

    @property
    def rows(self) -> int:
        """Of the denoiser: two for each image that is guided."""
        return 2 * self.images


def servable(component: ComponentEntry) -> tuple[list[EngineEntry], list[str]]:
    """The engines of a component that one model can hold, the newest first; and why others are left out.

    Triton picks one by the GPU's compute capability, but knows one set of profiles, and has one version of TensorRT.
    """
    found: list[EngineEntry] = []
    reasons = []
    for engine in reversed(component.engines):
        first = found[0] if found else engine
        if engine.backend != "tensorrt":
            reasons.append(f"{engine.path}: Triton does not run engines of {engine.backend}")
        elif engine.refit == "stripped":
            reasons.append(f"{engine.path} holds no weights")
        elif (engine.backend_version, engine.profiles) != (first.backend_version, first.profiles):
            reasons.append(f"{engine.path}: {first.path} is newer, of another version or with other profiles")
        elif {*engine.targets} <= {target for each in found for target in each.targets} and found:
            reasons.append(f"{engine.path}: {first.path} is newer")
        else:
            found.append(engine)
    return found, reasons


def plan_of(engine: EngineEntry) -> str:
    """What an engine is called in the folder of its version."""
    return f"{engine.key}.plan"


def largest_batch(component: str, entry: ComponentEntry, engines: Sequence[EngineEntry], choice: Choice) -> int:
    """Triton's max_batch_size; 0 where the graph's first axis is no batch."""
    if not is_batched(entry):
        return 0
    wanted = 1 if component in ONE_AT_A_TIME else choice.rows
    built = [limits.max[0] for engine in engines for profile in engine.profiles for limits in profile.values()]
    return min([wanted, *built])


def component_config(component: str, model: str, entry: ComponentEntry, choice: Choice) -> Message:
    """Of the model that runs one component: its engines if Triton can run some, else its graph.

    Raises:
        CompatibilityError: its numbers cannot pass between Triton's models.
    """
    engines, _ = servable(entry)
    most = largest_batch(component, entry, engines, choice)
    return {
        "name": model,
        **(_engine_fields(engines) if engines else _graph_fields(choice)),
        "max_batch_size": most,
        "input": [_port(component, port, batched=most > 0) for port in entry.inputs],
        "output": [_port(component, port, batched=most > 0) for port in entry.outputs],
        **({"dynamic_batching": {}} if most > 1 else {}),
    }


def _engine_fields(engines: Sequence[EngineEntry]) -> Message:
    by_target = {target: plan_of(engine) for engine in reversed(engines) for target in engine.targets}
    profiles = [str(index) for index in range(len(engines[0].profiles))]
    return {
        "platform": "tensorrt_plan",
        "backend": "tensorrt",
        "default_model_filename": plan_of(engines[0]),
        "cc_model_filenames": [{"key": target, "value": name} for target, name in sorted(by_target.items())],
        "instance_group": {"count": 1, "kind": Enum("KIND_GPU"), "profile": profiles},
    }


def _graph_fields(choice: Choice) -> Message:
    exact: Message = {"name": "cuda", "parameters": {"key": "use_tf32", "value": "0"}}  # as the runtime computes
    return {
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "default_model_filename": GRAPH,
        "instance_group": {"count": 1, "kind": Enum("KIND_AUTO")},
        "optimization": {"execution_accelerators": {"gpu_execution_accelerator": exact}},
        "parameters": parameters({"intra_op_thread_count": choice.threads}),
    }


def _port(component: str, port: TensorEntry, *, batched: bool) -> Message:
    if port.dtype not in TYPES:
        raise CompatibilityError(
            f"{component}: {port.name} is {port.dtype}, which Triton's Python backend cannot pass on; "
            "export the model with --dtype fp16 or fp32"
        )
    described: dict[str, object] = {"name": port.name, "data_type": Enum(TYPES[port.dtype])}
    if batched and is_bare(port):
        return {**described, "dims": [1], "reshape": {"shape": []}}  # type: ignore[dict-item]
    shape = port.shape[1:] if batched else port.shape
    return {**described, "dims": [size if isinstance(size, int) else -1 for size in shape]}  # type: ignore[dict-item]


def orchestrator_config(manifest: Manifest, choice: Choice) -> Message:
    """Of the model that takes prompts and gives images."""
    defaults = manifest.defaults
    denoiser = manifest.components[kind_of(manifest.pipeline_class).denoiser]
    rows = largest_batch("denoiser", denoiser, servable(denoiser)[0], choice)
    limits = {
        MAX_STEPS: choice.bounds.steps,
        MAX_PIXELS: choice.bounds.pixels or 4 * defaults.height * defaults.width,
        MAX_PROMPT: choice.bounds.prompt_characters,
        DENOISER_ROWS: rows or 1,
    }
    inputs = [
        _asked("prompt", "TYPE_STRING", optional=False),
        _asked("negative_prompt", "TYPE_STRING"),
        _asked("num_inference_steps", "TYPE_INT32"),
        _asked("guidance_scale", "TYPE_FP32"),
        _asked("seed", "TYPE_INT64"),
        _asked("height", "TYPE_INT32"),
        _asked("width", "TYPE_INT32"),
    ]
    if "vae_encoder" in manifest.components:
        inputs += [_asked("init_image", "TYPE_UINT8", dims=[-1, -1, 3]), _asked("strength", "TYPE_FP32")]
        inputs += [_asked("mask", "TYPE_UINT8", dims=[-1, -1])]
    if PICTURE in {port.name for port in denoiser.inputs}:
        inputs += [_asked("control", "TYPE_UINT8", dims=[-1, -1, 3]), _asked("control_scale", "TYPE_FP32")]
    return {
        "name": choice.name,
        "backend": "python",
        "max_batch_size": choice.images,
        "input": inputs,
        "output": [
            {"name": "image", "data_type": Enum("TYPE_UINT8"), "dims": [-1, -1, 3]},
            {"name": "png", "data_type": Enum("TYPE_STRING"), "dims": [1]},
            {"name": "seed", "data_type": Enum("TYPE_INT64"), "dims": [1]},
        ],
        "model_transaction_policy": {"decoupled": False},
        "instance_group": {"count": choice.instances, "kind": Enum("KIND_CPU")},
        **({"dynamic_batching": {}} if choice.images > 1 else {}),
        "parameters": parameters(limits),
    }


def _asked(name: str, kind: str, *, dims: Sequence[int] = (1,), optional: bool = True) -> Message:
    return {"name": name, "data_type": Enum(kind), "dims": list(dims), **({"optional": True} if optional else {})}
