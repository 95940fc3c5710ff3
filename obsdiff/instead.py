"""Another attribute for a while: how calls of diffusers are given what they have no argument for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_ABSENT: Final = object()


@contextmanager
def instead(thing: object, name: str, value: object) -> Iterator[None]:
    """The thing with another attribute under this name, until the block ends."""
    own = vars(thing)
    before = own.get(name, _ABSENT)
    own[name] = value
    try:
        yield
    finally:
        if before is _ABSENT:
            del own[name]
        else:
            own[name] = before
