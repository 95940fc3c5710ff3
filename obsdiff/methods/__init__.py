"""Pruning methods. A method is a module here and a line in table.METHODS.

out, in   a linear's widths
units     the columns that are removed together; see core.units
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from obsdiff.core.metric import Metric
from obsdiff.core.solver import LEAN, Effort
from obsdiff.core.units import Removal
from obsdiff.sparsity import Pattern


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a linear should compute of the inputs it will get, as moments of that output y.

    Attributes:
        cross: (out, in), float64: E[y x^T], over the same weighted tokens as the gram.
        mean: (out,), float64: E[y].
        energy: (out,), float64: E[y^2].
    """

    cross: Tensor
    mean: Tensor
    energy: Tensor


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear as a method sees it.

    Attributes:
        name: for messages.
        weight: (out, in), any float dtype; never changed in place.
        gram: (in, in), float32 or wider, the weighted mean of x x^T over the calibration tokens; None where the
            method does not calibrate.
        mean: (in,), float64, the same weighted mean of x; None where it was not collected.
        bias: (out,), any float dtype; None where the linear has none.
        target: what it should compute; None: what its weight makes of its input.
        metric: what errors of its output cost; None: one is as bad as another.
    """

    name: str
    weight: Tensor
    gram: Tensor | None
    mean: Tensor | None = None
    bias: Tensor | None = None
    target: Target | None = None
    metric: Metric | None = None


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What a method made of a linear.

    Attributes:
        weight: (out, in), in the dtype of the layer's weight; zero where `keep` is False.
        keep: (out, in), bool: the support.
        loss: tr(dW G dW^T) / tr(W G W^T), measured on `weight` as returned; NaN without a gram. Of a layer with a
            target: E|W x + b - y|^2 / E|y - E y|^2. Of one with a metric S: tr(S D G D^T) / tr(S W* G W*^T), where W*
            is the best dense weight and D what the returned one lacks of it.
        bias: (out,), in the dtype of the layer's bias; None where it is left as it was.
    """

    weight: Tensor
    keep: Tensor
    loss: float
    bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """Knobs of the methods; each has the paper's value.

    Attributes:
        damp: added to the gram's diagonal, as a fraction of its mean.
        block: columns per lazy update block.
        effort: how long the joint solver looks.
    """

    damp: float = 0.01
    block: int = 128
    effort: Effort = LEAN


class Method(Protocol):
    """What a pruning method provides; each module of this package is one.

    Attributes:
        name: its key in table.METHODS, and its --method.
        calibrates: whether its layers need a gram.
        removes_units: whether it has a structured form; where not, `prune_units` is never called.
        streams: whether it is fed block by block from a dense and a pruned stream (streaming.py) instead of package by
            package.
        time_weights: the schedule of core.timesteps it weighs the denoising steps by, unless the user names one.
    """

    name: str
    calibrates: bool
    removes_units: bool
    streams: bool
    time_weights: str

    def prune_weights(self, layers: Sequence[Layer], pattern: Pattern, options: Options) -> list[Pruned]:
        """Removes weights from linears that read the same tensor, so that they share one gram and one factorisation.

        Args:
            layers: at least one, each with the same `gram` (q, k and v of an attention).
            pattern: what is removed from each.
            options: the knobs.

        Returns:
            per layer, in their order.

        Raises:
            CalibrationError: the gram cannot be used; names the layer.
            ConfigError: N:M, and the input width is no multiple of M.
        """
        ...

    def prune_units(
        self, layers: Sequence[Layer], removals: Sequence[Removal], options: Options
    ) -> tuple[list[Tensor], list[Pruned]]:
        """Chooses and removes whole units from linears that share them.

        Args:
            layers: one linear, or two whose input columns are the same units in two streams.
            removals: what goes of one group of units, or of several that a linear reads side by side; the layers are
                their streams.
            options: the knobs.

        Returns:
            per group the kept units, (kept,), int64, sorted; per layer the weight with the removed columns zero and
            the others compensated, at full width.

        Raises:
            CalibrationError: a gram cannot be used; names the layer.
        """
        ...
