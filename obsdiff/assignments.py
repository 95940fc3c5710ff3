"""What happens to which layer of a run: units that go, patterns, and what stays dense."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from obsdiff.groups import Group, LinearSpec
from obsdiff.results import Sensitivity
from obsdiff.sparsity import NM, Pattern


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What happens to which layer.

    Attributes:
        removals: group name -> units that go, where any go.
        patterns: linear name -> its pattern.
        dense: linear name -> why it stays dense though a pattern was asked for.
        sensitivities: what was measured to decide it; see allocation.
    """

    groups: tuple[Group, ...]
    removals: Mapping[str, int]
    patterns: Mapping[str, Pattern]
    dense: Mapping[str, str]
    sensitivities: tuple[Sensitivity, ...] = ()


def assign(
    linears: Sequence[LinearSpec],
    groups: Sequence[Group],
    removals: Mapping[str, int],
    pattern: Pattern | None,
) -> Assignment:
    """The same for every layer: each of `linears` gets the pattern, unless its width after the cut does not fit."""
    lost: Counter[str] = Counter()
    for group in groups:
        lost.update({name: removals.get(group.name, 0) * group.width for name in group.readers})
    patterns: dict[str, Pattern] = {}
    dense: dict[str, str] = {}
    if pattern is not None and pattern.ratio > 0:
        for linear in linears:
            left = linear.in_features - lost[linear.name]
            if isinstance(pattern, NM) and left % pattern.m:
                dense[linear.name] = f"{left} inputs are not divisible by {pattern.m}"
            else:
                patterns[linear.name] = pattern
    removed = {name: number for name, number in removals.items() if number}
    return Assignment(groups=tuple(groups), removals=removed, patterns=patterns, dense=dense)
