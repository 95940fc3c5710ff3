"""Which linears of an engine run on sparse kernels: three witnesses, and what they prove together.

    weights      our own look at the weights: do every 4 along the reduction hold 2 zeros
    log          what the builder says of each layer: found eligible, chosen
    inspector    the kernels that are in the engine, by their names

A linear is *active* only where its weights hold and one of the two others saw a sparse kernel. Silence proves nothing,
and witnesses that contradict each other prove nothing either: both are "unknown", and the reason says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from obsdiff_export.pattern import PatternReport
from obsdiff_export.proof.judging import IGNORES, Case, LayerProof, Verdict
from obsdiff_export.proof.layers import layers_of_inspector, layers_of_log
from obsdiff_export.proof.witnesses import kernel_of, parse_log
from obsdiff_runtime.errors import BuildError

Finding = Literal[
    "active", "none chosen", "none eligible", "unknown", "contradicted", "ignored", "not requested", "no linears"
]


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What is proven of one engine.

    Attributes:
        backend: that built it.
        sparse_requested: whether it was asked for sparse kernels.
        found, chose: layers of any kind that the log calls eligible, and chosen; None where it does not say.
        sparse_layers: layers whose kernel has a sparse one's name; None where the builder gave no layers.
        layers: one entry a linear.
        others: layers chosen by the log that are none of these linears, such as convolutions.
        notes: what could not be read.
    """

    backend: str
    sparse_requested: bool
    found: int | None
    chose: int | None
    sparse_layers: int | None
    layers: tuple[LayerProof, ...]
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def active(self) -> int:
        """Linears that are proven to run on sparse kernels."""
        return self.count("active")

    @property
    def eligible(self) -> int:
        """Linears that could run on sparse kernels, those that do included."""
        return self.active + self.count("not chosen")

    @property
    def chosen(self) -> int | None:
        """Layers of any kind that the builder says it chose sparse kernels for; None where it does not say."""
        return self.chose

    def count(self, verdict: Verdict) -> int:
        """Linears of a verdict."""
        return sum(layer.verdict == verdict for layer in self.layers)

    def counts(self) -> dict[str, int]:
        """Linears by verdict, the best one first; without those that none has."""
        found = {verdict: self.count(verdict) for verdict in get_args(Verdict)}
        return {verdict: linears for verdict, linears in found.items() if linears}

    @property
    def holding(self) -> int:
        """Linears whose weights are 2:4."""
        return sum(layer.weights == "holds" for layer in self.layers)

    @property
    def verdict(self) -> Finding:
        """In a word. "active": one linear or more is proven to run on a sparse kernel, and nothing contradicts."""
        if any(layer.contradicts for layer in self.layers):
            return "contradicted"
        if self.backend in IGNORES:
            return "ignored"
        if not self.sparse_requested:
            return "not requested"
        if self.active:
            return "active"
        if self.count("unknown"):
            return "unknown"
        if not self.layers:
            return "no linears"
        return "none chosen" if self.eligible else "none eligible"


def prove(
    patterns: Sequence[PatternReport],
    log: str,
    inspector: str | None,
    *,
    backend: str,
    sparse_requested: bool,
    targets: Sequence[str],
) -> Proof:
    """What the three witnesses prove.

    Args:
        patterns: the 2:4 verdicts of the graph's weights, `pattern.check(graph, 2, 4)`.
        log: of the build; "" where there is none.
        inspector: the EngineInspector's JSON, None where there is none; the log's own layer table stands in for it.
        backend: "tensorrt", "tensorrt_rtx", "onnxruntime".
        sparse_requested: whether the builder was asked for sparse kernels.
        targets: compute capabilities that the engine is for.
    """
    notes = []
    table = layers_of_log(log)
    if inspector is not None:
        try:
            table = layers_of_inspector(inspector)
        except BuildError as error:
            notes.append(str(error))
    said = parse_log(log)
    case = Case(patterns, said, table, backend=backend, requested=sparse_requested, targets=targets)
    return Proof(
        backend=backend,
        sparse_requested=sparse_requested,
        found=said.found,
        chose=said.chose,
        sparse_layers=sum(kernel_of(layer.tactic) == "sparse" for layer in table) if table else None,
        layers=tuple(case.judge(report) for report in patterns),
        others=case.others(),
        notes=tuple(notes),
    )
