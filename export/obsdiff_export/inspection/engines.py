"""What is in an engine's plan, as far as its header, its receipt and its builder's words tell: no GPU is asked."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from obsdiff_export.proof import Finding
from obsdiff_export.proof.layers import EngineLayer, layers_of_inspector, layers_of_log
from obsdiff_export.proof.receipt import Receipt, load, sparsity_statement
from obsdiff_runtime.bundle import sha256
from obsdiff_runtime.errors import BuildError, BundleError

MAGIC: Final = {b"ftrt": "TensorRT", b"vtrt": "TensorRT-RTX"}
"""How plans begin (10.x as Torch-TensorRT checks it; RTX as seen with 1.7.1)."""

_VERSION: Final = slice(24, 28)
"""Major, minor, patch and build of the builder, a byte each (NVIDIA/TensorRT #3073)."""

_ENDS: Final = {"receipt": ".json", "layers": ".layers.json", "log": ".log"}


@dataclass(frozen=True, kw_only=True)
class EngineContent:
    """An engine.

    Attributes:
        path: of the plan.
        bytes: of the plan.
        header: what its first bytes say of its builder: "TensorRT-RTX 1.7.1.116"; "" where they say nothing known.
        receipt: what was recorded when it was built; None where there is none.
        sparsity: whether sparse kernels run, in a sentence.
        verdict: the same in a word, see `obsdiff_export.proof.Finding`; "unknown" without a receipt.
        verdicts: linears by what is proven of them.
        layers: what it consists of; empty where nobody says.
        layers_from: the file that says so, "" where none does.
        notes: what does not fit together, or is missing.
    """

    path: str
    bytes: int
    header: str
    receipt: Receipt | None
    sparsity: str
    verdict: Finding
    verdicts: Mapping[str, int]
    layers: tuple[EngineLayer, ...]
    layers_from: str
    notes: tuple[str, ...]
    kind: Literal["engine"] = "engine"


def header_of(path: Path) -> str:
    """The builder that the first bytes of a file name, with its version; "" where it is no plan that is known."""
    with path.open("rb") as file:
        head = file.read(_VERSION.stop)
    builder = MAGIC.get(head[:4], "")
    if not builder or len(head) < _VERSION.stop:
        return builder
    return f"{builder} {'.'.join(str(part) for part in head[_VERSION])}"


def read(path: Path) -> EngineContent:
    """Reads what lies beside a plan: `<key>.json`, `<key>.layers.json`, `<key>.log`.

    Raises:
        BundleError: the plan is not the one that its receipt describes.
    """
    beside = {role: path.with_name(f"{path.stem}{end}") for role, end in _ENDS.items()}
    receipt, missing = _receipt(beside["receipt"])
    notes = [missing] if missing else []
    if receipt is None:
        sparsity = "Not known: a plan does not tell which kernels it has, and there is no receipt that does."
    else:
        if receipt.plan_sha256 != sha256(path):
            raise BundleError(f"{path} is not the plan that {beside['receipt'].name} describes; build the engine again")
        sparsity = sparsity_statement(receipt)
        notes += receipt.proof.notes
    layers, source, unread = _layers(beside)
    return EngineContent(
        path=str(path),
        bytes=path.stat().st_size,
        header=header_of(path),
        receipt=receipt,
        sparsity=sparsity,
        verdict="unknown" if receipt is None else receipt.proof.verdict,
        verdicts={} if receipt is None else receipt.proof.counts(),
        layers=layers,
        layers_from=source,
        notes=tuple(dict.fromkeys([*notes, *unread])),
    )


def _receipt(path: Path) -> tuple[Receipt | None, str]:
    """The receipt, or why there is none."""
    if not path.is_file():
        return None, f"no {path.name} beside the plan: `obsdiff build` writes one with every engine"
    try:
        return load(path), ""
    except BundleError as error:
        return None, str(error)


def _layers(beside: dict[str, Path]) -> tuple[tuple[EngineLayer, ...], str, list[str]]:
    """The layers, the file they are from, and what could not be read."""
    unread = []
    if beside["layers"].is_file():
        try:
            layers = layers_of_inspector(beside["layers"].read_text(encoding="utf-8", errors="replace"))
        except BuildError as error:
            unread.append(f"{beside['layers'].name}: {error}")
        else:
            return layers, beside["layers"].name, []
    if beside["log"].is_file():
        layers = layers_of_log(beside["log"].read_text(encoding="utf-8", errors="replace"))
        if layers:
            return layers, beside["log"].name, unread
    return (), "", [*unread, "nothing beside the plan tells its layers"]
