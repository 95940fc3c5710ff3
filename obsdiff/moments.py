"""Moments of a tier of one block: what its linears read in the pruned model, what they compute in the dense one.

rows     of a denoiser call
x        a linear's input in the pruned stream, (tokens, in)
y        what it should compute: its output in the dense stream, (tokens, out), and what closes the streams' gap
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from obsdiff import ranks
from obsdiff.core.gram import Gram, GramAccumulator, full_precision
from obsdiff.glances import Glance
from obsdiff.groups import LinearSpec
from obsdiff.methods import Target
from obsdiff.trajectories import Guidance
from obsdiff_runtime.errors import CalibrationError


class TierMoments:
    """Sums over the calls of a tier, one gram per distinct input.

    Args:
        linears: of one tier.
        device: of the sums.
        guidance: where it is, tokens of images count as the sampler combines them, too.
        share: what a combined token counts beside the two that it is made of.
    """

    def __init__(
        self,
        linears: Sequence[LinearSpec],
        device: torch.device,
        guidance: Guidance | None = None,
        share: float = 0.0,
    ) -> None:
        self._linears, self._guidance, self._share = linears, guidance if share else None, share
        self._leaders: dict[str, str] = {}
        for linear in linears:
            self._leaders.setdefault(linear.reads, linear.name)
        self._grams = {
            linear.reads: GramAccumulator(linear.in_features, device=device)
            for linear in linears
            if self._leaders[linear.reads] == linear.name
        }
        self._targets = {linear.name: _TargetSums(linear, device) for linear in linears}

    def add(self, dense: Glance, pruned: Glance, weight: float, *, paired: bool = True) -> None:
        """Counts one call.

        Args:
            dense: of the dense stream.
            pruned: of the pruned stream.
            weight: of each token.
            paired: whether the call's rows are those that `guidance` combines.

        Raises:
            CalibrationError: linears that should share an input do not, or a value is not finite (names the layer).
        """
        read: dict[str, Tensor] = {}
        for linear in self._linears:
            name, leader = linear.name, self._leaders[linear.reads]
            if pruned.sources[name] != pruned.sources[leader]:
                raise CalibrationError(f"{name} and {leader} were taken to read the same input and do not")
            try:
                self._count(linear, dense, pruned, weight, paired, read)
            except CalibrationError as error:
                raise CalibrationError(f"{name}: {error}") from None

    def _count(
        self,
        linear: LinearSpec,
        dense: Glance,
        pruned: Glance,
        weight: float,
        paired: bool,
        read: dict[str, Tensor],
    ) -> None:
        """Adds what the linear reads to `read`, (tokens, in), unless another one has read it in this call."""
        name = linear.name
        x, y = pruned.inputs[name], dense.outputs[name]
        whole = x.ndim == 3  # with masked tokens left out, rows are no longer of one length
        mixes = self._guidance is not None and paired and whole and linear.tokens != "text"
        weight *= 1 + self._share / 2 if mixes else 1
        if linear.reads not in read:
            read[linear.reads] = self._mixed(x, mixes).flatten(0, -2)
            self._grams[linear.reads].add(read[linear.reads], weight)
        rows, y = read[linear.reads], self._mixed(y, mixes)
        self._targets[name].add(rows, y, weight)
        if name in dense.bases:
            gate = _wide(torch.as_tensor(dense.gates.get(name, 1.0), device=y.device))
            pushed = self._mixed(gate * _wide(dense.bases[name] - pruned.bases[name]), mixes)
            self._targets[name].add_gap(rows, y, pushed, gate, weight)

    def _mixed(self, value: Tensor, mixes: bool) -> Tensor:
        """In float32 or wider, and with the guided combination where it counts, too."""
        wide = _wide(value)
        return self._guidance.spread(wide, self._share) if mixes and self._guidance is not None else wide

    def finish(self, repair: float) -> tuple[dict[str, Gram], dict[str, Target]]:
        """Grams by LinearSpec.reads, targets by linear, over the calls of all ranks.

        Args:
            repair: the share to make up for of what can be made up of a stream's error.
        """
        for gram in self._grams.values():
            ranks.add_up(gram.sums())
        for target in self._targets.values():
            ranks.add_up(target.sums())
        targets = {name: sums.target(repair) for name, sums in self._targets.items()}
        return {reads: sums.gram() for reads, sums in self._grams.items()}, targets


class _Products:
    """E[y x^T], E[y] and E[y^2] of some y."""

    def __init__(self, linear: LinearSpec, device: torch.device) -> None:
        self.cross = torch.zeros(linear.out_features, linear.in_features, dtype=torch.float64, device=device)
        self.sum = torch.zeros(linear.out_features, dtype=torch.float64, device=device)

    def add(self, x: Tensor, y: Tensor, weight: float) -> None:
        with full_precision():
            self.cross.add_(y.mT @ x, alpha=weight)
        self.sum.add_(y.sum(dim=0), alpha=weight)


class _TargetSums:
    """Moments of a linear's target: the dense output y, and what would close the gap of the residual streams.

    The residual stream in front of the linear is off by d, that of the dense model less that of the pruned one. With g
    the linear's gate, the output that makes up for it is y + d / g. Where g varies between calls, its
    least-squares weight is g^2, of which one gram for all channels can know the mean only: y + g d / E[g^2]. That adds
    u = g^2 d / E[g^2] to the stream, too much where g is large; a u comes closest to d where, channel by channel,
    a = E[u d] / E[u^2] = E[g^2 d^2] E[g^2] / E[g^4 d^2]. Of y + a g d / E[g^2], `repair` is the share that is taken.
    """

    def __init__(self, linear: LinearSpec, device: torch.device) -> None:
        self._linear, self._device = linear, device
        self._plain = _Products(linear, device)
        self._gap: _Products | None = None
        self._energies = torch.zeros(5, linear.out_features, dtype=torch.float64, device=device)
        self._weight = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor, y: Tensor, weight: float) -> None:
        """Counts x, (tokens, in), and y, (..., out) of as many tokens."""
        energy = _sum(y.square())
        if not bool(energy.isfinite().all()):
            raise CalibrationError("the dense model's output is not finite; are its weights?")
        self._plain.add(x, y.flatten(0, -2), weight)
        self._energies[0] += weight * energy
        self._weight += weight * len(x)

    def add_gap(self, x: Tensor, y: Tensor, pushed: Tensor, gate: Tensor, weight: float) -> None:
        """Counts g d, (rows, tokens, out) as y is, and the gate g beside it, at the tokens x, (tokens, in)."""
        if self._gap is None:
            self._gap = _Products(self._linear, self._device)
        energy, squares = pushed.square(), gate.square().expand_as(pushed)
        sums = [_sum(value) for value in (y * pushed, energy, squares, squares * energy)]
        if not bool(sums[1].isfinite().all()):
            raise CalibrationError("the residual stream it writes to is not finite; are the model's weights?")
        self._gap.add(x, pushed.flatten(0, -2), weight)
        self._energies[1:] += weight * torch.stack(sums)

    def sums(self) -> tuple[Tensor, ...]:
        """All there is, float64 and lent."""
        gap = () if self._gap is None else (self._gap.cross, self._gap.sum)
        return self._plain.cross, self._plain.sum, *gap, self._energies, self._weight

    def target(self, repair: float) -> Target:
        cross, mean, energy = self._plain.cross, self._plain.sum, self._energies[0]
        if self._gap is not None:
            share = repair * self._attainable()
            cross = cross + share[:, None] * self._gap.cross
            mean = mean + share * self._gap.sum
            energy = energy + 2 * share * self._energies[1] + share.square() * self._energies[2]
        return Target(cross=cross / self._weight, mean=mean / self._weight, energy=energy / self._weight)

    def _attainable(self) -> Tensor:
        """a / E[g^2] of each channel, (out,), float64; 0 where there is no gap or the gate is shut."""
        _, _, pushed, squares, steep = self._energies
        tiny = torch.finfo(torch.float64).tiny
        ideal = self._weight / squares.clamp_min(tiny)
        best = pushed / steep.clamp_min(tiny)
        return torch.minimum(best, ideal).masked_fill((squares == 0) | (steep == 0), 0)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _sum(value: Tensor) -> Tensor:
    """Over rows and tokens, (..., out) -> (out,), float64."""
    return value.sum(dim=tuple(range(value.ndim - 1))).double()
