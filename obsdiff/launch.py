"""What torchrun tells the processes that it starts, in their environment; read without torch."""

import os
from dataclasses import dataclass

from obsdiff_runtime.errors import ConfigError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Finished(Exception):  # noqa: N818
    """This process has done its part; the first of them goes on alone."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process stands among those started together.

    Attributes:
        rank: its number; the first is 0, and the only one that writes and prints.
        world: how many there are.
        local: its number on this machine, which is also that of its GPU.
    """

    rank: int = 0
    world: int = 1
    local: int = 0


def place() -> Place:
    """The place of this process: alone, unless torchrun (or something that sets all its variables) started it.

    Raises:
        ConfigError: the variables are no numbers, or contradict one another.
    """
    values = {name: os.environ.get(name) for name in VARIABLES}
    if None in values.values():
        return Place()
    said = ", ".join(f"{name}={values[name]}" for name in VARIABLES[:3])
    try:
        rank, world, local = (int(values[name] or "") for name in VARIABLES[:3])
    except ValueError:
        raise ConfigError(f"{said}: expected numbers, as torchrun sets them") from None
    if not 0 <= local <= rank < world:
        raise ConfigError(f"{said}: expected 0 <= LOCAL_RANK <= RANK < WORLD_SIZE, as torchrun sets them")
    return Place(rank=rank, world=world, local=local)
