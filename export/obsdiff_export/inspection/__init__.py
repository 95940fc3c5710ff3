"""What is in an ONNX file, an engine or a bundle."""

import json
from pathlib import Path
from typing import Any, Final

from obsdiff_export.inspection import bundles, engines, graphs
from obsdiff_export.inspection.bundles import BundleContent
from obsdiff_export.inspection.engines import EngineContent
from obsdiff_export.inspection.graphs import GraphContent
from obsdiff_export.proof.receipt import Receipt, require_sparse
from obsdiff_runtime.bundle import MANIFEST
from obsdiff_runtime.decoding import encode
from obsdiff_runtime.errors import ConfigError, SparsityProofError
from obsdiff_runtime.progress import Progress, silent

Content = GraphContent | EngineContent | BundleContent

PLANS: Final = (".plan", ".engine", ".trt")

_LOOKS: Final[tuple[tuple[bytes, str], ...]] = (
    (b"GGUF", "a GGUF file, which obsdiff does not read"),
    (b"PK\x03\x04", "a zip file, such as torch.save writes: obsdiff reads no pickles, only safetensors"),
    (b"\x80", "a pickle: obsdiff reads none, only safetensors"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"\x7fELF", "a program"),
    (b"\x1f\x8b", "a compressed file"),
    (b"", "an empty file"),
)
"""How other files begin, and what they are."""


def inspect(path: Path, progress: Progress = silent) -> Content:
    """What is there.

    Raises:
        ConfigError: nothing is there, or nothing that obsdiff knows; says what it looks like.
        BundleError: a bundle or receipt that is incomplete or altered; names the file.
        ExportError: a graph that cannot be read.
        CompatibilityError: written by a newer obsdiff.
    """
    if not path.exists():
        raise ConfigError(f"{path}: nothing is there")
    return _folder(path, progress) if path.is_dir() else _file(path, progress)


def is_bundle(folder: Path) -> bool:
    """Whether a folder has a bundle's manifest."""
    return "components" in _keys(folder / MANIFEST)


def to_json(content: object) -> dict[str, Any]:
    """One object of plain data, with the verdict on every linear of every engine."""
    data: dict[str, Any] = encode(content)
    return data


def demand_sparsity(content: object) -> None:
    """Passes where the engines in it are proven to run sparse kernels.

    Raises:
        SparsityProofError: they are not, or there are none; says why.
    """
    bare = [engine.path for engine in _engines(content) if engine.receipt is None]
    if bare:
        raise SparsityProofError(f"no proof of sparsity: {bare[0]} has no receipt beside it; build it with obsdiff")
    require_sparse(receipts_of(content))


def receipts_of(content: object) -> tuple[Receipt, ...]:
    """The receipts of the engines in it."""
    return tuple(engine.receipt for engine in _engines(content) if engine.receipt is not None)


def _engines(content: object) -> tuple[EngineContent, ...]:
    if isinstance(content, EngineContent):
        return (content,)
    if isinstance(content, BundleContent):
        return tuple(engine for built in content.engines.values() for engine in built)
    return ()


def _folder(path: Path, progress: Progress) -> Content:
    if is_bundle(path):
        return bundles.read(path)
    found = sorted(entry for entry in path.iterdir() if entry.suffix in (".onnx", *PLANS))
    if len(found) == 1:
        return _file(found[0], progress)
    if found:
        raise ConfigError(f"{path} holds {len(found)} graphs and engines; name one of them, such as {found[0]}")
    inside = sorted(entry.name for entry in path.iterdir())
    listed = ", ".join(inside[:5]) + (", ..." if len(inside) > 5 else "")
    raise ConfigError(f"{path}: nothing that is known here; the folder holds {listed or 'nothing'}")


def _file(path: Path, progress: Progress) -> Content:
    has_receipt = path.suffix in PLANS and path.with_suffix(".json").is_file()
    if engines.header_of(path) or has_receipt:
        return engines.read(path)
    if path.suffix == ".onnx":
        return graphs.read(path, progress)
    raise ConfigError(f"{path}: no plan and no ONNX file; it looks like {_looks(path)}")


def _looks(path: Path) -> str:
    """What a file that is none of ours seems to be."""
    keys = _keys(path)
    if "plan_sha256" in keys:
        return f"an engine's receipt: name the plan beside it, {path.with_suffix('.plan')}"
    if path.name == MANIFEST and keys:
        return f"the manifest of {path.parent}: name that folder"
    if keys:
        return "a JSON file"
    if path.suffix == ".safetensors":
        return f"the weights of {path.parent}: name that folder"
    with path.open("rb") as file:
        head = file.read(512)
    for start, what in _LOOKS:
        if head.startswith(start) and (start or not head):
            return what
    return "text" if head.isascii() and b"\0" not in head else "nothing that is known here"


def _keys(path: Path) -> set[str]:
    """The keys of a JSON object, none where the file is none."""
    try:
        data: Any = json.loads(path.read_bytes()) if path.suffix == ".json" and path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return set()
    return set(data) if isinstance(data, dict) else set()
