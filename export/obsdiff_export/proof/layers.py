"""What an engine consists of, as its builder tells: one list of layers from two sources.

    the build log    the table after "Layers:" that TensorRT and TensorRT-RTX print at DETAILED and VERBOSE
    the inspector    the JSON of TensorRT's EngineInspector: 8.x and 10.x ("Bindings"), 11.x ("I/O Tensors")

Both are another program's text: what it does not say is "unknown", what cannot be read is an error, nothing is guessed.
"""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from obsdiff_runtime.errors import BuildError

UNKNOWN: Final = "unknown"

_DTYPES: Final = {
    "bfloat16": r"bfloat16|bf16",
    "float8": r"float8\w*|fp8\w*|e4m3\w*",
    "float4": r"float4\w*|fp4\w*",
    "float16": r"half|fp16|float16",
    "float32": r"float|fp32|float32",
    "int64": "int64",
    "int32": "int32",
    "int8": "int8",
    "int4": "int4",
    "uint8": "uint8",
    "bool": "bool",
}
"""Our name of a type, and the builders' words for it."""

_HEADER: Final = re.compile(r"^(?:\[[^\]]*\]\s*)*Layers:\s*$", re.MULTILINE)
_TENSOR: Final = re.compile(
    r"\{ *Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<dims>[-\d, ]*)\](?P<rest>[^{}]*)\}"
)
_NODE: Final = re.compile(r"\[ONNX Layer: (?P<name>.*?)(?: \| .*?)?\](?=[\s,;\x1e\x1f\[]|__|$)")


@dataclass(frozen=True, kw_only=True)
class EngineTensor:
    """What goes into a layer or comes out of it.

    Attributes:
        name: the builder's.
        dims: sizes, -1 where they change at run time; None where the builder does not tell.
        dtype: "float32", "float16", "bfloat16", "float8", "int8", ...; "unknown".
    """

    name: str
    dims: tuple[int, ...] | None = None
    dtype: str = UNKNOWN


@dataclass(frozen=True, kw_only=True)
class EngineLayer:
    """One step of an engine.

    Attributes:
        name: the builder's; fused layers join the names of what went into them.
        kind: "gemm", "kgen", "CaskConvolution", "Reformat", ...; "unknown" where the builder gave names only.
        tactic: the kernel, "" where the builder does not tell; "__myelin_CASK_STUB" is chosen on the device.
        inputs, constants, outputs: tensors.
        onnx_nodes: nodes of the graph that it computes; empty where the builder does not tell.
    """

    name: str
    kind: str = UNKNOWN
    tactic: str = ""
    inputs: tuple[EngineTensor, ...] = ()
    constants: tuple[EngineTensor, ...] = ()
    outputs: tuple[EngineTensor, ...] = ()
    onnx_nodes: tuple[str, ...] = ()


def layers_of_log(text: str) -> tuple[EngineLayer, ...]:
    """The last layer table of a build log; empty where it has none.

    A line that was cut off gives the layer as far as it can be read.
    """
    headers = list(_HEADER.finditer(text))
    if not headers:
        return ()
    layers = []
    for line in text[headers[-1].end() + 1 :].split("\n"):  # not splitlines: metadata holds separators
        if not line.strip() or re.match(r"\[[A-Z]+\] |Bindings:|I/O Tensors:|Engine Metadata:", line):
            break
        layers.append(_layer_of_line(line))
    return tuple(layers)


def layers_of_inspector(text: str) -> tuple[EngineLayer, ...]:
    """The layers in an EngineInspector's JSON, of the whole engine.

    Raises:
        BuildError: the text is no JSON, or not that of an inspector; says what is wrong with it.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BuildError(f"the engine inspector's text is no JSON ({error}); was it cut off?") from error
    entries = data.get("Layers") if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise BuildError("the engine inspector's JSON has no list of Layers")
    return tuple(_layer_of_entry(entry, index) for index, entry in enumerate(entries))


def nodes_of(metadata: str) -> tuple[str, ...]:
    """Names of ONNX nodes in a layer's metadata: "[ONNX Layer: name | function (...)]", one after the other.

    What the builder made of a node may follow its name: "[ONNX Layer: name]__gemm_from_conv1x1".
    """
    return tuple(dict.fromkeys(match["name"] for match in _NODE.finditer(metadata) if match["name"]))


@functools.cache
def dtype_of(text: str) -> str:
    """Our name of the type that a builder's words contain: "Half", "Row major linear FP16 format (kLINEAR)"."""
    for name, words in _DTYPES.items():
        if re.search(rf"\b(?:{words})\b", text, re.IGNORECASE):
            return name
    return UNKNOWN


