"""The receipt beside every engine: what was asked, what the weights are, and what the builder said of sparsity.

A builder that says nothing of sparsity proves nothing: that is "unknown", never success.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from obsdiff_export.pattern import PatternReport
from obsdiff_runtime.errors import BundleError

SCHEMA: Final = 1

_FOUND: Final = (
    re.compile(r"\(Sparsity\) Found (?P<count>\d+) layer\(s\) eligible to use sparse tactics(?:: *(?P<names>.*))?"),
    re.compile(r"\(Sparsity\) Layers eligible for sparse math:(?P<names>.*)"),
)
_CHOSE: Final = (
    re.compile(r"\(Sparsity\) Chose (?P<count>\d+) layer\(s\) using sparse tactics(?:: *(?P<names>.*))?"),
    re.compile(r"\(Sparsity\) TRT inference plan picked sparse implementation for layers:(?P<names>.*)"),
)


@dataclass(frozen=True, kw_only=True)
class SparsityLog:
    """What a builder's log says of sparse tactics; None where it says nothing.

    Attributes:
        found, chose: how many layers were eligible, and how many use sparse kernels.
        found_layers, chose_layers: their names, as far as the log gives them.
    """

    found: int | None
    chose: int | None
    found_layers: tuple[str, ...] = ()
    chose_layers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What is known of one engine, as it is stored.

    Attributes:
        key: of the engine, see `obsdiff_export.build`.
        component: folder name of the graph.
        backend, backend_version: the builder.
        targets: compute capabilities it was built for.
        onnx_sha256: of the graph and its weights.
        plan_sha256, plan_bytes: of the plan.
        profile: input name -> {"min", "opt", "max"}.
        sparse_requested: whether the builder was asked for sparse tactics.
        sparsity_log: what its log says.
        weights: the N:M verdicts of the graph's weights, as given to the build.
        seconds: how long it took.
    """

    key: str
    component: str
    backend: str
    backend_version: str
    targets: tuple[str, ...]
    onnx_sha256: str
    plan_sha256: str
    plan_bytes: int
    profile: Mapping[str, Mapping[str, Sequence[int]]]
    sparse_requested: bool
    sparsity_log: SparsityLog
    weights: tuple[PatternReport, ...]
    seconds: float
    schema: int = SCHEMA

    def save(self, path: Path) -> None:
        data = {**asdict(self), "sparsity": sparsity_statement(self)}
        path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load(path: Path) -> Receipt:
    """A receipt from disk.

    Raises:
        BundleError: it cannot be read, or is of a schema that this version does not know.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise BundleError(f"{path}: schema {data['schema']} is not {SCHEMA}; build the engine again")
        data.pop("sparsity", None)
        log: dict[str, Any] = data["sparsity_log"]
        log = {name: tuple(value) if isinstance(value, list) else value for name, value in log.items()}
        data["sparsity_log"] = SparsityLog(**log)
        data["weights"] = tuple(PatternReport(**report) for report in data["weights"])
        data["targets"] = tuple(data["targets"])
        return Receipt(**data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path}: cannot be read as a receipt: {error}; build the engine again") from error


def parse_log(text: str) -> SparsityLog:
    """Reads both dialects of TensorRT's lines, 8.x and 10 on; the last of each counts."""
    found, found_layers = _last(_FOUND, text)
    chose, chose_layers = _last(_CHOSE, text)
    return SparsityLog(found=found, chose=chose, found_layers=found_layers, chose_layers=chose_layers)


def sparsity_statement(receipt: Receipt) -> str:
    """Whether sparse kernels run, in a sentence for a person."""
    if receipt.backend == "tensorrt_rtx":
        return (
            "TensorRT-RTX accepts the sparse flag and ignores it in builds without a GPU: "
            "this engine runs dense kernels, whatever its weights are."
        )
    if not receipt.sparse_requested:
        return "The engine was built without the sparse flag and runs dense kernels."
    log = receipt.sparsity_log
    if log.chose is None:
        return (
            f"Unknown: the build log of {receipt.backend} {receipt.backend_version} does not say whether sparse "
            "kernels were chosen."
        )
    eligible = "an unknown number of" if log.found is None else str(log.found)
    return f"The builder found {eligible} layers eligible for sparse kernels and chose them for {log.chose}."


def _last(patterns: Sequence[re.Pattern[str]], text: str) -> tuple[int | None, tuple[str, ...]]:
    matches = [match for pattern in patterns for match in pattern.finditer(text)]
    if not matches:
        return None, ()
    match = max(matches, key=lambda match: match.start())
    names = tuple(name.strip() for name in (match["names"] or "").split(", ") if name.strip())
    return int(match.groupdict().get("count") or len(names)), names
