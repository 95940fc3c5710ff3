"""What is in an ONNX file."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import onnx

from obsdiff_export.ports import Port, read_ports
from obsdiff_export.survey import Survey, survey
from obsdiff_runtime.errors import ExportError
from obsdiff_runtime.progress import Progress, silent


@dataclass(frozen=True, kw_only=True)
class GraphContent:
    """An ONNX file, read.

    Attributes:
        path: the file.
        producer, opset: as the file says.
        bytes: of the graph and the files of its weights.
        inputs, outputs: ports; an axis that may change is named.
        ops: how many nodes of each operator; those of another domain as "domain.Operator".
        parameters: numbers in the initializers.
        dtypes: how many of them in each number format.
        weights: which patterns each constant weight of a product holds.
    """

    path: str
    producer: str
    opset: int
    bytes: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    ops: Mapping[str, int]
    parameters: int
    dtypes: Mapping[str, int]
    weights: tuple[Survey, ...]
    kind: Literal["onnx"] = "onnx"

    @property
    def dynamic_axes(self) -> tuple[str, ...]:
        """Names of the axes that may change."""
        axes = (size for port in self.inputs for size in port.shape if isinstance(size, str))
        return tuple(dict.fromkeys(axes))


def read(path: Path, progress: Progress = silent) -> GraphContent:
    """Reads a graph; its weights are looked at where they lie.

    Raises:
        ExportError: the file is no graph, or its weights cannot be read.
    """
    inputs, outputs = read_ports(path)
    model = onnx.load(str(path), load_external_data=False)
    if not model.graph.node and not model.graph.initializer:
        raise ExportError(f"{path}: holds no graph; is it an ONNX file?")
    sizes: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        sizes[onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name] += prod(tensor.dims)
    ops = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph.node)
    return GraphContent(
        path=str(path),
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        opset=next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0),
        bytes=path.stat().st_size + sum(file.stat().st_size for file in _data_files(model, path.parent)),
        inputs=inputs,
        outputs=outputs,
        ops=dict(ops.most_common()),
        parameters=sum(sizes.values()),
        dtypes=dict(sizes.most_common()),
        weights=tuple(survey(path, progress)),
    )


def _data_files(model: onnx.ModelProto, folder: Path) -> list[Path]:
    """The files that the initializers lie in, those that are there."""
    places = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    return [folder / place for place in sorted(places) if (folder / place).is_file()]
