"""Weights of what stays.

W, W*   (out, in): the weight, or the best dense weight for the inputs and the target as they are
H       (in, in), damped gram of the inputs (linalg.Factor.gram)
R       (out, in): W* H, the cross moment of target and inputs
X       (out, in): the weight sought, zero outside its support
f(X)    per row: x H x^T - 2 x r^T, the loss (x - w*) H (x - w*)^T up to a constant
"""

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from obsdiff.core import linalg
from obsdiff.core.gram import full_precision
from obsdiff.core.metric import Stack

CHUNK: Final = 1 << 23
"""Entries of each working matrix: rows are taken in chunks of about this size, which bounds memory."""

TOLERANCE: Final = 1e-4
"""A row whose residual is this share of its right side is solved, H having a unit diagonal."""


def refit(weight: Tensor, gram: Tensor, keep: Tensor) -> Tensor:
    """Least-squares weights of the kept columns.

    Minimises tr((W - W') H (W - W')^T) over W' that are zero outside `keep`: the OBS update (Hassibi & Stork 1993) for
    all dropped columns at once, W'[:, keep] = W H[:, keep] H[keep, keep]^-1.

    Args:
        weight: (out, in), any float dtype.
        gram: (in, in), float64: H, damped (linalg.Factor.gram).
        keep: (k,), sorted column indices.

    Returns:
        (out, k), float64.

    Raises:
        CalibrationError: the gram is not positive definite on the kept columns.
    """
    columns = gram[:, keep]  # (in, k)
    target = weight.double() @ columns  # (out, k)
    return linalg.solve(columns[keep], target.mT).mT


def refit_support(
    right: Tensor,
    gram: Tensor,
    keep: Tensor,
    start: Tensor,
    *,
    iterations: int = 32,
    tolerance: float = TOLERANCE,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Least-squares weights of a support that differs from row to row.

    Minimises f over X that are zero outside `keep`, by Jacobi-preconditioned conjugate gradients on all rows at once:
    one product (out, in) x (in, in) an iteration, one step size a row. The last test is in float64: a row that came
    out worse than it went in keeps its start.

    Args:
        right: (out, in), float: R.
        gram: (in, in), float64: H, positive definite.
        keep: (out, in), bool.
        start: (out, in), float; entries outside `keep` count as zero.
        iterations: at most.
        tolerance: a row is done when its residual, H scaled to a unit diagonal, is this share of its right side.
        dtype: of the iterations; float32 on H scaled to a unit diagonal reaches 1e-6 of the optimal loss's excess.

    Returns:
        (out, in), float64, zero outside `keep`.

    Raises:
        CalibrationError: the gram has a diagonal entry that is not positive.
    """
    scaled, scale = linalg.unit_diagonal(gram, dtype)
    found = torch.empty(keep.shape, dtype=torch.float64, device=gram.device)
    for rows in _chunks(keep):
        before = start[rows].double().masked_fill(~keep[rows], 0)
        solution = conjugate_gradients(
            (right[rows] * scale).to(dtype),
            scaled,
            keep[rows],
            (before / scale).to(dtype),
            iterations=iterations,
            tolerance=tolerance,
        )
        found[rows] = _better_rows(before, solution.double() * scale, right[rows].double(), gram)
    return found


def conjugate_gradients(
    right: Tensor,
    gram: Tensor,
    keep: Tensor,
    start: Tensor,
    *,
    iterations: int,
    tolerance: float,
    stack: Stack | None = None,
) -> Tensor:
    """Minimises f on the support where H has a unit diagonal, the Jacobi preconditioner then being 1.

    Where it is known what errors of the output cost, it is tr(C X H X^T) - 2 tr(C X R^T), and a layer's rows are solved
    for together.

    Args:
        right: (out, in), float32 or float64: R in the units of H.
        gram: (in, in), in the same dtype: H, of unit diagonal, positive definite.
        keep: (out, in), bool.
        start: (out, in), in the same dtype; zero outside `keep`.
        iterations: at most.
        tolerance: a row is done when its residual is this share of its right side, both on the support.
        stack: C; None is the identity.

    Returns:
        (out, in). Up to rounding f never rises.
    """
    found = torch.empty_like(right)
    with full_precision():
        for part, metric in [(slice(None), None)] if stack is None else stack.parts:
            own = Stack([metric], [len(keep[part])], right)
            for rows in _chunks(keep[part]) if metric is None else [slice(None)]:
                found[part][rows] = _descend(
                    right[part][rows],
                    gram,
                    keep[part][rows],
                    start[part][rows],
                    iterations=iterations,
                    tolerance=tolerance,
                    metric=None if metric is None else own,
                )
    return found


def row_losses(weight: Tensor, target: Tensor, gram: Tensor, stack: Stack | None = None) -> Tensor:
    """(x - w*) H (x - w*)^T of each row; with a metric each row's part of tr(S (X - W*) H (X - W*)^T).

    Args:
        weight: (out, in), any float dtype: X.
        target: (out, in), any float dtype: W*.
        gram: (in, in), float64: H.
        stack: what errors of the output cost, in float64; None is the identity.

    Returns:
        (out,), float64, without a metric at least 0.
    """
    if stack is not None:
        change = stack.scale * (weight.double() - target.double())
        return (stack.apply(change @ gram) * change).sum(dim=1)
    losses = torch.empty(len(weight), dtype=torch.float64, device=gram.device)
    for rows in _chunks(weight):
        error = weight[rows].double() - target[rows].double()
        losses[rows] = ((error @ gram) * error).sum(dim=1)
    return losses.clamp_min_(0)


def _chunks(matrix: Tensor) -> Iterator[slice]:
    """Runs of rows, of about CHUNK entries each."""
    height = max(1, CHUNK // max(1, matrix.shape[1]))
    return (slice(top, top + height) for top in range(0, len(matrix), height))


def _descend(
    right: Tensor,
    gram: Tensor,
    keep: Tensor,
    start: Tensor,
    *,
    iterations: int,
    tolerance: float,
    metric: Stack | None,
) -> Tensor:
    """Conjugate gradients on H of unit diagonal; all tensors in one dtype. Without a metric rows are independent."""
    mask = keep.to(right.dtype)

    def cost(rows: Tensor) -> Tensor:
        return (rows if metric is None else metric.apply(rows)).mul_(mask)

    def energy_of(rows: Tensor) -> Tensor:  # (out, 1), or (1, 1) of all rows
        return rows.square().sum(dim=1 if metric is None else None, keepdim=True)

    solution = start
    residual = cost(right - solution @ gram)
    direction = residual.clone()
    energy = energy_of(residual)
    enough = (tolerance * tolerance) * energy_of(cost(right.clone()))
    tiny = torch.finfo(right.dtype).tiny
    for _ in range(iterations):
        active = energy > enough
        if not bool(active.any()):
            break
        image = cost(direction @ gram)
        along = (direction * image).sum(dim=1 if metric is None else None, keepdim=True).clamp_min(tiny)
        step = torch.where(active, energy / along, 0)
        solution = torch.addcmul(solution, step, direction)
        residual.addcmul_(step, image, value=-1)
        previous, energy = energy, energy_of(residual)
        direction.mul_(energy / previous.clamp_min(tiny)).add_(residual)
    return solution


def _better_rows(before: Tensor, after: Tensor, right: Tensor, gram: Tensor) -> Tensor:
    """The rows of `after` where f is lower than in `before`, those of `before` elsewhere; all float64."""
    step = after - before
    change = (step * ((after + before) @ gram - 2 * right)).sum(dim=1, keepdim=True)  # f(after) - f(before)
    return torch.where(change < 0, after, before)
