"""What an error in a linear's output costs the network, by direction.

g       (tokens, out): gradients of the network's output, taken in random directions, by the linear's output
S       (out, out) = E[g g^T]: an error e of the linear's output costs the network's output about e^T S e
G       (in, in): the gram of its input. An error D of its weight costs tr(S D G D^T): Kronecker factors of the
        curvature (K-FAC, Martens & Grosse 2015; for pruning: LLM Surgeon, van der Ouderaa et al. 2024)
T       diag(S)^1/2, the rows' scale, and C = T^-1 S T^-1, of unit diagonal

Few directions matter: of C the k strongest are kept, and the mean of the others. C is an estimate, and drawn to the
identity, the more the fewer tokens it is of. Where `out` is large, S is never formed: S P for a fixed random P of few
columns is summed up, which is enough for the strongest directions (Nystrom approximation; Tropp et al. 2017).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from obsdiff.core.gram import full_precision
from obsdiff_runtime.errors import CalibrationError

RANK: Final = 128
"""Directions that are kept, at most, and at most half of all there are."""

RIDGE: Final = 0.2
"""Least share of the identity in C; half of it costs the velocity at 2:4 3 % more, half as much again 2 %. Of an
estimate from n tokens it is out / (out + n), where that is more."""

FAINT: Final = 1e-3
"""Rows that matter less than this beside the one that matters most are taken to matter so much."""

NOTHING: Final = 1e-30
"""A layer whose gradients' energy is no larger does not reach the network's output."""

SINGULAR: Final = 1e-12
"""An eigenvalue no larger than this share of the largest is nothing but rounding of float64."""

_PROBES: Final[WeakValueDictionary[tuple[int, int, torch.device], Tensor]] = WeakValueDictionary()


def metric_bytes(out: int) -> int:
    """What the metric of a linear takes."""
    return 4 * out * _directions(out) + 8 * (out + _directions(out))


def sum_bytes(out: int) -> int:
    """What the sums that a linear's metric is made of take."""
    return 8 * out * (_columns(out) + 1)


def _directions(out: int) -> int:
    return min(RANK, out // 2)


def _columns(out: int) -> int:
    return min(out, 2 * RANK)


@dataclass(frozen=True, kw_only=True, eq=False)
class Metric:
    """S up to a constant: T (rest I + Q diag(strengths) Q^T) T.

    Attributes:
        scale: (out,), float64: T, at most 1.
        basis: (out, k), float32: Q, whose columns are orthonormal, but for zeros where too few tokens were seen.
        strengths: (k,), float64, at least 0: what each direction costs beside `rest`.
        rest: what any direction costs, above 0.
    """

    scale: Tensor
    basis: Tensor
    strengths: Tensor
    rest: float

    def tensors(self) -> dict[str, Tensor]:
        """All there is, by name; `of_tensors` undoes it."""
        rest = torch.tensor(self.rest, dtype=torch.float64)
        return {"scale": self.scale, "basis": self.basis, "strengths": self.strengths, "rest": rest}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "Metric":
        return cls(
            scale=tensors["scale"],
            basis=tensors["basis"],
            strengths=tensors["strengths"],
            rest=float(tensors["rest"]),
        )

    def root(self, rows: Tensor) -> Tensor:
        """S^1/2 in the place of (out, n), float64, on the device of `rows`: sums of squares are costs then."""
        return self._powered(self.scale.to(rows.device)[:, None] * rows.double(), 0.5)

    def unroot(self, rows: Tensor) -> Tensor:
        """What `root` was given."""
        return self._powered(rows, -0.5) / self.scale.to(rows.device)[:, None]

    def _powered(self, rows: Tensor, power: float) -> Tensor:
        base: float = self.rest**power
        change, basis = (self.rest + self.strengths.to(rows)).pow(power) - base, self.basis.to(rows)
        return base * rows + basis @ (change[:, None] * (basis.mT @ rows))


class GradientMoments:
    """Sums up g g^T over the calls of a linear, or its product with a fixed random matrix where it is large.

    Args:
        out: width of the linear's output.
        device: of the sums.
    """

    def __init__(self, out: int, device: torch.device | str = "cpu") -> None:
        columns = _columns(out)
        self._probe = _probe(out, columns, torch.device(device)) if columns < out else None
        self._image = torch.zeros(out, columns, dtype=torch.float64, device=device)
        self._energy = torch.zeros(out, dtype=torch.float64, device=device)
        self._tokens = torch.zeros(1, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, gradients: Tensor, weight: float = 1.0) -> None:
        """Counts the tokens of one call.

        Args:
            gradients: (tokens, out), any float dtype, on any device.
            weight: of each of these tokens.

        Raises:
            CalibrationError: a gradient is not finite; nothing is counted.
        """
        wide = gradients.to(torch.promote_types(gradients.dtype, torch.float32))
        energy = wide.square().sum(dim=0)
        if not bool(energy.isfinite().all()):
            raise CalibrationError("the gradient of the denoiser's output is not finite here")
        with full_precision():
            seen = wide if self._probe is None else wide @ self._probe.to(wide.device, wide.dtype)
            image = wide.mT @ seen
        self._image.add_(image.to(self._image.device), alpha=weight)
        self._energy.add_(energy.to(self._energy.device), alpha=weight)
        self._tokens += len(wide)

    def sums(self) -> tuple[Tensor, ...]:
        """All there is, float64 and lent."""
        return self._image, self._energy, self._tokens

    def metric(self) -> Metric | None:
        """Of what was counted; None where the network's output does not depend on the linear's."""
        strongest = float(self._energy.max())
        if not strongest > NOTHING:
            return None
        scale = (self._energy / strongest).sqrt().clamp_min(FAINT)
        strengths, basis = _strongest(self._image / strongest, scale, self._probe)
        out, count = len(scale), _directions(len(scale))
        strengths, basis = strengths[:count], basis[:, :count]
        spread = float((self._energy / strongest / scale.square()).sum())  # the trace of C, out but for faint rows
        rest = max((spread - float(strengths.sum())) / max(out - count, 1), 0.0)
        ridge = max(RIDGE, out / (out + float(self._tokens)))
        return Metric(
            scale=scale,
            basis=basis.float(),
            strengths=(1 - ridge) * (strengths - rest).clamp_min_(0),
            rest=(1 - ridge) * rest + ridge,
        )


def _probe(out: int, columns: int, device: torch.device) -> Tensor:
    """P, (out, columns), float32: one for all linears of a width."""
    found = _PROBES.get((out, columns, device))
    if found is None:
        found = torch.randn(out, columns, generator=torch.Generator().manual_seed(0)).to(device)
        _PROBES[out, columns, device] = found
    return found


def _strongest(image: Tensor, scale: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor]:
    """Eigenvalues of C, falling, and their directions, from S or S P; float64."""
    if probe is None:
        values, vectors = torch.linalg.eigh((image + image.mT) / 2 / scale[:, None] / scale)
        return values.flip(0).clamp_min(0), vectors.flip(1)
    seen = image / scale[:, None]  # C P', with P' = T P
    middle = (probe.double() * scale[:, None]).mT @ seen
    values, vectors = torch.linalg.eigh((middle + middle.mT) / 2)
    half = seen @ (vectors * _inverse_roots(values))  # C is about half half^T
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh(half.mT @ half))
    return values.clamp_min(0), half @ (vectors * _inverse_roots(values))


