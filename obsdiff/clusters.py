"""Groups whose units can only be removed together, because one linear reads them side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from obsdiff.core.units import Removal
from obsdiff.groups import Group


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Groups that share a consumer, directly or through one another; most often it is one group.

    Attributes:
        groups: in forward order.
        readers: names of all their consumers, each once.
    """

    groups: tuple[Group, ...]
    readers: tuple[str, ...]

    def removals(self, numbers: Mapping[str, int]) -> list[Removal]:
        """What goes, for core.units.remove, the consumers being its streams.

        Args:
            numbers: group name -> units that go; of those that are not named none.

        Returns:
            per group.
        """
        return [
            Removal(
                units=group.units,
                width=group.width,
                number=numbers.get(group.name, 0),
                starts=tuple(group.start(reader) for reader in self.readers),
            )
            for group in self.groups
        ]

    def told(self, reader: str, kept: Mapping[str, Sequence[int]]) -> str:
        """What is left of the units that a consumer reads, as records say it: "heads 18/24 ffn 768/1024"."""
        return " ".join(
            f"{group.kind} {len(kept[group.name])}/{group.units}"
            for group in self.groups
            if group.start(reader) is not None
        )


def clusters(groups: Sequence[Group]) -> list[Cluster]:
    """The groups, those that share a consumer together; in the order of their first ones."""
    found: list[list[Group]] = []
    for group in groups:
        near = [part for part in found if any(set(group.readers) & set(other.readers) for other in part)]
        place = found.index(near[0]) if near else len(found)
        found = [part for part in found if part not in near]
        found.insert(place, [*(other for part in near for other in part), group])
    return [cluster(part) for part in found]


def cluster(groups: Sequence[Group]) -> Cluster:
    """These groups as one cluster."""
    readers = dict.fromkeys(reader for group in groups for reader in group.readers)
    return Cluster(groups=tuple(groups), readers=tuple(readers))
