"""Cuts removed units out of a denoiser: fewer heads, narrower feed-forwards.

Works on loaded models, and on the meta device, where it replays the cuts of a saved one.

    units     of a group, of which some are kept
    width     columns of a unit in each consumer
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from obsdiff import pointwise
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
    gone = [(groups[name], units) for name, units in keep.items() if len(units) < groups[name].units]
    _cut(denoiser, gone)
    for group, units in gone:
        _follow(denoiser, group, len(units))


def columns(group: Group, units: Sequence[int], start: int = 0) -> Tensor:
    """The columns of these units in a consumer that reads the first of them from `start` on.

    Returns:
        (units * width,), int64.
    """
    return places(units, group.width, start)


def places(units: Sequence[int], width: int, start: int = 0) -> Tensor:
    """Where these units are along an axis on which units of some width begin at `start`: (units * width,), int64."""
    first = start + torch.tensor(units, dtype=torch.int64)[:, None] * width  # (units, 1)
    return (first + torch.arange(width)).flatten()


def _check(name: str, units: Sequence[int], group: Group | None) -> None:
    if group is None:
        raise ValueError(f"{name}: the model has no such group of units")
    if not units:
        raise ValueError(f"{name}: no unit is kept, of {group.units}")
    if units[0] < 0 or units[-1] >= group.units:
        raise ValueError(f"{name}: kept units {units[0]}..{units[-1]} are not all among its {group.units}")
    if any(left >= right for left, right in pairwise(units)):
        raise ValueError(f"{name}: kept units are not ascending and distinct")


def _cut(denoiser: nn.Module, gone: Sequence[tuple[Group, Sequence[int]]]) -> None:
    """Takes out what the groups lose, each with its kept units, of every module at once: several may cut one."""
    rows: dict[str, Tensor] = {}
    across: dict[str, Tensor] = {}
    for group, units in gone:
        removed = sorted(set(range(group.units)) - set(units))
        for producer in group.producers:
            left = rows.setdefault(producer.name, _all(denoiser, producer.name, dim=0))
            height = group.height(producer)
            for part in range(producer.parts):
                left[places(removed, height, producer.start + part * group.units * height)] = False
        for consumer in group.consumers:
            left = across.setdefault(consumer.name, _all(denoiser, consumer.name, dim=1))
            left[columns(group, removed, consumer.start)] = False
    for name, left in rows.items():
        module = denoiser.get_submodule(name)
        _take(module, "weight", 0, left)
        _take(module, "bias", 0, left)
    for name, left in across.items():
        module = denoiser.get_submodule(name)
        _take(module, "weight", 1, left)
    for name in {**rows, **across}:
        pointwise.resize(denoiser.get_submodule(name))


def _all(denoiser: nn.Module, name: str, *, dim: int) -> Tensor:
    return torch.ones(denoiser.get_parameter(f"{name}.weight").shape[dim], dtype=torch.bool)


def _take(module: nn.Module, name: str, dim: int, left: Tensor) -> None:
    parameter = module._parameters.get(name)
    if parameter is None:
        return
    index = left.nonzero().flatten().to(parameter.device)
    taken = parameter.detach().index_select(dim, index).contiguous()
    setattr(module, name, nn.Parameter(taken, requires_grad=parameter.requires_grad))


def _follow(denoiser: nn.Module, group: Group, units: int) -> None:
    """Sets the numbers that follow the units."""
    for size in group.sizes:
        module = denoiser.get_submodule(size.module)
        if size.index is None:
            setattr(module, size.attribute, units * size.factor)
        else:
            getattr(module, size.attribute)[size.index] = units * size.factor
