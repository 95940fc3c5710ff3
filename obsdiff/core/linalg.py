"""Damped factorisations of a gram.

    G       gram, (d, d)
    H       the damped gram: G + lambda I, dead channels replaced
    U       upper triangular, H^-1 = U^T U: row j of U is what OBS needs to remove column j and update those after it

Everything here is float64. Cholesky runs on H scaled to a unit diagonal, which costs nothing and keeps the condition
number, hence the error, small where a few channels carry most of the energy.
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from obsdiff_runtime.errors import CalibrationError

log = logging.getLogger(__name__)

RETRIES: Final = (1.0, 10.0, 100.0, 1000.0)
"""Factors on the damping, tried in turn until the factorisation succeeds."""

DEAD: Final = 1e-12
"""A channel whose energy is at most this share of the largest never spoke in calibration."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Factor:
    """A damped gram, factorised.

    Attributes:
        gram: (d, d), float64: H, symmetric positive definite.
        lower: (d, d), float64: L, lower triangular, L L^T = J S H S J, with J the reversal and S the scaling of H to a
            unit diagonal.
        dead: (d,), bool: channels that were silent; their row and column of H are those of the identity, and the
            weights that read them are to be set to zero.
        damping: lambda as a fraction of the mean diagonal of the live channels, after retries.
    """

    gram: Tensor
    lower: Tensor
    dead: Tensor
    damping: float

    @cached_property
    def upper(self) -> Tensor:
        """U, (d, d), float64: S H S = R R^T with R = J L J, hence U = R^-1 S. H^-1 itself is never formed."""
        eye = torch.eye(len(self.gram), dtype=self.gram.dtype, device=self.gram.device)
        upper: Tensor = torch.linalg.solve_triangular(self.lower.flip(0, 1), eye, upper=True)
        return upper.mul_(self.gram.diagonal().rsqrt())

    def solve(self, right: Tensor) -> Tensor:
        """H^-1 times (d, n), float64."""
        scale = self.gram.diagonal().rsqrt()[:, None]
        return scale * torch.cholesky_solve((scale * right).flip(0), self.lower).flip(0)

    def inverse(self) -> Tensor:
        """H^-1, (d, d), float64."""
        return self.upper.mT @ self.upper


def factorise(gram: Tensor, damp: float = 0.01) -> Factor:
    """Damps a gram and factorises its inverse.

    lambda = damp * mean(diag G) over the live channels (arXiv 2510.06751 as implemented; SparseGPT). Where that is not
    positive definite, 10, 100 and 1000 times as much is tried, each retry logged as a warning.

    Args:
        gram: (d, d), float32 or wider; symmetric up to rounding.
        damp: at least 0.

    Raises:
        CalibrationError: the gram is empty, not finite, zero, or not positive definite at any damping.
    """
    check(gram)
    damped = gram.double()
    damped = (damped + damped.mT).div_(2)
    diagonal = damped.diagonal().clone()
    largest = float(diagonal.max())
    if largest <= 0:
        raise CalibrationError("the gram is zero: every activation of this layer was zero in calibration")
    dead = diagonal <= DEAD * largest
    damped[dead, :] = 0
    damped[:, dead] = 0
    mean = float(diagonal[~dead].mean())

    for factor in RETRIES if damp > 0 else RETRIES[:1]:
        damped.diagonal().copy_((diagonal + factor * damp * mean).masked_fill(dead, 1.0))
        lower = _reversed_factor(damped)
        if lower is not None:
            return Factor(gram=damped, lower=lower, dead=dead, damping=factor * damp)
        log.warning("a gram of %d channels is not positive definite at damping %g", len(gram), factor * damp)
    raise CalibrationError(
        f"the gram is not positive definite, not even with {factor * damp:g} times its mean diagonal added"
        f" ({len(gram)} channels); calibrate on more prompts or raise --damp"
    )


def solve(gram: Tensor, right: Tensor) -> Tensor:
    """Solves gram @ x = right.

    Args:
        gram: (d, d), float64, positive definite, such as Factor.gram or a principal part of it.
        right: (d, n), float64.

    Returns:
        (d, n), float64.

    Raises:
        CalibrationError: not positive definite.
    """
    scale = gram.diagonal().rsqrt()
    lower, failed = torch.linalg.cholesky_ex(gram * scale[:, None] * scale)
    if int(failed) or not bool(lower.isfinite().all()):
        raise CalibrationError("the gram is not positive definite on the kept columns; raise --damp")
    return scale[:, None] * torch.cholesky_solve(scale[:, None] * right, lower)


def unit_diagonal(gram: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """S H S with S = diag(H)^-1/2: the same problem in units in which every channel has energy 1.

    Args:
        gram: (d, d), float64: H, damped.
        dtype: of the result. On this scale float32 is enough for iterative solvers.

    Returns:
        S H S, (d, d), `dtype`, and the diagonal of S, (d,), float64.

    Raises:
        CalibrationError: a diagonal entry is not positive.
    """
    if not float(gram.diagonal().min()) > 0:
        raise CalibrationError("the gram has a channel without energy; factorise replaces dead channels: use its gram")
    scale = gram.diagonal().rsqrt()
    scaled = torch.empty(gram.shape, dtype=dtype, device=gram.device)
    height = max(1, (1 << 22) // len(gram))
    for top in range(0, len(gram), height):
        rows = slice(top, top + height)
        scaled[rows] = gram[rows] * scale[rows, None] * scale
    return scaled, scale


def check(gram: Tensor) -> None:
    """Refuses a gram that is no gram.

    Raises:
        CalibrationError: not square, empty, not finite, or with a negative diagonal.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise CalibrationError(f"a gram is square and not empty; this one is {tuple(gram.shape)}")
    broken = int((~gram.isfinite()).sum())
    if broken:
        raise CalibrationError(f"the gram is not finite: {broken} of {gram.numel()} entries are NaN or infinite")
    if float(gram.diagonal().min()) < 0:
        raise CalibrationError("the gram is indefinite: its diagonal, a sum of squares, has a negative entry")


def relative_loss(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """tr(dW G dW^T) / tr(W G W^T): the share of the output's energy that is lost, = |dW X|^2 / |W X|^2.

    Args:
        weight: (out, d), any float dtype.
        pruned: (out, d), any float dtype.
        gram: (d, d), undamped.

    Returns:
        0 for equal weights, also where the energy itself is zero.
    """
    before, matrix = weight.double(), gram.double()
    change = pruned.double() - before
    lost = float(((change @ matrix) * change).sum())
    energy = float(((before @ matrix) * before).sum())
    return max(lost, 0.0) / energy if energy > 0 else 0.0


def _reversed_factor(gram: Tensor) -> Tensor | None:
    """L with L L^T = J S H S J, or None where H is not positive definite."""
    scale = gram.diagonal().rsqrt()
    lower, failed = torch.linalg.cholesky_ex((gram * scale[:, None]).mul_(scale).flip(0, 1))
    return None if int(failed) or not _finite(lower) else lower


def _finite(matrix: Tensor) -> bool:
    """Whether every entry is, by their sum of magnitudes: no mask of the matrix's size is made."""
    return bool(torch.linalg.vector_norm(matrix, ord=float("inf")).isfinite())
