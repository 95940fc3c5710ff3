"""Which number formats torch really multiplies here: a small product each, against float64. Run by `asking.ask`."""

from typing import Any, Final

import torch
from torch import Tensor

SIZE: Final = 128
TOLERANCES: Final = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2, "int8": 0.0, "fp8": 4e-2, "2:4 fp16": 5e-3}
"""Largest error over the largest entry. The product is rounded to the format named (fp8: to bf16), 8 to 11 bits."""


def multiply(question: str) -> dict[str, Any]:
    """The relative error of one product.

    Args:
        question: "cuda/fp16": device and format, of TOLERANCES.

    Raises:
        ArithmeticError: the product is wrong.
        RuntimeError: torch has no kernel for it here.
    """
    device, _, form = question.partition("/")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIZE, SIZE, generator=generator).to(device) for _ in range(2))
    if form == "2:4 fp16":
        a = a * torch.tensor([0.0, 1.0, 0.0, 1.0], device=device).repeat(SIZE // 4)
    got, expected = _product(a, b, form)
    error = float((got.double() - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCES[form]:
        raise ArithmeticError(f"the product is off by {error:.1e} of its largest entry")
    return {"error": error}


def _product(a: Tensor, b: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """The product in that format, and the exact one of the rounded factors, (SIZE, SIZE) each."""
    if form == "int8":
        a, b = ((x * 30).round().clamp(-127, 127).to(torch.int8) for x in (a, b))
        return torch._int_mm(a, b), a.double() @ b.double()
    if form == "fp8":
        a, b = a.to(torch.float8_e4m3fn), b.t().contiguous().to(torch.float8_e4m3fn).t()  # the second by columns
        one = torch.ones((), device=a.device)
        return torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16), a.double() @ b.double()
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "2:4 fp16": torch.float16}[form]
    a, b = a.to(dtype), b.to(dtype)
    if form == "2:4 fp16":
        return torch.mm(torch.sparse.to_sparse_semi_structured(a), b), a.double() @ b.double()
    return a @ b, a.double() @ b.double()
