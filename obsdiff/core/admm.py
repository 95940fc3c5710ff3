"""Which weights of a linear stay, chosen jointly (ALPS, Meng et al. 2024).

W*      (out, in): the best dense weight
H       (in, in), damped gram scaled to a unit diagonal, and W* with it (linalg.unit_diagonal)
C       (out, out): what errors of the output cost (metric.Stack), the identity where it is not known
K       c C^-1, c being what the cheapest direction of the output costs; the identity where C is
D       (out, in): the iterate that obeys the pattern
V       (out, in): the scaled dual, what the pattern pushed away so far
rho     penalty on |W - D|^2, in units of c; small: W is free, large: the support settles

    W = W* + (W - W* + K (D - V - W)) rho (H + rho I)^-1
    D = the pattern's nearest matrix to W + V
    V = W + V - D

W's step minimises tr(C (W - W*) H (W - W*)^T) + c rho |W - D + V|^2 and, beside it, rho times what a change of W costs
in C - c I (a proximal term; Fazel et al. 2013): a direction of the output is drawn to the pattern the slower, the more
it costs. That makes one matrix of (in, in) serve all directions, whatever they cost: an inverse a penalty, a product
(out, in) x (in, in) an iteration, no eigenvectors and no loop over columns.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from obsdiff.core.gram import full_precision
from obsdiff.core.metric import Stack
from obsdiff.core.support import check_groups, count
from obsdiff.sparsity import NM, Pattern
from obsdiff_runtime.errors import CalibrationError

PENALTIES: Final = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Rising penalties. Over-relaxation, a start from the OBS support, and swaps after the refit gained nothing; eight
iterations each in place of five take 1 % from the velocity error at 2:4."""

SETTLED: Final = 3e-4
"""A penalty is done with when at most this share of the weights changed sides in an iteration."""


def support(
    target: Tensor,
    gram: Tensor,
    pattern: Pattern,
    *,
    stack: Stack | None = None,
    rows: Sequence[int] | None = None,
    penalties: Sequence[float] = PENALTIES,
    iterations: int = 5,
) -> tuple[Tensor, Tensor]:
    """Chooses a support by ADMM.

    Args:
        target: (out, in), float32 or float64: W*, in the units of H, its rows in those of `stack`.
        gram: (in, in), in target's dtype: H, of unit diagonal, positive definite. Float32 is enough.
        pattern: what is removed. Unstructured: floor(out * in * ratio) weights of each layer, anywhere in it.
        stack: C; None is the identity.
        rows: how many rows each of the layers stacked in `target` has; None: it is one layer.
        penalties: values of rho, in turn, rising.
        iterations: at each penalty, at most.

    Returns:
        the support, (out, in), bool, and a weight on it to start a refit from, (out, in).

    Raises:
        CalibrationError: the gram is not positive definite.
        ConfigError: N:M, and `in` is no multiple of M.
    """
    check_groups(target.shape[1], pattern)
    costs = Stack([None], [len(target)], target) if stack is None else stack
    with full_precision():
        free = chosen = target  # W, D
        keep = torch.ones_like(target, dtype=torch.bool)
        dual = torch.zeros_like(target)  # V
        for place, penalty in enumerate(penalties):
            dual *= penalties[place - 1] / penalty if place else 1.0
            shrinking = _shrinking(gram, penalty)
            for _ in range(iterations):
                step = costs.eased(chosen - dual - free).add_(free).sub_(target)
                free = torch.addmm(target, step, shrinking)
                dual += free  # W + V
                before, keep = keep, project(dual, pattern, rows)
                chosen = dual.masked_fill(~keep, 0)
                dual -= chosen
                if int((before ^ keep).sum()) <= SETTLED * keep.numel():
                    break
            del shrinking  # before there is the next
    return keep, chosen


def project(weight: Tensor, pattern: Pattern, rows: Sequence[int] | None = None) -> Tensor:
    """The support of the pattern's nearest matrix: the largest weights stay.

    Args:
        weight: (out, in), float, no NaN.
        pattern: N:M removes exactly N of every M, unstructured exactly floor(out * in * ratio) of each layer.
        rows: how many rows each of the layers stacked in `weight` has; None: it is one layer.

    Returns:
        (out, in), bool; of equal weights the first ones go.
    """
    size = weight.abs()
    if isinstance(pattern, NM):
        return _largest_of_groups(size, pattern)
    parts = torch.split(size, [len(size)] if rows is None else list(rows))
    return torch.cat([_largest(part, count(part.numel(), pattern.ratio)) for part in parts])


def _largest_of_groups(size: Tensor, pattern: NM) -> Tensor:
    """Compares the members of each group pair by pair, which for small M is many times faster than sorting."""
    members = size.view(len(size), -1, pattern.m).movedim(2, 0).contiguous()  # (m, out, in / m)
    rank = torch.zeros(members.shape, dtype=torch.uint8, device=size.device)  # how many of the group go before it
    for first in range(pattern.m):
        for second in range(first + 1, pattern.m):
            goes = members[first] <= members[second]
            rank[second] += goes
            rank[first] += ~goes
    return (rank >= pattern.n).movedim(0, 2).flatten(1)


def _largest(size: Tensor, removed: int) -> Tensor:
    """All but the `removed` smallest; of equal sizes the first ones go."""
    if removed == 0:
        return torch.ones_like(size, dtype=torch.bool)
    flat = size.flatten()
    last = flat.sort().values[removed - 1] if flat.is_cuda else flat.kthvalue(removed).values
    below, equal = flat < last, flat == last
    wanted = removed - int(below.sum())
    if wanted < int(equal.sum()):
        equal &= equal.cumsum(0) <= wanted
    return ~(below | equal).view_as(size)


def _shrinking(gram: Tensor, penalty: float) -> Tensor:
    """rho (H + rho I)^-1."""
    damped = gram.clone()
    damped.diagonal().add_(penalty)
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if int(failed):
        raise CalibrationError("the gram is not positive definite; factorise it first, which damps it")
    return torch.cholesky_inverse(lower).mul_(penalty)
