"""Number formats of engines as numpy has them; bfloat16, which numpy lacks, by its bits."""

from typing import Final

import numpy as np

DTYPES: Final[dict[str, str]] = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""TensorRT's name -> ours."""


def storage(dtype: str) -> np.dtype:
    """What holds the values of a format bit by bit."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def to_device(array: np.ndarray, dtype: str) -> np.ndarray:
    """Contiguous values in a format: what is copied to the GPU."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(array, dtype=np.dtype(dtype))
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16  # to nearest, ties to even
    quiet = (bits >> 16) | 0x40  # a NaN whose payload would round away stays one
    return np.where(np.isnan(array), quiet, rounded).astype(np.uint16)


def from_device(array: np.ndarray, dtype: str) -> np.ndarray:
    """What was copied from the GPU: floating formats in float32."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32) if array.dtype == np.float16 else array
