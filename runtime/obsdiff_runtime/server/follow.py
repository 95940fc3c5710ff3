"""The events of one order, from the batcher's thread to the event loop's, for as long as the client is there."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

import anyio
from fastapi import Request

from obsdiff_runtime.errors import CancelledError
from obsdiff_runtime.server.batcher import Batcher
from obsdiff_runtime.server.orders import Event, Failed, Finished, Order, Ticket

LOOK_EVERY_S: Final = 0.25
"""How often it is looked whether the client is still there."""


class Follower:
    """An order that was submitted, and its events.

    Attributes:
        seconds: by stage, once it is finished.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._looked = self._loop.time()
        self._ticket: Ticket | None = None
        self.seconds: dict[str, float] = {}

    @classmethod
    def submit(cls, batcher: Batcher, order: Order, request: Request) -> "Follower":
        """Raises BusyError where the batcher takes no more."""
        follower = cls(request)
        follower._ticket = batcher.submit(order, follower._emit)
        return follower

    def _emit(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Every event but the last; raises the order's error, and CancelledError where the client is gone."""
        over = False
        try:
            while True:
                event = await self._next()
                over = isinstance(event, Finished | Failed)
                if isinstance(event, Finished):
                    self.seconds = event.seconds
                    return
                if isinstance(event, Failed):
                    raise event.error
                yield event
        finally:
            if not over and self._ticket is not None:
                self._ticket.cancel()

    async def _next(self) -> Event:
        while True:
            if self._loop.time() - self._looked > LOOK_EVERY_S:
                self._looked = self._loop.time()
                if await self._request.is_disconnected():
                    raise CancelledError("the client is gone")
            with anyio.move_on_after(LOOK_EVERY_S):  # asyncio.wait_for may swallow that the task is cancelled
                return await self._events.get()
