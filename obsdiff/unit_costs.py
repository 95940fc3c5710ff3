"""How many units go at a sparsity, and which rows, columns, parameters and multiply-accumulates go with them."""

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from obsdiff import pointwise
from obsdiff.groups import Group, LinearSpec
from obsdiff.sparsity import Sparsity


def removals(groups: Sequence[Group], sparsity: Sparsity, *, align: int) -> dict[str, int]:
    """How many units each group loses.

    round(units * ratio), halves to even, as the paper does. Heads stay whole and at least one is kept; of FFN neurons
    the number kept is rounded to the nearest multiple of `align`, at least one multiple, at most what there is.

    Returns:
        group name -> units that go, possibly 0.
    """
    return {
        group.name: group.units - _kept(group, sparsity.heads if group.kind == "heads" else sparsity.ffn, align)
        for group in groups
    }


def saved_macs(
    denoiser: nn.Module, groups: Sequence[Group], removed: Mapping[str, int], positions: Mapping[str, int]
) -> int:
    """Multiply-accumulates of one call on one image that go with the units of these groups."""
    return savings(denoiser, *lost(groups, removed), positions)[1]


def left_macs(
    linears: Sequence[LinearSpec], groups: Sequence[Group], removed: Mapping[str, int], positions: Mapping[str, int]
) -> dict[str, int]:
    """Multiply-accumulates of each linear, without its bias, once the units are gone."""
    rows, columns = lost(groups, removed)
    return {
        linear.name: (linear.out_features - rows[linear.name])
        * (linear.in_features - columns[linear.name])
        * positions[linear.name]
        for linear in linears
    }


def lost(groups: Sequence[Group], removed: Mapping[str, int]) -> tuple[Counter[str], Counter[str]]:
    """Rows and columns that modules lose, by name."""
    rows: Counter[str] = Counter()
    columns: Counter[str] = Counter()
    for group in groups:
        for producer in group.producers:
            rows[producer.name] += removed.get(group.name, 0) * group.height(producer) * producer.parts
        for reader in group.readers:
            columns[reader] += removed.get(group.name, 0) * group.width
    return rows, columns


def savings(
    denoiser: nn.Module, rows: Counter[str], columns: Counter[str], positions: Mapping[str, int]
) -> tuple[int, int]:
    """Parameters and MACs that go."""
    parameters = macs = 0
    for name in {*rows, *columns}:
        for parameter in denoiser.get_submodule(name).parameters(recurse=False):
            height, *rest = parameter.shape
            matrix = bool(rest)
            width = rest[0] if matrix else 1
            gone = height * width - (height - rows[name]) * (width - (columns[name] if matrix else 0))
            gone *= pointwise.size_behind(parameter)
            parameters += gone
            macs += gone * positions.get(name, 0)
    return parameters, macs


def _kept(group: Group, ratio: float, align: int) -> int:
    kept = group.units - round(group.units * ratio)
    if ratio == 0:
        return group.units
    if group.kind == "heads":
        return max(kept, 1)
    return min(max((kept + align // 2) // align, 1) * align, group.units)
