"""The best weight of a pattern that is found without training: a joint support, then least squares on it.

W*      (out, in): the best dense weight: the weight itself, or R H^-1 where the target is not what it computes
H       (in, in), damped gram (linalg.Factor.gram)
S       (out, out): what errors of the output cost (metric.Metric), the identity where that is not known
loss    tr(S (X - W*) H (X - W*)^T)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from obsdiff.core import admm, linalg
from obsdiff.core.gram import full_precision
from obsdiff.core.linalg import Factor
from obsdiff.core.metric import Metric, Stack
from obsdiff.core.refit import TOLERANCE, conjugate_gradients, refit_support, row_losses
from obsdiff.core.support import check_groups, sweep
from obsdiff.sparsity import NM, Pattern
from obsdiff_runtime.errors import CalibrationError


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to look.

    Attributes:
        penalties: ADMM's values of rho; none: no ADMM.
        iterations: at each penalty, at most.
        refits: iterations of the refit, at most.
        sweep: whether the OBS support competes too, so that the result is never worse than it; a loop over columns.
    """

    penalties: tuple[float, ...]
    iterations: int
    refits: int
    sweep: bool


FULL: Final = Effort(penalties=admm.PENALTIES, iterations=5, refits=16, sweep=True)
LEAN: Final = Effort(penalties=admm.PENALTIES, iterations=5, refits=16, sweep=False)
"""FULL without the sweep: the same result wherever ADMM's support wins, and no loop over columns."""
FAST: Final = Effort(penalties=(0.3,), iterations=6, refits=10, sweep=False)
"""Less than half of LEAN's time for 5 to 20 % more loss."""
SWEPT: Final = Effort(penalties=(), iterations=0, refits=16, sweep=True)
"""No ADMM: the OBS support, refitted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """A pruned weight.

    Attributes:
        weight: (out, in), float64, zero outside `keep`.
        keep: (out, in), bool: the support.
        losses: (out,), float64: each row's part of the loss; their sum is the objective.
    """

    weight: Tensor
    keep: Tensor
    losses: Tensor

    @property
    def objective(self) -> float:
        """tr(S (X - W*) H (X - W*)^T)."""
        return float(self.losses.sum())


def solve(
    target: Tensor,
    factor: Factor,
    pattern: Pattern,
    *,
    rows: Sequence[int] | None = None,
    metrics: Sequence[Metric | None] | None = None,
    effort: Effort = FULL,
    block: int = 128,
) -> Solution:
    """Chooses a support and solves for the weights on it.

    Candidates are the ADMM support and, with `effort.sweep`, the OBS support, both refitted. The better one is taken
    row by row for N:M, layer by layer for unstructured, where rows share one budget, and where a metric couples them.

    Args:
        target: (out, in), any float dtype: W*. Entries that read dead channels are taken as zero.
        factor: of the gram of the inputs.
        pattern: what is removed.
        rows: how many rows each of the layers stacked in `target` has, layers that share their inputs (q, k, v);
            None: it is one layer. Unstructured patterns and metrics need it.
        metrics: S of each layer, None where it is not known; None: of none.
        effort: FULL, LEAN or FAST, or one's own.
        block: columns per lazy update of the sweep.

    Returns:
        never worse than the OBS sweep's own weight, with `effort.sweep`.

    Raises:
        CalibrationError: the target is not finite, or too large for float32.
        ConfigError: N:M, and `in` is no multiple of M.
    """
    check_groups(target.shape[1], pattern)
    if not bool(target.isfinite().all()):
        raise CalibrationError("the weight or target of this layer is not finite; is the checkpoint whole?")
    wanted = target.double().masked_fill(factor.dead, 0)
    parts = [len(wanted)] if rows is None else list(rows)
    known = None if metrics is None or not any(metrics) else metrics
    best = _joint(wanted, factor, pattern, parts, known, effort) if effort.penalties else None
    if best is not None and not effort.sweep:
        return best
    sweeps = [sweep(part, factor.upper, pattern, block=block) for part in torch.split(wanted.float(), parts)]
    start, keep = (torch.cat(halves) for halves in zip(*sweeps, strict=True))
    if known is None:
        weight = refit_support(wanted @ factor.gram, factor.gram, keep, start, iterations=effort.refits)
        swept = Solution(weight=weight, keep=keep, losses=row_losses(weight, wanted, factor.gram))
    else:
        space = _Space(wanted, factor, parts, known)
        swept = space.solution(keep, (start / space.scale * space.stack.scale).to(space.gram.dtype), effort)
    if best is None:
        return swept
    return _better(best, swept, [1] * len(wanted) if isinstance(pattern, NM) and known is None else parts)


class _Space:
    """Where solving is well conditioned: H of unit diagonal, rows in the scale of their metric, float32."""

    def __init__(
        self, target: Tensor, factor: Factor, rows: Sequence[int], metrics: Sequence[Metric | None] | None
    ) -> None:
        self._target, self._factor = target, factor
        self.gram, self.scale = linalg.unit_diagonal(factor.gram)
        metrics = [None] * len(rows) if metrics is None else metrics
        self.stack = Stack(metrics, rows, self.gram)
        self._exact = Stack(metrics, rows, factor.gram) if any(metrics) else None
        self.wanted = (target / self.scale * self.stack.scale).to(self.gram.dtype)

    def solution(self, keep: Tensor, start: Tensor, effort: Effort) -> Solution:
        """Least squares on a support; the loss in float64.

        Raises:
            CalibrationError: float32 does not hold the layer's outputs.
        """
        with full_precision():
            right = self.wanted @ self.gram
        found = conjugate_gradients(
            right, self.gram, keep, start, iterations=effort.refits, tolerance=TOLERANCE, stack=self.stack
        )
        weight = found.double() * self.scale / self.stack.scale
        if not bool(weight.isfinite().all()):
            raise CalibrationError(
                "the layer's outputs are too large for float32; are its weights those of a trained model?"
            )
        losses = row_losses(weight, self._target, self._factor.gram, self._exact)
        return Solution(weight=weight, keep=keep, losses=losses)


def _joint(
    target: Tensor,
    factor: Factor,
    pattern: Pattern,
    rows: Sequence[int],
    metrics: Sequence[Metric | None] | None,
    effort: Effort,
) -> Solution:
    """The ADMM support, refitted."""
    space = _Space(target, factor, rows, metrics)
    keep, start = admm.support(
        space.wanted,
        space.gram,
        pattern,
        stack=space.stack,
        rows=rows,
        penalties=effort.penalties,
        iterations=effort.iterations,
    )
    return space.solution(keep, start, effort)


def _better(first: Solution, second: Solution, parts: Sequence[int]) -> Solution:
    """The better of two solutions, decided for each run of rows on its own."""
    counts = torch.tensor(parts, device=first.losses.device)
    index = torch.repeat_interleave(torch.arange(len(parts), device=counts.device), counts)  # (out,)
    gain = torch.zeros(len(parts), dtype=torch.float64, device=counts.device)
    gain.index_add_(0, index, first.losses - second.losses)
    take = (gain > 0)[index]
    return Solution(
        weight=torch.where(take[:, None], second.weight, first.weight),
        keep=torch.where(take[:, None], second.keep, first.keep),
        losses=torch.where(take, second.losses, first.losses),
    )
