"""The best weight of a pattern that is found without training: a joint support, then least squares on it.

W*      (out, in): the best dense weight: the weight itself, or R H^-1 where the target is not what it computes
H       (in, in), damped gram (linalg.Factor.gram)
loss    tr((X - W*) H (X - W*)^T)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from obsdiff.core import admm
from obsdiff.core.linalg import Factor
from obsdiff.core.refit import refit_support, row_losses
from obsdiff.core.support import check_groups, sweep
from obsdiff.sparsity import NM, Pattern


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to look.

    Attributes:
        penalties: ADMM's values of rho, one Cholesky inverse each.
        iterations: at each penalty, at most.
        refits: iterations of the refit, at most.
        sweep: whether the OBS support competes too, so that the result is never worse than it; a loop over columns.
    """

    penalties: tuple[float, ...]
    iterations: int
    refits: int
    sweep: bool


FULL: Final = Effort(penalties=admm.PENALTIES, iterations=5, refits=32, sweep=True)
FAST: Final = Effort(penalties=(0.3,), iterations=10, refits=12, sweep=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """A pruned weight.

    Attributes:
        weight: (out, in), float64, zero outside `keep`.
        keep: (out, in), bool: the support.
        losses: (out,), float64: (x - w*) H (x - w*)^T of each row; their sum is the objective.
    """

    weight: Tensor
    keep: Tensor
    losses: Tensor

    @property
    def objective(self) -> float:
        """tr((X - W*) H (X - W*)^T)."""
        return float(self.losses.sum())


def solve(
    target: Tensor,
    factor: Factor,
    pattern: Pattern,
    *,
    rows: Sequence[int] | None = None,
    effort: Effort = FULL,
    block: int = 128,
) -> Solution:
    """Chooses a support and solves for the weights on it.

    Candidates are the ADMM support and, with `effort.sweep`, the OBS support, both refitted. The better one is taken
    row by row for N:M, layer by layer for unstructured, where rows share one budget.

    Args:
        target: (out, in), any float dtype: W*. Entries that read dead channels are taken as zero.
        factor: of the gram of the inputs.
        pattern: what is removed.
        rows: how many rows each of the layers stacked in `target` has, layers that share their inputs (q, k, v);
            None: it is one layer. Only unstructured patterns need it.
        effort: FULL or FAST, or one's own.
        block: columns per lazy update of the sweep.

    Returns:
        never worse than the OBS sweep's own weight, with `effort.sweep`.

    Raises:
        ConfigError: N:M, and `in` is no multiple of M.
    """
    check_groups(target.shape[1], pattern)
    wanted = target.double().masked_fill(factor.dead, 0)
    right = wanted @ factor.gram
    keep, start = admm.support(
        wanted, factor.gram, pattern, rows=rows, penalties=effort.penalties, iterations=effort.iterations
    )
    best = _refitted(wanted, right, factor, keep, start, effort.refits)
    if not effort.sweep:
        return best
    parts = [len(wanted)] if rows is None else list(rows)
    sweeps = [sweep(part, factor.upper, pattern, block=block) for part in torch.split(wanted.float(), parts)]
    start, keep = (torch.cat(halves) for halves in zip(*sweeps, strict=True))
    swept = _refitted(wanted, right, factor, keep, start, effort.refits)
    return _better(best, swept, [1] * len(wanted) if isinstance(pattern, NM) else parts)


def _refitted(target: Tensor, right: Tensor, factor: Factor, keep: Tensor, start: Tensor, iterations: int) -> Solution:
    weight = refit_support(right, factor.gram, keep, start, iterations=iterations)
    return Solution(weight=weight, keep=keep, losses=row_losses(weight, target, factor.gram))


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
