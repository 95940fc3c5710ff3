"""Moments of a tier of one block: what its linears read in the pruned model, what they compute in the dense one.

rows     of a denoiser call
x        a linear's input in the pruned stream, (tokens, in)
y        what it should compute: its output in the dense stream, (tokens, out), and a part of the residual's error
g        the gate by which that output enters the residual stream, (rows, out)
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from obsdiff import pausing
from obsdiff.core.gram import Gram, GramAccumulator, full_precision
from obsdiff.groups import LinearSpec
from obsdiff.methods import Target
from obsdiff.pausing import Arguments
from obsdiff_runtime.errors import CalibrationError

TOKENS: Final = 256
"""Tokens of a row that count, evenly spaced; all where there are no more."""


class _Seen(Exception):  # noqa: N818
    """Everything that was asked for has been computed; the rest of the block need not run."""


@dataclass(frozen=True, kw_only=True)
class Glance:
    """What was seen of one run of a block: inputs and outputs by linear, (rows, tokens, width) each."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


def glance(block: nn.Module, prefix: str, linears: Sequence[LinearSpec], arguments: Arguments) -> Glance:
    """Runs a block until these linears have run.

    Args:
        block: gated or not.
        prefix: of the linears' names: the block's own name and a dot.
        linears: of one tier.
        arguments: of the call.

    Raises:
        CalibrationError: one of them was not reached.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    names = {linear.name for linear in linears}

    def look(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = args[0], output
            if outputs.keys() == names:
                raise _Seen

        return hook

    with ExitStack() as stack:
        for name in names:
            module = block.get_submodule(name.removeprefix(prefix)) if prefix else block
            stack.callback(module.register_forward_hook(look(name)).remove)
        with suppress(_Seen):
            pausing.run(block, arguments)
    missed = sorted(names - outputs.keys())
    if missed:
        raise CalibrationError(f"{missed[0]}: no token reached this layer; leave it out with --exclude")
    return Glance(inputs=inputs, outputs=outputs)


class TierMoments:
    """Sums over the calls of a tier, one gram per distinct input.

    Args:
        linears: of one tier.
        device: of the sums.
    """

    def __init__(self, linears: Sequence[LinearSpec], device: torch.device) -> None:
        self._linears = linears
        self._leaders: dict[str, str] = {}
        for linear in linears:
            self._leaders.setdefault(linear.reads, linear.name)
        self._grams = {
            linear.reads: GramAccumulator(linear.in_features, device=device)
            for linear in linears
            if self._leaders[linear.reads] == linear.name
        }
        self._targets = {linear.name: _TargetSums(linear, device) for linear in linears}

    def add(self, pruned: Glance, wanted: Mapping[str, Tensor], weight: float) -> None:
        """Counts one call.

        Args:
            pruned: of the pruned stream.
            wanted: per linear y, (rows, tokens, out).
            weight: of each of its tokens.

        Raises:
            CalibrationError: linears that should share an input do not, or a value is not finite (names the layer).
        """
        for linear in self._linears:
            x, leader = pruned.inputs[linear.name], self._leaders[linear.reads]
            first = pruned.inputs[leader]
            if x.data_ptr() != first.data_ptr() or x.shape != first.shape:
                raise CalibrationError(f"{linear.name} and {leader} were taken to read the same input and do not")
            rows = _spaced(x)  # (tokens, in)
            if leader == linear.name:
                try:
                    self._grams[linear.reads].add(rows, weight)
                except CalibrationError as error:
                    raise CalibrationError(f"{linear.name}: {error}") from None
            self._targets[linear.name].add(rows, _spaced(wanted[linear.name]), weight)

    def finish(self) -> tuple[dict[str, Gram], dict[str, Target]]:
        """Grams by LinearSpec.reads, targets by linear."""
        targets = {name: sums.target() for name, sums in self._targets.items()}
        return {reads: sums.gram() for reads, sums in self._grams.items()}, targets


class _TargetSums:
    def __init__(self, linear: LinearSpec, device: torch.device) -> None:
        self._name = linear.name
        self._cross = torch.zeros(linear.out_features, linear.in_features, dtype=torch.float64, device=device)
        self._sum = torch.zeros(linear.out_features, dtype=torch.float64, device=device)
        self._energy = torch.zeros_like(self._sum)
        self._weight = 0.0

    def add(self, x: Tensor, y: Tensor, weight: float) -> None:
        wide, wanted = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (x, y))
        with full_precision():
            self._cross.add_(wanted.mT @ wide, alpha=weight)
        energy = wanted.square().sum(dim=0, dtype=torch.float64)
        if not bool(energy.isfinite().all()):
            raise CalibrationError(f"{self._name}: the dense model's output is not finite; are its weights?")
        self._sum.add_(wanted.sum(dim=0, dtype=torch.float64), alpha=weight)
        self._energy.add_(energy, alpha=weight)
        self._weight += weight * len(x)

    def target(self) -> Target:
        return Target(
            cross=self._cross / self._weight, mean=self._sum / self._weight, energy=self._energy / self._weight
        )


def _spaced(value: Tensor) -> Tensor:
    """(rows, tokens, width) -> (rows * TOKENS at most, width)."""
    if value.ndim < 3 or value.shape[-2] <= TOKENS:
        return value.flatten(0, -2)
    places = torch.linspace(0, value.shape[-2] - 1, TOKENS, device=value.device).round().long()
    return value[..., places, :].flatten(0, -2)
