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
FAST: Final = Effort(penalties=(0.15, 0.4, 1.2), iterations=3, refits=10, sweep=False)
"""Two thirds of LEAN's time for 10 to 16 % more loss."""
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
    space = _Space(wanted, factor, parts, [None] * len(parts) if metrics is None else metrics)
    best = space.joint(pattern, effort) if effort.penalties else None
    if best is not None and not effort.sweep:
        return best
    sweeps = [sweep(part, factor.upper, pattern, block=block) for part in torch.split(wanted.float(), parts)]
    start, keep = (torch.cat(halves) for halves in zip(*sweeps, strict=True))
    if space.coupled:
        swept = space.refitted(keep, start, effort)
    else:
        weight = refit_support(wanted @ factor.gram, factor.gram, keep, start, iterations=effort.refits)
        swept = Solution(weight=weight, keep=keep, losses=row_losses(weight, wanted, factor.gram))
    if best is None:
        return swept
    return _better(best, swept, parts if space.coupled or not isinstance(pattern, NM) else [1] * len(wanted))


class _Space:
    """Where solving is well conditioned: H of unit diagonal, rows in the scale of their metric, float32.

    Attributes:
        coupled: whether a metric makes rows depend on one another.
    """

    def __init__(self, target: Tensor, factor: Factor, rows: Sequence[int], metrics: Sequence[Metric | None]) -> None:
        self._target, self._factor, self._rows = target, factor, rows
        self._gram, self._scale = linalg.unit_diagonal(factor.gram)
        self._stack = Stack(metrics, rows, self._gram)
        self._wanted = self._within(target)
        self.coupled = any(metrics)
        self._exact = Stack(metrics, rows, factor.gram) if self.coupled else None

    def joint(self, pattern: Pattern, effort: Effort) -> Solution:
        """The ADMM support, refitted."""
        keep, start = admm.support(
            self._wanted,
            self._gram,
            pattern,
            stack=self._stack,
            rows=self._rows,
            penalties=effort.penalties,
            iterations=effort.iterations,
        )
        return self._solution(keep, start, effort)

    def refitted(self, keep: Tensor, start: Tensor, effort: Effort) -> Solution:
        """Least squares on a support, from a weight on it."""
        return self._solution(keep, self._within(start), effort)

    def _within(self, weight: Tensor) -> Tensor:
        return (weight / self._scale * self._stack.scale).to(self._gram.dtype)

    def _solution(self, keep: Tensor, start: Tensor, effort: Effort) -> Solution:
        """The loss is in float64.

        Raises:
            CalibrationError: float32 does not hold the layer's outputs.
        """
        with full_precision():
            right = self._wanted @ self._gram
        found = conjugate_gradients(
            right, self._gram, keep, start, iterations=effort.refits, tolerance=TOLERANCE, stack=self._stack
        )
        weight = found.double() * self._scale / self._stack.scale
        if not bool(weight.isfinite().all()):
            raise CalibrationError(
                "the layer's outputs are too large for float32; are its weights those of a trained model?"
            )
        losses = row_losses(weight, self._target, self._factor.gram, self._exact)
        return Solution(weight=weight, keep=keep, losses=losses)


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
