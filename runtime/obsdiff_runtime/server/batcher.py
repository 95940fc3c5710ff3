"""One model's thread: it begins what was accepted, steps all images that are under way, and decodes what is finished.

Between two steps images come and go: a new one joins a running company at its own first step, a finished, cancelled or
late one leaves it. Images whose shapes agree share runs of the denoiser, up to `max_rows` rows each; the others take
turns. Requests are begun in the order in which they came.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from obsdiff_runtime.drawing import Drawing, companies, step_together
from obsdiff_runtime.errors import CancelledError, ObsdiffError
from obsdiff_runtime.pipeline import Pipeline
from obsdiff_runtime.server.options import Limits
from obsdiff_runtime.server.orders import (
    BusyError,
    Drawn,
    Emit,
    Failed,
    Finished,
    LateError,
    Order,
    Pixels,
    Previewed,
    Stepped,
    Ticket,
)

log = logging.getLogger(__name__)

SMOOTHING = 0.2
"""Weight of the newest request in the mean time that one takes."""


class Watch(Protocol):
    """What is told of the batcher's work, for metrics."""

    def ran(self, stage: str, seconds: float, rows: int) -> None:
        """A run of "text", "denoise" or "decode", of so many rows or images."""
        ...


class Unwatched:
    def ran(self, stage: str, seconds: float, rows: int) -> None:
        pass


class Batcher:
    """Draws what it is given, in a thread of its own.

    Attributes:
        pipeline: that it runs; nobody else may run it meanwhile.
    """

    def __init__(self, pipeline: Pipeline, limits: Limits, watch: Watch | None = None, name: str = "model") -> None:
        self.pipeline, self.limits = pipeline, limits
        self._watch: Watch = watch or Unwatched()
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._changed = threading.Condition()
        self._stopping = self._closed = False
        self._mean_s = 1.0
        self._thread = threading.Thread(target=self._work, name=f"obsdiff-{name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Orders that are not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Orders that are under way."""
        return len(self._running)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def is_idle(self) -> bool:
        with self._changed:
            return not self._waiting and not self._running

    def submit(self, order: Order, emit: Emit) -> Ticket:
        """Accepts an order.

        Raises:
            BusyError: too many wait already, or this one is about to stop.
        """
        ticket = Ticket(order=order, emit=emit)
        with self._changed:
            self.require_room()
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def require_room(self) -> None:
        """Whether an order would be accepted now; to ask before work is put into one.

        Raises:
            BusyError: as `submit` does.
        """
        with self._changed:
            if self._closed or not self._thread.is_alive():
                raise BusyError("the server is shutting down; try another one", 5.0)
            if len(self._waiting) >= self.limits.max_waiting:
                patience = self._patience()
                message = f"the queue is full ({len(self._waiting)} waiting); try again in {patience:.0f} s"
                raise BusyError(message, patience)

    def close(self) -> None:
        """Takes no more orders, and goes on with those that it has."""
        with self._changed:
            self._closed = True

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the thread after the step at hand; what is left fails."""
        with self._changed:
            self._closed = self._stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _patience(self) -> float:
        """Seconds until a place will be free, by how long orders took lately."""
        together = max(1, self.limits.max_rows // 2)
        return max(1.0, self._mean_s * len(self._waiting) / together)

    def _work(self) -> None:
        while self._take_in():
            self._for_each(self._begin)
            drawings = [drawing for ticket in self._running if not ticket.is_over for drawing in ticket.drawings]
            for company in companies(drawings, self.limits.max_rows):
                step_together(company, self._step)
            self._for_each(self._deliver)
            with self._changed:
                self._running = [ticket for ticket in self._running if not ticket.is_over]
        for ticket in (*self._running, *self._waiting):
            ticket.end(Failed(error=BusyError("the server was stopped; try another one", 5.0)))

    def _take_in(self) -> bool:
        """Waits for something to do and takes what there is room for; False where all is over."""
        with self._changed:
            while not self._stopping and not self._waiting and not self._running:
                self._changed.wait()
            rows = sum(ticket.order.rows for ticket in self._running)
            while self._waiting and (not self._running or rows + self._waiting[0].order.rows <= self.limits.max_rows):
                ticket = self._waiting.popleft()
                ticket.spend("queue", time.monotonic() - ticket.accepted)
                self._running.append(ticket)
                rows += ticket.order.rows
            return not self._stopping

    def _for_each(self, work: Callable[[Ticket], None]) -> None:
        """Does some work for each that is under way; what it raises is that one's end alone."""
        for ticket in self._running:
            if ticket.is_over:
                continue
            try:
                if ticket.cancelled:
                    raise CancelledError("the client is gone")
                if ticket.is_late:
                    raise LateError(f"not finished within {ticket.order.deadline_s:g} s; ask for fewer steps or images")
                work(ticket)
            except ObsdiffError as error:
                ticket.end(Failed(error=error))
            except Exception as error:  # a bug must not stop the others
                log.exception("a request failed")
                ticket.end(Failed(error=error))

    def _begin(self, ticket: Ticket) -> None:
        if not ticket.drawings:
            with self._timed([ticket], "text", ticket.order.images):
                ticket.drawings = self.pipeline.begin(**ticket.order.call)

    def _step(self, company: Sequence[Drawing]) -> None:
        present = [ticket for ticket in self._running if any(drawing in company for drawing in ticket.drawings)]
        with self._timed(present, "denoise", sum(drawing.rows for drawing in company)):
            self.pipeline.step(company)

    def _deliver(self, ticket: Ticket) -> None:
        """Tells of the step that was taken, and decodes what is to be seen."""
        for drawing in ticket.drawings:
            if drawing.error is not None:
                raise drawing.error
        first = ticket.drawings[0]
        ticket.emit(Stepped(done=first.index, calls=first.calls))
        if ticket.wants_preview:
            for image, drawing in enumerate(ticket.drawings):
                ticket.emit(Previewed(image=image, index=ticket.previewed, pixels=self._decode(ticket, drawing)))
            ticket.previewed += 1
        for image, drawing in enumerate(ticket.drawings):
            if drawing.is_over and image not in ticket.decoded:
                ticket.emit(Drawn(image=image, pixels=self._decode(ticket, drawing)))
                ticket.decoded.add(image)
        if len(ticket.decoded) == len(ticket.drawings):
            took = time.monotonic() - ticket.accepted - ticket.seconds["queue"]
            self._mean_s += SMOOTHING * (took - self._mean_s)
            ticket.end(Finished(seconds=dict(ticket.seconds)))

    def _decode(self, ticket: Ticket, drawing: Drawing) -> Pixels:
        with self._timed([ticket], "decode", 1):
            return self.pipeline.decode(drawing.sample)

    @contextmanager
    def _timed(self, tickets: Sequence[Ticket], stage: str, rows: int) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._watch.ran(stage, seconds, rows)
        for ticket in tickets:
            ticket.spend(stage, seconds)
