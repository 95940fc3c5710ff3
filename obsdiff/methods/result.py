"""From the weights a method computed to the layer as it is stored."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from obsdiff.core.linalg import relative_loss
from obsdiff.core.units import Removal, left
from obsdiff.methods import Layer, Pruned
from obsdiff_runtime.errors import CalibrationError, ObsdiffError


def unchanged(layer: Layer) -> Pruned:
    """The layer with nothing removed: the very same weight."""
    keep = torch.ones_like(layer.weight, dtype=torch.bool)
    return Pruned(weight=layer.weight, keep=keep, loss=float("nan") if layer.gram is None else 0.0)


def stored(layer: Layer, weight: Tensor, keep: Tensor) -> Pruned:
    """The layer with new weights, cast to the dtype it is stored in, and the loss measured on that.

    Raises:
        CalibrationError: a weight is not finite, as when compensation leaves float16's range.
    """
    rounded = cast(layer.name, weight, layer.weight.dtype).masked_fill(~keep, 0)
    loss = float("nan") if layer.gram is None else relative_loss(layer.weight.detach(), rounded, layer.gram)
    return Pruned(weight=rounded, keep=keep, loss=loss)


def cast(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights or biases of the layer of that name, in the dtype they are stored in.

    Raises:
        CalibrationError: one is not finite there.
    """
    rounded = values.to(dtype)
    if not bool(rounded.isfinite().all()):
        raise CalibrationError(
            f"{name}: the pruned weights are not finite in {str(dtype).removeprefix('torch.')}; "
            "is the layer itself? If it is, prune in --dtype bfloat16 or float32"
        )
    return rounded


def gram_of(layer: Layer) -> Tensor:
    """The layer's gram.

    Raises:
        CalibrationError: it has none.
    """
    if layer.gram is None:
        raise CalibrationError(f"{layer.name}: this method needs a gram, and none was collected")
    return layer.gram


@contextmanager
def named(layers: Sequence[Layer]) -> Iterator[None]:
    """Puts the layers' names before what the core, which knows no names, raises."""
    try:
        yield
    except ObsdiffError as error:
        others = f" (and {len(layers) - 1} that share its gram)" if len(layers) > 1 else ""
        raise type(error)(f"{layers[0].name}{others}: {error}") from error


def without(
    layers: Sequence[Layer], removals: Sequence[Removal], kept: Sequence[Tensor]
) -> Iterator[tuple[Layer, Tensor]]:
    """The layers, each with its support, (out, in), once only these units of each group are left."""
    live = []
    for removal, units in zip(removals, kept, strict=True):
        stays = torch.zeros(removal.units, dtype=torch.bool, device=units.device)
        stays[units] = True
        live.append(stays)
    for place, layer in enumerate(layers):
        columns = left(live, removals, place, layer.weight.shape[1])
        yield layer, columns.to(layer.weight.device).expand_as(layer.weight).clone()


def untouched(layers: Sequence[Layer], removals: Sequence[Removal]) -> tuple[list[Tensor], list[Pruned]]:
    """What `prune_units` gives where no unit goes."""
    return [torch.arange(removal.units) for removal in removals], [unchanged(layer) for layer in layers]
