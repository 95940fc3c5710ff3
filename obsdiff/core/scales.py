"""Scales of eight-bit numbers: the one under which rounding costs least.

    n, k      a linear's output and input width
    share     of the largest magnitude that the largest code stands for; what is beyond is clipped

Rounding itself is handed in, so that what is chosen here is chosen for the arithmetic that will run.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

Rounded = Callable[[Tensor, Tensor], Tensor]
"""(values, scale that broadcasts) -> what is left of the values."""

SHARES: Final = tuple(share / 100 for share in range(100, 34, -5))
"""Tried for activations and weights: 1, 0.95, ... 0.35."""


def candidates(largest: Tensor, top: float, stored: Callable[[Tensor], Tensor]) -> Tensor:
    """Scales to choose from, as they are stored.

    Args:
        largest: magnitudes, any shape.
        top: the largest code.
        stored: from a scale to what the graph's dtype keeps of it.

    Returns:
        (len(SHARES), *largest.shape).
    """
    return stored(torch.stack([largest.float() * (share / top) for share in SHARES]))


def errors(values: Tensor, importance: Tensor, scales: Tensor, rounded: Rounded) -> Tensor:
    """What rounding by each scale costs: sum over tokens and inputs of importance * (x - rounded x)^2.

    Args:
        values: (tokens, k).
        importance: (k,), such as the energy of the weights that read an input.
        scales: (candidates,).
        rounded: the rounding.

    Returns:
        (candidates,), float64.
    """
    values = values.float()
    found = [
        ((values - rounded(values, scale)).square_().sum(0).double() * importance.double()).sum() for scale in scales
    ]
    return torch.stack(found).cpu()


def weight_scales(weight: Tensor, importance: Tensor, scales: Tensor, rounded: Rounded) -> tuple[Tensor, float]:
    """The scales of a weight: those of least sum of importance * (w - rounded w)^2, for each output or over all.

    Args:
        weight: (n, k).
        importance: (k,), mean squares of the inputs: where inputs are uncorrelated, the sum is the output's error.
        scales: (candidates, n) for one scale an output, or (candidates,) for one in all.
        rounded: the rounding.

    Returns:
        (n,) or (): the scales; and the error as a share of the sum for w itself, 0 for a weight of zeros.
    """
    values, importance = weight.float(), importance.double()
    per_output = scales.ndim == 2
    costs = []
    for scale in scales:
        lost = values - rounded(values, scale[:, None] if per_output else scale)
        costs.append(
            (lost.double().square() @ importance) if per_output else (lost.double().square() @ importance).sum()
        )
    table = torch.stack(costs)  # (candidates, n) or (candidates,)
    best, place = table.min(0)
    chosen = scales.gather(0, place[None])[0] if per_output else scales[place]
    whole = float((values.double().square() @ importance).sum())
    return chosen, float(best.sum()) / whole if whole else 0.0
