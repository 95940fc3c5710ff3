"""One engine's witnesses, heard for one linear after the other; what they are is told in proof.py."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from obsdiff_export.pattern import PatternReport
from obsdiff_export.proof.layers import UNKNOWN, EngineLayer, EngineTensor, dtype_of
from obsdiff_export.proof.witnesses import SparsityLog, by_node, computing, joined, kernel_of, parts_of

Verdict = Literal["active", "not chosen", "not eligible", "unknown"]
Weights = Literal["holds", "broken", "not checked"]
Log = Literal["chosen", "found", "not found", "silent"]
Inspector = Literal["sparse", "partly sparse", "dense", "silent"]

IGNORES: Final = {
    "tensorrt_rtx": "TensorRT-RTX takes the sparse flag and ignores it in builds without a GPU",
    "onnxruntime": "ONNX Runtime multiplies zeros like any other number",
}
"""Backends that never use sparse kernels, and the words for it."""

SMALL: Final = 256
"""Sparse kernels seldom win where inputs or outputs are fewer (TensorRT's staff, NVIDIA/TensorRT #3849)."""

FIRST_WITH_SPARSITY: Final = 8.0
"""The first compute capability whose tensor cores have 2:4."""

_IMPLY: Final = frozenset({"1:2", "2:4", "3:4"})
"""Patterns that are 2:4 too."""


@dataclass(frozen=True, kw_only=True)
class LayerProof:
    """What is proven of one linear.

    Attributes:
        weight, node, k, n_out: as in its PatternReport.
        verdict: "not chosen" is eligible but not chosen.
        reason: why; "" where it is active and there is nothing to add. What is only likely says so.
        weights, log, inspector: what each witness says.
        contradicts: two of them say opposite things.
        layer, tactic: where the engine computes it, and with which kernel; "" where that is not known.
        dtype: of what it multiplies, "unknown" where it is not known.
        merged: other linears that the builder made one product with this one.
    """

    weight: str
    node: str
    k: int
    n_out: int
    verdict: Verdict
    reason: str
    weights: Weights
    log: Log
    inspector: Inspector
    contradicts: bool = False
    layer: str = ""
    tactic: str = ""
    dtype: str = UNKNOWN
    merged: tuple[str, ...] = ()


class Case:
    """One engine's witnesses, heard for one linear after the other."""

    def __init__(
        self,
        patterns: Sequence[PatternReport],
        said: SparsityLog,
        table: Sequence[EngineLayer],
        *,
        backend: str,
        requested: bool,
        targets: Sequence[str],
    ) -> None:
        self.patterns = {report.node: report for report in patterns}
        self.said = said
        self.layers = by_node(table)
        self.ignored = IGNORES.get(backend, "")
        self.requested = requested
        self.too_old = bool(targets) and all(_older(target) for target in targets)
        self.targets = ", ".join(targets)
        named = {layer.name: layer.onnx_nodes for layer in table if layer.onnx_nodes}
        self.found, self.found_all = _nodes(said.found_layers, said.found, named)
        self.chose, self.chose_all = _nodes(said.chose_layers, said.chose, named)

    def others(self) -> tuple[str, ...]:
        return tuple(name for name, nodes in self.chose.items() if not self.patterns.keys() & set(nodes))

    def judge(self, report: PatternReport) -> LayerProof:
        layers = computing(self.layers.get(report.node, ()))
        merged = self._merged(report, layers)
        weights, why_broken = _weights(report, merged)
        log, inspector = self._log(report.node), _inspector(layers)
        contradiction = self._contradiction(weights, log, inspector)
        if contradiction:
            verdict, reason = _unknown(f"the witnesses contradict each other: {contradiction}")
        elif weights == "broken":
            verdict, reason = _not_eligible(why_broken)
        elif self.ignored:
            verdict, reason = _not_eligible(self.ignored)
        elif not self.requested:
            verdict, reason = _not_eligible("the engine was built without the sparse flag")
        elif weights == "not checked":
            verdict, reason = _unknown(why_broken)
        else:
            verdict, reason = self._verdict(report, layers, log, inspector)
        return LayerProof(
            weight=report.name,
            node=report.node,
            k=report.k,
            n_out=report.n_out,
            verdict=verdict,
            reason=reason,
            weights=weights,
            log=log,
            inspector=inspector,
            contradicts=bool(contradiction),
            layer=layers[0].name if layers else "",
            tactic=layers[0].tactic if layers else "",
            dtype=_dtype(report, layers),
            merged=tuple(other.name for other in merged),
        )

    def _merged(self, report: PatternReport, layers: Sequence[EngineLayer]) -> list[PatternReport]:
        """The linears that the engine computes in the same product.

        A fused layer may also hold linears that follow each other: those read different tensors. A "Myelin" layer is a
        whole subgraph and tells nothing.
        """
        products = [layer.onnx_nodes or parts_of(layer.name) for layer in layers if layer.kind.lower() != "myelin"]
        if not products:
            products = [nodes for nodes in (*self.found.values(), *self.chose.values()) if report.node in nodes]
        together = {node for nodes in products for node in nodes} - {report.node}
        return [
            other for node, other in self.patterns.items() if node in together and other.reads == report.reads != ""
        ]

    def _log(self, node: str) -> Log:
        if any(node in nodes for nodes in self.chose.values()):
            return "chosen"
        found = any(node in nodes for nodes in self.found.values())
        if found and self.chose_all:
            return "found"
        if self.found_all and not found:
            return "not found"
        return "silent"

    def _contradiction(self, weights: Weights, log: Log, inspector: Inspector) -> str:
        """Which witnesses say opposite things, "" where none do."""
        sparse = "the log says that a sparse kernel was chosen" if log == "chosen" else ""
        if not sparse and inspector in ("sparse", "partly sparse"):
            sparse = "a sparse kernel is in the engine"
        if sparse and self.ignored:
            return f"{sparse}, though {self.ignored}"
        if sparse and not self.requested:
            return f"{sparse}, though the engine was built without the sparse flag"
        if weights == "broken" and (sparse or log == "found"):
            return f"{sparse or 'the log calls the layer eligible'}, and the weights in the graph are not 2:4"
        if log == "chosen" and inspector == "dense":
            return f"{sparse}, and the engine has a dense one"
        if log in ("found", "not found") and inspector in ("sparse", "partly sparse"):
            return f"{sparse}, and the log says that none was chosen for it"
        return ""

    def _verdict(
        self, report: PatternReport, layers: Sequence[EngineLayer], log: Log, inspector: Inspector
    ) -> tuple[Verdict, str]:
        """For a linear whose weights hold, where witnesses agree and the backend was asked and can."""
        if self.too_old and log not in ("chosen", "found") and inspector not in ("sparse", "partly sparse"):
            return _not_eligible(f"compute capability {self.targets} has no sparse kernels; they begin with 8.0")
        if inspector == "partly sparse":
            kernels = [kernel_of(layer.tactic) for layer in layers]
            return "active", f"in {kernels.count('sparse')} of the {len(kernels)} engine layers that compute it"
        if log == "chosen" or inspector == "sparse":
            return "active", ""
        dtype = _dtype(report, layers)
        if log == "found":
            return "not chosen", f"likely because {_why_dense(report, layers, dtype)}"
        if dtype == "float32" and (log == "not found" or inspector == "dense"):
            return _not_eligible("it is computed in float32, for which there are no sparse kernels")
        if log == "not found":
            return _not_eligible(f"the builder does not list it; likely because {_why_not_found(layers)}")
        if inspector == "dense":
            return "not chosen", f"the engine has a dense kernel, likely because {_why_dense(report, layers, dtype)}"
        if self.said.found == 0:
            return _not_eligible("the builder found no layer eligible")
        if self.said.chose == 0:
            return "not chosen", f"the builder chose none, likely because {_why_dense(report, layers, dtype)}"
        return _unknown(self._why_unknown(report))

    def _why_unknown(self, report: PatternReport) -> str:
        broken = [
            other.name
            for other in self.patterns.values()
            if other.reads == report.reads != "" and _two_of_four(other) is False
        ]
        merging = f"; {joined(broken)} of the same input are not 2:4, and a merged product is dense" if broken else ""
        if self.said.chose is not None:
            return f"the builder chose sparse kernels for {self.said.chose} layers and does not say which{merging}"
        return f"neither the log nor the engine's layers say which kernel it has{merging}"


def _nodes(
    names: Sequence[str], count: int | None, named: Mapping[str, Sequence[str]]
) -> tuple[dict[str, tuple[str, ...]], bool]:
    """The nodes of each layer that a line of the log names, and whether these are certainly all that it means."""
    nodes = {name: tuple(named.get(name) or parts_of(name)) for name in names}
    certain = all(name in named or not _opaque(name) for name in names)
    return nodes, count is not None and len(names) == count and certain


def _opaque(name: str) -> bool:
    """Whether a layer's name does not tell which nodes it computes."""
    return "ForeignNode" in name or any(part.startswith("__my") for part in parts_of(name))


def _older(target: str) -> bool:
    try:
        return float(target) < FIRST_WITH_SPARSITY
    except ValueError:
        return False


def _weights(report: PatternReport, merged: Sequence[PatternReport]) -> tuple[Weights, str]:
    """Whether the product that is computed has 2:4 weights, and why not."""
    if _two_of_four(report) is False:
        return "broken", f"the weights are not 2:4: {report.reason}"
    broken = [other.name for other in merged if _two_of_four(other) is False]
    if broken:
        return "broken", f"the builder merged it with {joined(broken)}, whose weights are not 2:4"
    unchecked = [other for other in (report, *merged) if _two_of_four(other) is None]
    if unchecked:
        asked = unchecked[0].pattern
        return "not checked", f"the weights were checked for {asked} only, and sparse kernels need 2:4"
    return "holds", ""


def _two_of_four(report: PatternReport) -> bool | None:
    """Whether the weights are 2:4; None where a check for another pattern does not tell."""
    if report.holds:
        return True if report.pattern in _IMPLY else None
    return False if report.pattern == "2:4" else None


def _inspector(layers: Sequence[EngineLayer]) -> Inspector:
    kernels = {kernel_of(layer.tactic) for layer in layers} - {"silent"}
    if kernels == {"sparse", "dense"}:
        return "partly sparse"
    return "sparse" if "sparse" in kernels else "dense" if "dense" in kernels else "silent"


def _dtype(report: PatternReport, layers: Sequence[EngineLayer]) -> str:
    """That the product is computed in: of the weight in the engine, else of an input, else as it is stored."""
    constants = [tensor.dtype for layer in layers for tensor in layer.constants if _is_weight(tensor, report.k)]
    inputs = [tensor.dtype for layer in layers for tensor in layer.inputs[:1]]
    return next((dtype for dtype in (*constants, *inputs) if dtype != UNKNOWN), dtype_of(report.dtype))


def _is_weight(tensor: EngineTensor, k: int) -> bool:
    """Whether a constant can be a weight of k inputs; a bias is too small."""
    if tensor.dims is None:
        return tensor.name == "weights"
    return k in tensor.dims and math.prod(tensor.dims) >= 2 * k


def _why_dense(report: PatternReport, layers: Sequence[EngineLayer], dtype: str) -> str:
    outputs = {tensor.dtype for layer in layers for tensor in layer.outputs} - {UNKNOWN}
    if dtype in ("int8", "float8") and outputs and dtype not in outputs:
        return f"its output is {joined(sorted(outputs))}: sparse {dtype} kernels are chosen where Q follows the product"
    if min(report.k, report.n_out) < SMALL:
        return f"it is small ({report.k} to {report.n_out}): sparse kernels seldom win below {SMALL}"
    if layers and layers[0].kind == "runtime_fusion":
        return "it is fused with its neighbours, and the fused kernel is dense"
    return "the dense kernel was faster when the builder timed both at the opt shape"


def _why_not_found(layers: Sequence[EngineLayer]) -> str:
    if layers:
        return f"it was fused into {layers[0].name}"
    return "it was fused or its Q/DQ stand where the builder does not see the pattern"


def _unknown(reason: str) -> tuple[Verdict, str]:
    return "unknown", reason


def _not_eligible(reason: str) -> tuple[Verdict, str]:
    return "not eligible", reason
