"""The statistics of a layer's input.

    x       a layer's input, (tokens, d)
    gram    G = sum_i a_i x_i x_i^T / sum_i a_i over calibration tokens i of weight a_i, (d, d)

G is, up to a constant factor, the Hessian of the layer's squared output error.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from obsdiff_runtime.errors import CalibrationError

BYTES_PER_ENTRY: Final = 8
"""What one entry of a gram takes while it is collected and kept: a float64."""

STRIPS: Final = 8
NARROWEST: Final = 128
"""A call's gram is taken in so many strips, none narrower than this: 8 take two thirds of the whole product's time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Gram:
    """Second moment of a layer's input.

    Attributes:
        matrix: (d, d), float64, symmetric: the weighted mean of x x^T.
        mean: (d,), float64: the weighted mean of x.
        tokens: how many tokens were seen, unweighted.
    """

    matrix: Tensor
    mean: Tensor
    tokens: int


class GramAccumulator:
    """Sums up x x^T over the calls of a layer.

    Each call's product is taken in float32 (float64 for float64 input) with TF32 off and added to a float64 sum, so
    that neither half-precision inputs nor the number of calls cost digits.
    """

    def __init__(self, width: int, *, device: torch.device | str = "cpu") -> None:
        self._products = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._sums = torch.zeros(width, dtype=torch.float64, device=device)
        self._counts = torch.zeros(2, dtype=torch.float64, device=device)  # weight, tokens

    @torch.no_grad()
    def add(self, x: Tensor, weight: float = 1.0) -> None:
        """Counts the tokens of one call.

        Args:
            x: (tokens, d), any float dtype.
            weight: of each of these tokens.

        Raises:
            CalibrationError: x holds a NaN or an infinity, or values whose square float32 cannot hold; nothing of x
                is counted. The caller knows which layer and step it was.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        with full_precision():
            product = _squared(wide)
        if not bool(product.diagonal().isfinite().all()):
            raise CalibrationError(_what_is_wrong(x))
        self._products.add_(product, alpha=weight)
        self._sums.add_(wide.sum(dim=0), alpha=weight)
        self._counts[0] += weight * x.shape[0]
        self._counts[1] += x.shape[0]

    @property
    def tokens(self) -> int:
        """How many tokens were counted."""
        return int(self._counts[1])

    def sums(self) -> tuple[Tensor, ...]:
        """All there is, float64 and lent: adding another accumulator's sums in place counts what that one saw."""
        return self._products, self._sums, self._counts

    def gram(self) -> Gram:
        """Ends the collection: the weighted mean over everything added. The accumulator is used up, its memory lent.

        Raises:
            CalibrationError: nothing was added.
        """
        weight, tokens = self._counts.tolist()
        if tokens == 0 or weight <= 0:
            raise CalibrationError("no token reached this layer; were there any prompts?")
        gram = Gram(matrix=self._products.div_(weight), mean=self._sums / weight, tokens=int(tokens))
        del self._products
        return gram


def _squared(x: Tensor) -> Tensor:
    """x^T x, (d, d), of x, (tokens, d): strip by strip from the diagonal on, and the rest by symmetry."""
    width = x.shape[1]
    strip = max(NARROWEST, -(-width // STRIPS))
    if width <= strip:
        return x.mT @ x
    product = x.new_empty(width, width)
    for top in range(0, width, strip):
        end = top + strip
        torch.mm(x[:, top:end].mT, x[:, top:], out=product[top:end, top:])
        product[end:, top:end] = product[top:end, end:].mT
    return product


@contextmanager
def full_precision() -> Iterator[None]:
    """Turns TF32 and other reduced float32 matrix products off, on every backend, and restores them after."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _what_is_wrong(x: Tensor) -> str:
    nans, infinities = int(x.isnan().sum()), int(x.isinf().sum())
    if nans or infinities:
        return (
            f"the activation is not finite: {nans} NaN and {infinities} infinite of {x.numel()} values in "
            f"{str(x.dtype).removeprefix('torch.')}; are the weights finite? "
            "A float16 model may overflow: --device cpu computes in float32"
        )
    return f"the activation is too large to be squared in float32: its largest value is {float(x.abs().max()):.3g}"
