"""Pruning methods. A method is a module here and a line in table.METHODS.

out, in   a linear's widths
units     the columns that are removed together, `width` columns each
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from obsdiff.sparsity import Pattern


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear as a method sees it.

    Attributes:
        name: for messages.
        weight: (out, in), any float dtype; never changed in place.
        gram: (in, in), float32 or wider, the weighted mean of x x^T over the calibration tokens; None where the
            method does not calibrate.
        mean: (in,), float64, the same weighted mean of x; None where it was not collected.
    """

    name: str
    weight: Tensor
    gram: Tensor | None
    mean: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What a method made of a linear.

    Attributes:
        weight: (out, in), in the dtype of the layer's weight; zero where `keep` is False.
        keep: (out, in), bool: the support.
        loss: tr(dW G dW^T) / tr(W G W^T), measured on `weight` as returned; NaN without a gram.
    """

    weight: Tensor
    keep: Tensor
    loss: float


@dataclass(frozen=True, kw_only=True)
class Options:
    """Knobs of the methods; each has the paper's value.

    Attributes:
        damp: added to the gram's diagonal, as a fraction of its mean.
        block: columns per lazy update block.
    """

    damp: float = 0.01
    block: int = 128


class Method(Protocol):
    """What a pruning method provides; each module of this package is one.

    Attributes:
        name: its key in table.METHODS, and its --method.
        calibrates: whether its layers need a gram.
        removes_units: whether it has a structured form; where not, `prune_units` is never called.
        time_weights: the schedule of core.timesteps it weighs the denoising steps by, unless the user names one.
    """

    name: str
    calibrates: bool
    removes_units: bool
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
        self, layers: Sequence[Layer], *, width: int, remove: int, options: Options
    ) -> tuple[Tensor, list[Pruned]]:
        """Chooses and removes whole units from linears that share them.

        Args:
            layers: one linear, or two whose input columns are the same units in two streams.
            width: columns per unit.
            remove: how many units go.
            options: the knobs.

        Returns:
            the kept units, (kept,), int64, sorted; per layer the weight with the removed columns zero and the others
            compensated, at full width.

        Raises:
            CalibrationError: a gram cannot be used; names the layer.
        """
        ...
