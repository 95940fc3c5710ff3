"""Classes that a class-conditional model draws: by name, as its pipeline's `id2label` has them, or by number."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from obsdiff_runtime.errors import ConfigError, ModelError

ID2LABEL: Final = "id2label"
"""In the index of such a pipeline: names by number, several of one class joined by commas."""

COUNT: Final = "num_embeds_ada_norm"
"""In the configuration of its denoiser: how many classes there are; the number behind the last stands for none."""

_SHOWN: Final = 60


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The classes of a model.

    Attributes:
        count: how many there are.
        numbers: by name; empty where they have none. A name of several classes is the last one's, as in diffusers.
    """

    count: int
    numbers: Mapping[str, int]

    def number(self, text: str) -> int:
        """The class that a name, in capitals or not, or a number means.

        Raises:
            ConfigError: there is none; says which names are close, and how many classes there are.
        """
        written = text.strip()
        if written in self.numbers:
            return self.numbers[written]
        if re.fullmatch(r"-?[0-9]{1,18}", written):
            if 0 <= int(written) < self.count:
                return int(written)
            raise ConfigError(f"there is no class {written}: this model draws {self._all()}")
        folded = written.casefold()
        known = {name.casefold(): name for name in self.numbers}
        if folded in known:
            return self.numbers[known[folded]]
        near = [known[name] for name in difflib.get_close_matches(folded, known)]
        hint = f"; close are {', '.join(near)}" if near else ""
        shown = written if len(written) <= _SHOWN else f"{written[:_SHOWN]}..."
        raise ConfigError(f"no class is called {shown!r}{hint}; this model draws {self._all()}")

    def name(self, number: int) -> str:
        """The first name of a class; its number where it has none."""
        return self._names.get(number, str(number))

    def titles(self) -> tuple[str, ...]:
        """What each class is called, by number: its names, joined by commas, or its number."""
        table = written_labels(self.numbers)
        return tuple(table.get(str(number), str(number)) for number in range(self.count))

    def spread(self, count: int, *, first: int) -> tuple[str, ...]:
        """Names of so many classes, spread over every second one from `first` on; or of all of these."""
        among = range(first, self.count, 2)
        count = min(count, len(among))
        return tuple(self.name(among[index * len(among) // count]) for index in range(count))

    @cached_property
    def _names(self) -> dict[int, str]:
        return {number: name for name, number in reversed(list(self.numbers.items()))}

    def _all(self) -> str:
        named = f", by number or by one of {len(self.numbers)} names" if self.numbers else ", which have no names here"
        return f"{self.count} classes, 0 to {self.count - 1}{named}"


def read_labels(index: Mapping[str, Any], config: Mapping[str, Any]) -> Labels:
    """The classes of a pipeline.

    Args:
        index: of the pipeline, the content of model_index.json.
        config: of its denoiser.

    Raises:
        ModelError: the index has names of something else.
    """
    table = index.get(ID2LABEL) or {}
    count = int(config[COUNT])
    numbers: dict[str, int] = {}
    for number, names in table.items() if isinstance(table, dict) else [(table, None)]:
        if not isinstance(names, str) or not str(number).isdecimal() or int(number) >= count:
            raise ModelError(
                f"{ID2LABEL} of model_index.json gives no names of one of {count} classes by {number!r:.40}"
            )
        numbers |= {name.strip(): int(number) for name in names.split(",") if name.strip()}
    return Labels(count=count, numbers=numbers)


def written_labels(numbers: Mapping[str, int]) -> dict[str, str]:
    """Names by number, as an index has them."""
    found: dict[int, list[str]] = {}
    for name, number in numbers.items():
        found.setdefault(number, []).append(name)
    return {str(number): ", ".join(names) for number, names in sorted(found.items())}
