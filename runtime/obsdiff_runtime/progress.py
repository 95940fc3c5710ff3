"""How long work tells where it stands: the library calls, whoever shows it listens."""

from typing import Protocol


class Progress(Protocol):
    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` pieces of `stage` are finished; `note` names the one at hand."""
        ...


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Shows nothing."""
