"""The receipt beside every engine: what was asked, what was built, and what is proven of its sparsity.

A builder that says nothing of sparsity proves nothing: that is "unknown", never success.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from obsdiff_export.pattern import PatternReport
from obsdiff_export.proof import Proof, prove
from obsdiff_export.proof.judging import IGNORES
from obsdiff_export.proof.witnesses import joined
from obsdiff_runtime.decoding import decode, encode
from obsdiff_runtime.errors import BundleError, SparsityProofError

SCHEMA: Final = 2

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Input name -> {"min", "opt", "max"}."""


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
        profiles: one or more optimisation profiles.
        flags: what else the builder was told, by name.
        sparse_requested: whether the builder was asked for sparse tactics.
        proof: what is proven of each linear.
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
    profiles: tuple[Shapes, ...]
    sparse_requested: bool
    proof: Proof
    seconds: float
    flags: Mapping[str, object] = field(default_factory=dict)
    schema: int = SCHEMA

    def save(self, path: Path) -> None:
        data = {**encode(self), "sparsity": sparsity_statement(self)}
        path.write_text(json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def of(
    *,
    key: str,
    component: str,
    backend: str,
    backend_version: str,
    targets: Sequence[str],
    onnx_sha256: str,
    plan_sha256: str,
    plan_bytes: int,
    profiles: Sequence[Mapping[str, Mapping[str, Sequence[int]]]],
    sparse_requested: bool,
    patterns: Sequence[PatternReport],
    log: str,
    inspector: str | None,
    seconds: float,
    flags: Mapping[str, object] | None = None,
) -> Receipt:
    """The receipt of a build that has just ended.

    What goes in is stored as it is, but for the three that are heard as witnesses: `patterns`, the 2:4 verdicts of the
    graph's weights (`pattern.check(graph, 2, 4)`); `log`, of the build; `inspector`, the EngineInspector's JSON, None
    where the builder gives none. `flags` is JSON data.
    """
    return Receipt(
        key=key,
        component=component,
        backend=backend,
        backend_version=backend_version,
        targets=tuple(targets),
        onnx_sha256=onnx_sha256,
        plan_sha256=plan_sha256,
        plan_bytes=plan_bytes,
        profiles=tuple(
            {name: {end: tuple(sizes) for end, sizes in shapes.items()} for name, shapes in profile.items()}
            for profile in profiles
        ),
        sparse_requested=sparse_requested,
        proof=prove(
            patterns, log, inspector, backend=backend, sparse_requested=sparse_requested, targets=tuple(targets)
        ),
        seconds=seconds,
        flags=dict(flags or {}),
    )


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
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{path}: cannot be read as a receipt: {error}; build the engine again") from error
    try:
        return decode(Receipt, data, source=str(path))
    except BundleError as error:
        raise BundleError(f"{error}; build the engine again") from error


def sparsity_statement(receipt: Receipt) -> str:
    """Whether sparse kernels run, in a sentence for a person."""
    proof = receipt.proof
    if proof.verdict == "contradicted":
        broken = next(layer for layer in proof.layers if layer.contradicts)
        return f"Not proven: of {broken.weight}, {broken.reason}."
    if proof.verdict == "ignored":
        return f"{IGNORES[receipt.backend]}: this engine runs dense kernels, whatever its weights are."
    if proof.verdict == "not requested":
        return "The engine was built without the sparse flag and runs dense kernels."
    builder = f"{receipt.backend} {receipt.backend_version}"
    if proof.verdict == "no linears":
        return f"Not proven: no weights were looked at; {_said(proof)} ({builder})."
    return f"{_counted(proof)}; {_said(proof)} ({builder})."


def require_sparse(receipts: Iterable[Receipt]) -> None:
    """Passes where every engine that could be sparse is proven to run sparse kernels.

    Engines without any 2:4 weights, such as a VAE's, are left out. Of the others each must have one linear or more that
    is proven to run on a sparse kernel, and no witness that contradicts another: a builder seldom chooses sparse
    kernels for all of them. An engine without the flag may stand beside a proven one of its component, to compare with.

    Raises:
        SparsityProofError: an engine's sparsity is not proven, or there is none to prove.
    """
    asked = list(receipts)
    pruned = [receipt for receipt in asked if receipt.proof.holding or receipt.proof.verdict == "contradicted"]
    if not pruned:
        looked = f"{len(asked)} {'engine was' if len(asked) == 1 else 'engines were'} looked at, and none has weights"
        what = f"{looked} that are 2:4" if asked else "there is no engine"
        raise SparsityProofError(f"no proof of sparsity: {what}; prune with --sparsity 2:4 and build with TensorRT")
    proven = {receipt.component for receipt in pruned if receipt.proof.verdict == "active"}
    failed = [
        receipt
        for receipt in pruned
        if receipt.proof.verdict != "active"
        and not (receipt.proof.verdict == "not requested" and receipt.component in proven)
    ]
    if failed:
        said = "; ".join(_unproven(receipt) for receipt in failed)
        raise SparsityProofError(
            f"no proof of sparsity for {len(failed)} of {len(pruned)} pruned engines: {said}. "
            "`obsdiff inspect` lists every linear; build with TensorRT on the GPU that serves, or without the demand"
        )


def _counted(proof: Proof) -> str:
    """How many linears run on sparse kernels, how many do not, and of how many it is not known."""
    rest = [
        f"{proof.count('not chosen')} could and do not" if proof.count("not chosen") else "",
        f"{proof.count('not eligible')} cannot" if proof.count("not eligible") else "",
        f"of {proof.count('unknown')} it is not known" if proof.count("unknown") else "",
    ]
    return ", ".join([f"{proof.active} of {len(proof.layers)} linears run on sparse kernels", *filter(None, rest)])


def _said(proof: Proof) -> str:
    """What the builder's log says in numbers."""
    if proof.found is None and proof.chose is None:
        return "the build log says nothing of sparse kernels"
    found = "an unknown number" if proof.found is None else str(proof.found)
    chose = "an unknown number" if proof.chose is None else str(proof.chose)
    return f"the builder found {found} of its layers eligible and chose sparse kernels for {chose}"


def _unproven(receipt: Receipt) -> str:
    proof = receipt.proof
    reasons = Counter(layer.reason for layer in proof.layers if layer.verdict != "active")
    common = joined((f"{count} x {reason}" for reason, count in reasons.most_common()), most=3)
    return f"{receipt.component} ({receipt.backend} {receipt.backend_version}): {_counted(proof)}: {common}"
