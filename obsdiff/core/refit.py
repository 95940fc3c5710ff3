"""Weights of the columns that stay."""

from torch import Tensor

from obsdiff.core import linalg


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
