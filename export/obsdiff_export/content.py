"""Hashes of files and graphs: what a thing is, whatever it is called."""

import hashlib
from pathlib import Path

import onnx

from obsdiff_runtime.bundle import sha256
from obsdiff_runtime.errors import ExportError


def content_hash(model: Path) -> str:
    """sha256 over a graph and the files its weights lie in.

    Raises:
        ExportError: one of them is absent or cut short, or the graph is none.
    """
    try:
        graph = onnx.load(str(model), load_external_data=False).graph
        places = {
            entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"
        }
        _require_whole(model.parent, graph)
        digests = [sha256(model), *(sha256(model.parent / place) for place in sorted(places))]
    except Exception as error:
        raise ExportError(f"{model}: cannot be read as a graph with its weights: {error}") from error
    return sha256_of("\n".join(digests).encode())


def _require_whole(folder: Path, graph: onnx.GraphProto) -> None:
    """Raises ValueError where a weight lies beyond the end of its file; parsers name the weight and not the file."""
    for tensor in graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if "location" in place and "length" in place:
            needed = int(place.get("offset", 0)) + int(place["length"])
            has = (folder / place["location"]).stat().st_size
            if has < needed:
                raise ValueError(f"{place['location']} is cut short: {tensor.name} ends at {needed} of its {has} bytes")


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
