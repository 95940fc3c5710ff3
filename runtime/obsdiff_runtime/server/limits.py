"""Requests that are too large or too slow end before anything reads them."""

import json
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any, Final

import anyio

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

MAX_BODY_BYTES: Final = 1 << 20
MAX_FORM_BYTES: Final = 1 << 24
"""Of a form, which holds pictures."""
BODY_SECONDS: Final = 30.0
"""From the first wait for a body to its last byte."""


class BoundedBodies:
    """Reads each request's body before the application does, up to a size and within a time.

    `forms` are the paths at which a body may be a form.
    """

    def __init__(
        self,
        app: App,
        max_bytes: int = MAX_BODY_BYTES,
        seconds: float = BODY_SECONDS,
        *,
        forms: Collection[str] = (),
    ) -> None:
        self._app, self._max_bytes, self._seconds, self._forms = app, max_bytes, seconds, forms

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = MAX_FORM_BYTES if scope["path"] in self._forms else self._max_bytes
        try:
            with anyio.fail_after(self._seconds):
                body = await _body(receive, most)
        except TimeoutError:
            await _refuse(send, 408, f"the body of the request did not come within {self._seconds:g} s")
            return
        if body is None:
            await _refuse(send, 413, f"the body of the request is larger than {most} bytes")
            return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, replay, send)


async def _body(receive: Receive, most: int) -> bytes | None:
    """The whole body, or None where it is too large."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":  # the client is gone; the application will hear of it
            return b"".join(parts)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


async def _refuse(send: Send, status: int, message: str) -> None:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