def _inverse_roots(values: Tensor) -> Tensor:
    """values^-1/2, 0 where only rounding keeps a value from being 0: fewer tokens than columns."""
    nothing = values <= SINGULAR * values.max()
    return values.masked_fill(nothing, 1).rsqrt().masked_fill(nothing, 0)


class Stack:
    """The metrics of layers that read one tensor, stacked one below another; for layers without one, S is the identity.

    All products are taken on rows in the scale T, in the dtype of what is given.

    Args:
        metrics: of each layer.
        rows: how many each has.
        like: a tensor on the device and in the dtype of the products.
    """

    def __init__(self, metrics: Sequence[Metric | None], rows: Sequence[int], like: Tensor) -> None:
        bounds = pairwise(accumulate(rows, initial=0))
        self.parts = [(slice(top, end), metric) for metric, (top, end) in zip(metrics, bounds, strict=True)]
        scales = [
            torch.ones(size, dtype=torch.float64, device=like.device) if metric is None else metric.scale
            for metric, size in zip(metrics, rows, strict=True)
        ]
        self.scale = torch.cat([scale.to(like.device) for scale in scales])[:, None]
        """T, (out, 1), float64."""
        self._layers = [(part, *_directed(metric, part.stop - part.start, like)) for part, metric in self.parts]

    def apply(self, rows: Tensor) -> Tensor:
        """C times (out, n)."""
        found = torch.empty_like(rows)
        for part, rest, basis, strengths in self._layers:
            found[part] = rest * rows[part]
            found[part] += basis @ (strengths * (basis.mT @ rows[part]))
        return found

    def eased(self, rows: Tensor) -> Tensor:
        """K times (out, n): rest C^-1, which leaves what costs least as it is and takes from the rest."""
        found = rows.clone()
        for part, rest, basis, strengths in self._layers:
            found[part] -= basis @ (strengths / (rest + strengths) * (basis.mT @ rows[part]))
        return found


def _directed(metric: Metric | None, out: int, like: Tensor) -> tuple[float, Tensor, Tensor]:
    """What any direction costs; strong ones, (out, k), and what they cost beside it, (k, 1): none without a metric."""
    if metric is None:
        return 1.0, like.new_empty(out, 0), like.new_empty(0, 1)
    return metric.rest, metric.basis.to(like), metric.strengths.to(like)[:, None]
