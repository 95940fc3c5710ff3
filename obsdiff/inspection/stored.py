"""Tensors as they lie in safetensors files, without converting or copying them: a header in JSON, then the bytes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from obsdiff_runtime.errors import BundleError

_MAX_HEADER: Final = 100 * 2**20
_TYPES: Final = {
    "F32": ("float32", "<u4", 0x7FFFFFFF),
    "F16": ("float16", "<u2", 0x7FFF),
    "BF16": ("bfloat16", "<u2", 0x7FFF),
    "F8_E4M3": ("float8_e4m3fn", "|u1", 0x7F),
    "F8_E5M2": ("float8_e5m2", "|u1", 0x7F),
    "I8": ("int8", "|u1", 0xFF),
    "F64": ("float64", "<u8", 0x7FFFFFFFFFFFFFFF),
}
"""safetensors' name -> numpy's, the type of the elements' bits, and the bits that are zero for a zero."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name, shape: as in the file.
        dtype: as numpy calls it, or as the file does where it is not known here.
        bits: the elements as unsigned integers, mapped; None for a type that is not known here.
        mask: the bits that are zero for a zero.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bits: np.ndarray[Any, np.dtype[Any]] | None
    mask: int


def tensors(path: Path) -> Iterator[StoredTensor]:
    """Every tensor of a safetensors file, by name.

    Raises:
        BundleError: the file is truncated, or is none.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise BundleError(f"{path} is no safetensors file, or was truncated")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = sorted((name, _entry(entry)) for name, entry in header.items())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BundleError(f"{path} is no safetensors file: {error!r}") from error
    for name, (kind, shape, start, end) in entries:
        dtype, bits, mask = _TYPES.get(kind, (kind.lower(), "", 0))
        if 8 + length + end > size:
            raise BundleError(f"{path} is truncated: tensor {name} ends behind its end")
        if not bits or not prod(shape):
            yield StoredTensor(name=name, shape=shape, dtype=dtype, bits=None, mask=0)
            continue
        if end - start != prod(shape) * np.dtype(bits).itemsize:
            raise BundleError(f"{path}: tensor {name} has {end - start} bytes, which is not its shape")
        mapped = np.memmap(path, dtype=bits, mode="r", offset=8 + length + start, shape=shape)
        yield StoredTensor(name=name, shape=shape, dtype=dtype, bits=mapped, mask=mask)


def _entry(entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    start, end = entry["data_offsets"]
    return str(entry["dtype"]), tuple(map(int, entry["shape"])), int(start), int(end)
