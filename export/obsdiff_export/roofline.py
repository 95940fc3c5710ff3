"""Estimates, not measurements: the shortest time that a GPU's published peaks allow for a matrix product.

A product takes at least its operations over the tensor cores' peak, and at least its bytes over the memory's bandwidth;
the larger of the two is the estimate. Real kernels take longer, sparse ones by more: the peaks of 2:4 are twice the
dense ones, while public measurements of 2:4 on the linears of transformers lie at 1.0 to 1.3 times (REPORTED). What an
estimate can say is where 2:4 could not help at all: where memory, not arithmetic, is the limit.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from obsdiff_export.linears import Shape
from obsdiff_runtime.errors import ConfigError

REPORTED: Final = (1.0, 1.3)
"""What was reported of 2:4 against dense on the linears of transformers: from no gain to this, in the good case."""

METADATA_BITS: Final = 2
"""Per kept weight of a 2:4 matrix: where in its four it stood (NVIDIA Ampere architecture whitepaper)."""

BYTES: Final[Mapping[str, float]] = {"float16": 2, "bfloat16": 2, "int8": 1, "float8": 1}


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Of the tensor cores, in 1e12 operations a second, two for each multiply-accumulate.

    Attributes:
        dense, sparse: without and with 2:4.
        derived: how the number follows from published ones, "" where it is printed in the source itself.
    """

    dense: float
    sparse: float
    derived: str = ""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Published figures.

    Attributes:
        name: as the vendor writes it.
        bandwidth: of its memory, 1e9 bytes a second.
        peaks: by precision; one that is absent is not known here for certain.
        source: where they are printed.
    """

    name: str
    bandwidth: float
    peaks: Mapping[str, Peak]
    source: str


def _halves(dense: float, sparse: float) -> dict[str, Peak]:
    return {"float16": Peak(dense=dense, sparse=sparse), "bfloat16": Peak(dense=dense, sparse=sparse)}


_ORIN: Final = "half of the printed int8 figure, as on every Ampere GPU with tensor cores"
_THOR: Final = "the printed 2070 of sparse FP4, halved for each doubling of the format and for dense"

GPUS: Final[Mapping[str, Gpu]] = {
    "a100": Gpu(
        name="A100 80GB SXM",
        bandwidth=2039,
        peaks={**_halves(312, 624), "int8": Peak(dense=624, sparse=1248)},
        source="NVIDIA A100 Tensor Core GPU datasheet",
    ),
    "h100": Gpu(
        name="H100 SXM5",
        bandwidth=3350,
        peaks={
            **_halves(989.4, 1978.9),
            "int8": Peak(dense=1978.9, sparse=3957.8),
            "float8": Peak(dense=1978.9, sparse=3957.8),
        },
        source="NVIDIA H100 Tensor Core GPU Architecture whitepaper; bandwidth: H100 datasheet",
    ),
    "h200": Gpu(
        name="H200 SXM",
        bandwidth=4800,
        peaks={
            **_halves(989.4, 1978.9),
            "int8": Peak(dense=1978.9, sparse=3957.8),
            "float8": Peak(dense=1978.9, sparse=3957.8),
        },
        source="NVIDIA H200 Tensor Core GPU datasheet, with the digits of its chip, GH100, from the H100 whitepaper",
    ),
    "l4": Gpu(
        name="L4",
        bandwidth=300,
        peaks={**_halves(121, 242), "int8": Peak(dense=242.5, sparse=485), "float8": Peak(dense=242.5, sparse=485)},
        source="NVIDIA L4 Tensor Core GPU datasheet, which prints the sparse figures; dense is half",
    ),
    "rtx4090": Gpu(
        name="GeForce RTX 4090",
        bandwidth=1008,
        peaks={
            **_halves(165.2, 330.4),
            "int8": Peak(dense=660.6, sparse=1321.2),
            "float8": Peak(dense=330.3, sparse=660.6),
        },
        source="NVIDIA Ada GPU Architecture whitepaper; floating formats accumulate in FP32",
    ),
    "rtx5090": Gpu(
        name="GeForce RTX 5090",
        bandwidth=1792,
        peaks={
            **_halves(209.5, 419),
            "int8": Peak(dense=838, sparse=1676),
            "float8": Peak(dense=419, sparse=838),
        },
        source="NVIDIA RTX Blackwell GPU Architecture whitepaper; floating formats accumulate in FP32",
    ),
    "orin": Gpu(
        name="Jetson AGX Orin 64GB",
        bandwidth=204.8,
        peaks={
            "int8": Peak(dense=85, sparse=170, derived="the source prints the sparse figure; dense is half"),
            "float16": Peak(dense=42.5, sparse=85, derived=_ORIN),
            "bfloat16": Peak(dense=42.5, sparse=85, derived=_ORIN),
        },
        source="NVIDIA Jetson AGX Orin Series Technical Brief: the GPU alone, without the DLAs, at full power",
    ),
    "thor": Gpu(
        name="Jetson AGX Thor (T5000)",
        bandwidth=273,
        peaks={
            "float16": Peak(dense=258.75, sparse=517.5, derived=_THOR),
            "bfloat16": Peak(dense=258.75, sparse=517.5, derived=_THOR),
            "float8": Peak(dense=517.5, sparse=1035, derived=_THOR),
        },
        source="NVIDIA Jetson Thor Series Modules datasheet: 2070 TFLOPS of sparse FP4, at full power",
    ),
}


def gpu(name: str) -> Gpu:
    """The GPU of that name, "H100" or "RTX 4090".

    Raises:
        ConfigError: there is none; lists those that are known.
    """
    key = "".join(letter for letter in name.lower() if letter.isalnum()).removeprefix("nvidia").removeprefix("geforce")
    if key not in GPUS:
        near = difflib.get_close_matches(key, GPUS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--gpu {name}: no published figures of it are known here; there are {', '.join(GPUS)}{hint}")
    return GPUS[key]


def peak(card: Gpu, dtype: str) -> Peak:
    """Raises ConfigError where the GPU has no figure for a precision that is certain."""
    if dtype not in card.peaks:
        raise ConfigError(
            f"{card.name}: no published peak of {dtype} is known here for certain; there are {', '.join(card.peaks)}"
        )
    return card.peaks[dtype]


def estimate_ms(card: Gpu, shape: Shape, dtype: str, *, sparse: bool) -> float:
    """The shortest time that the peaks allow, in milliseconds; outputs of 8-bit products are 16 bits wide.

    Args:
        card: the GPU.
        shape: of the product.
        dtype: "float16", "bfloat16", "int8" or "float8".
        sparse: with a 2:4 weight.

    Raises:
        ConfigError: the GPU has no figure for this precision.
    """
    figures = peak(card, dtype)
    speed = (figures.sparse if sparse else figures.dense) * 1e12
    arithmetic = 2 * shape.macs / speed
    return 1e3 * max(arithmetic, _bytes(shape, dtype, sparse=sparse) / (card.bandwidth * 1e9))


def memory_bound(card: Gpu, shape: Shape, dtype: str) -> bool:
    """Whether a dense product waits for memory, so that sparse arithmetic cannot help but by its smaller weights."""
    arithmetic = 2 * shape.macs / (peak(card, dtype).dense * 1e12)
    return _bytes(shape, dtype, sparse=False) / (card.bandwidth * 1e9) > arithmetic


def _bytes(shape: Shape, dtype: str, *, sparse: bool) -> float:
    size = BYTES[dtype]
    weight = shape.k * shape.n * size
    if sparse:
        weight = weight / 2 + shape.k * shape.n / 2 * METADATA_BITS / 8
    return weight + size * shape.m * shape.k + max(size, 2) * shape.m * shape.n