def _layer_of_line(line: str) -> EngineLayer:
    head, found, rest = line.removeprefix("Name: ").partition(", LayerType: ")
    if not found:
        return EngineLayer(name=head.strip())
    places = {key: rest.find(f", {key}: [") for key in ("Inputs", "Constants", "Outputs")}
    ends = sorted(place for place in [*places.values(), len(rest)] if place >= 0)
    parts = {
        key: () if place < 0 else _tensors_of_text(rest[place : next(end for end in ends if end > place)])
        for key, place in places.items()
    }
    tactic = re.search(r", TacticName: (.*?)(?=, (?:TacticValue|StreamId|Metadata|Origin): |$)", rest)
    metadata = re.search(r", Metadata: (.*)$", rest)
    return EngineLayer(
        name=head.strip(),
        kind=rest.partition(",")[0].strip() or UNKNOWN,
        tactic=tactic[1].strip() if tactic else "",
        inputs=parts["Inputs"],
        constants=parts["Constants"],
        outputs=parts["Outputs"],
        onnx_nodes=nodes_of(metadata[1]) if metadata else (),
    )


def _tensors_of_text(text: str) -> tuple[EngineTensor, ...]:
    return tuple(
        EngineTensor(
            name=match["name"],
            dims=_dims([part.strip() for part in match["dims"].split(",") if part.strip()]),
            dtype=dtype_of(re.sub(r"Format: .*", "", match["rest"])),
        )
        for match in _TENSOR.finditer(text)
    )


def _layer_of_entry(entry: object, index: int) -> EngineLayer:
    if isinstance(entry, str):  # built without detail: names only
        return EngineLayer(name=entry)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("Name"), str):
        raise BuildError(f"the engine inspector's JSON: Layers[{index}] is no layer with a Name")
    return EngineLayer(
        name=entry["Name"],
        kind=_text(entry, "LayerType") or UNKNOWN,
        tactic=_text(entry, "TacticName"),
        inputs=_tensors_of_entries(entry.get("Inputs")),
        constants=(*_tensors_of_entries(entry.get("Constants")), *_weights_of_entry(entry)),
        outputs=_tensors_of_entries(entry.get("Outputs")),
        onnx_nodes=nodes_of(_text(entry, "Metadata")),
    )


def _tensors_of_entries(entries: object) -> tuple[EngineTensor, ...]:
    """Tensors of 8.x and 10.x ("Format/Datatype") and of 11.x ("Format" and "Datatype")."""
    tensors = [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
    return tuple(
        EngineTensor(
            name=_text(tensor, "Name") or UNKNOWN,
            dims=_dims(tensor.get("Dimensions")),
            dtype=dtype_of(_text(tensor, "Datatype", "DataType", "Format/Datatype")),
        )
        for tensor in tensors
    )


def _weights_of_entry(entry: Mapping[str, Any]) -> tuple[EngineTensor, ...]:
    """What 8.x and 10.x tell of a layer's weights: their type and number, no shape."""
    weights = entry.get("Weights")
    if not isinstance(weights, Mapping) or not isinstance(weights.get("Type"), str):
        return ()
    return (EngineTensor(name="weights", dtype=dtype_of(weights["Type"])),)


def _dims(values: object) -> tuple[int, ...] | None:
    if not isinstance(values, list):
        return None
    try:
        return tuple(int(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        return None


def _text(entry: Mapping[str, Any], *keys: str) -> str:
    """The first of these that is text."""
    return next((entry[key] for key in keys if isinstance(entry.get(key), str)), "")
