"""Cuts removed units out of a denoiser: fewer heads, narrower feed-forwards.

Works on loaded models, and on the meta device, where it replays the cuts of a saved one.

    units     of a group, of which some are kept
    width     columns of a unit in each consumer
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from obsdiff.families import Family
from obsdiff.groups import Group


def shrink(denoiser: nn.Module, family: Family, keep: Mapping[str, Sequence[int]]) -> None:
    """Changes the denoiser: all units that are not kept leave its weights, biases and head counts.

    What is left computes what the whole model did with the removed columns of every consumer zero. Groups that are
    not named, and those that keep everything, stay as they are, bit by bit.

    Args:
        denoiser: of that family, on any device.
        family: says what belongs together.
        keep: group name -> indices of the kept units, ascending.

    Raises:
        ValueError: no such group, or indices that are none; raised before anything is changed.
    """
    groups = {group.name: group for group in family.groups(denoiser)}
    for name, units in keep.items():
        _check(name, units, groups.get(name))
    for name, units in keep.items():
        if len(units) < groups[name].units:
            _cut(denoiser, groups[name], units)


def columns(group: Group, units: Sequence[int]) -> Tensor:
    """The columns of these units in a consumer, (units * width,), int64."""
    first = torch.tensor(units, dtype=torch.int64)[:, None] * group.width  # (units, 1)
    return (first + torch.arange(group.width)).flatten()


def _check(name: str, units: Sequence[int], group: Group | None) -> None:
    if group is None:
        raise ValueError(f"{name}: the model has no such group of units")
    if not units:
        raise ValueError(f"{name}: no unit is kept, of {group.units}")
    if units[0] < 0 or units[-1] >= group.units:
        raise ValueError(f"{name}: kept units {units[0]}..{units[-1]} are not all among its {group.units}")
    if any(left >= right for left, right in pairwise(units)):
        raise ValueError(f"{name}: kept units are not ascending and distinct")


def _cut(denoiser: nn.Module, group: Group, units: Sequence[int]) -> None:
    kept = columns(group, units)
    size = group.units * group.width
    for producer in group.producers:
        rows = torch.cat([kept + part * size for part in range(producer.parts)])  # (parts * units * width,)
        module = denoiser.get_submodule(producer.name)
        _take(module, "weight", 0, rows)
        _take(module, "bias", 0, rows)
        if isinstance(module, nn.Linear):
            module.out_features = len(rows)
    for consumer in group.consumers:
        module = denoiser.get_submodule(consumer)
        _take(module, "weight", 1, kept)
        if isinstance(module, nn.Linear):
            module.in_features = len(kept)
    if group.attention is not None:
        _set_heads(denoiser.get_submodule(group.attention), heads=len(units), width=group.width)


def _take(module: nn.Module, name: str, dim: int, index: Tensor) -> None:
    parameter = module._parameters.get(name)
    if parameter is None:
        return
    taken = parameter.detach().index_select(dim, index.to(parameter.device)).contiguous()
    setattr(module, name, nn.Parameter(taken, requires_grad=parameter.requires_grad))


def _set_heads(attention: nn.Module, *, heads: int, width: int) -> None:
    sizes = {
        "heads": heads,
        "sliceable_head_dim": heads,
        "inner_dim": heads * width,
        "inner_kv_dim": heads * width,
    }
    for name, size in sizes.items():
        setattr(attention, name, size)
