"""Eight-bit number formats: how numbers become codes.

    scale    value = code * scale; one for a tensor, or one for each output of a weight. There is no zero point: zero
             is code zero, so zeros of a pattern stay zeros.

Rounding is that of ONNX's QuantizeLinear: to the nearest code, ties to even, beyond the largest code to that code.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

SMALLEST_SCALE: Final = 2.0**-20
"""Smaller scales are raised to it: float16 still has four bits for this one, and nothing for 2**-25."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format of eight bits.

    Attributes:
        name: as in `--precision`.
        onnx: its name in ONNX.
        dtype: torch's.
        lowest, largest: codes at the ends.
        per_output: whether a weight has a scale for each output, or one for all.
    """

    name: str
    onnx: str
    dtype: torch.dtype
    lowest: float
    largest: float
    per_output: bool

    def encode(self, values: Tensor, scale: Tensor) -> Tensor:
        """Codes of the values, in `dtype`; `scale` broadcasts."""
        steps = (values.float() / scale.float()).clamp(self.lowest, self.largest)
        return (steps.round() if self.dtype == torch.int8 else steps).to(self.dtype)

    def rounded(self, values: Tensor, scale: Tensor) -> Tensor:
        """What is left of the values after a journey through the codes; in their own dtype."""
        return (self.encode(values, scale).float() * scale.float()).to(values.dtype)


INT8: Final = Format(name="int8", onnx="INT8", dtype=torch.int8, lowest=-128, largest=127, per_output=True)
FP8: Final = Format(
    name="fp8", onnx="FLOAT8E4M3FN", dtype=torch.float8_e4m3fn, lowest=-448, largest=448, per_output=False
)
FORMATS: Final = {each.name: each for each in (INT8, FP8)}


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales, float32, as a graph of this dtype stores them; what is rounded must be rounded by these.

    A scale of zero, of values that are all zero, becomes one.
    """
    scale = torch.where(scale > 0, scale.float(), 1.0)
    return scale.to(dtype).float().clamp_min(SMALLEST_SCALE)
