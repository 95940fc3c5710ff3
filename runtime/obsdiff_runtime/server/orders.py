"""One request on its way through the server: what it asks for, what became of it, and the events that tell of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.drawing import Drawing
from obsdiff_runtime.errors import ObsdiffError

Pixels = NDArray[np.uint8]


class BusyError(ObsdiffError):
    """The queue is full, or the server is about to stop; worth another try in `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LateError(ObsdiffError):
    """The deadline of a request is over."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be drawn; checked already.

    Attributes:
        call: arguments of `Pipeline.begin`.
        images: how many.
        rows: of the denoiser that they take at each step.
        previews: pictures of unfinished images, over all steps.
        deadline_s: from when it was accepted.
    """

    call: dict[str, Any]
    images: int
    rows: int
    previews: int = 0
    deadline_s: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """All images of the order are `done` of `calls` steps further."""

    done: int
    calls: int


@dataclass(frozen=True, kw_only=True)
class Previewed:
    """What image `image` looks like so far; the `index`-th preview of it."""

    image: int
    index: int
    pixels: Pixels


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Image `image` is finished: (height, width, 3)."""

    image: int
    pixels: Pixels


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Nothing more will come.

    Attributes:
        seconds: "queue", "text", "denoise", "decode"; the last two are those that it was there for, others beside it.
    """

    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """Nothing more will come, because of this."""

    error: Exception


Event = Stepped | Previewed | Drawn | Finished | Failed
Emit = Callable[[Event], None]


@dataclass(kw_only=True, eq=False)
class Ticket:
    """An order that was accepted.

    Attributes:
        emit: told of every event; called in the batcher's thread, must not wait.
        cancelled: whoever asked wants it no more; looked at between two steps.
        drawings: of its images, once it was begun.
        seconds: spent on it, by stage; "queue" is what it waited.
        previewed: how many previews of each image were shown.
        decoded: images that are finished.
        is_over: its last event was emitted.
    """

    order: Order
    emit: Emit
    accepted: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    drawings: list[Drawing] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    previewed: int = 0
    decoded: set[int] = field(default_factory=set)
    is_over: bool = False

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def is_late(self) -> bool:
        return time.monotonic() - self.accepted > self.order.deadline_s

    def end(self, event: Event) -> None:
        """Emits the last event."""
        self.is_over = True
        self.emit(event)

    def spend(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @property
    def wants_preview(self) -> bool:
        """Whether the next preview is due: they lie evenly between the first and the last step."""
        if self.previewed >= self.order.previews or not self.drawings:
            return False
        first = self.drawings[0]
        return first.index * (self.order.previews + 1) >= (self.previewed + 1) * first.calls and not first.is_over
