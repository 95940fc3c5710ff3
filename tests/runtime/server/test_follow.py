"""What waits for a batcher, or for a client, with neither: on every Python that the runtime is for."""

import asyncio
from typing import Any

import pytest

from obsdiff_runtime.errors import CancelledError
from obsdiff_runtime.server import follow
from obsdiff_runtime.server.follow import Follower
from obsdiff_runtime.server.limits import BoundedBodies
from obsdiff_runtime.server.orders import Finished, Stepped


class Client:
    """A request whose client stays until it is told to go."""

    gone = False

    async def is_disconnected(self) -> bool:
        return self.gone


async def heard(follower: Follower) -> list[Any]:
    return [event async for event in follower]


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "LOOK_EVERY_S", 0.01)


@pytest.mark.usefixtures("hurried")
def test_an_event_that_takes_long_is_waited_for() -> None:
    async def run() -> list[Any]:
        follower = Follower(Client())  # type: ignore[arg-type]
        listening = asyncio.create_task(heard(follower))
        for event in (Stepped(done=1, calls=1), Finished(seconds={"denoise": 1.0})):
            await asyncio.sleep(0.05)
            follower._emit(event)
        return await listening

    assert asyncio.run(run()) == [Stepped(done=1, calls=1)]


@pytest.mark.usefixtures("hurried")
def test_a_client_that_is_gone_is_noticed_between_events() -> None:
    async def run() -> None:
        client = Client()
        listening = asyncio.create_task(heard(Follower(client)))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        client.gone = True
        await listening

    with pytest.raises(CancelledError, match="the client is gone"):
        asyncio.run(run())


@pytest.mark.parametrize("ticks", range(6))
def test_a_task_that_is_cancelled_ends_whenever_an_event_comes(ticks: int) -> None:
    async def run() -> bool:
        follower = Follower(Client())  # type: ignore[arg-type]
        listening = asyncio.create_task(heard(follower))
        await asyncio.sleep(0.01)
        follower._events.put_nowait(Stepped(done=1, calls=1))
        for _ in range(ticks):
            await asyncio.sleep(0)
        listening.cancel()
        done, _ = await asyncio.wait({listening}, timeout=0.2)
        return bool(done) and listening.cancelled()

    assert asyncio.run(run())


def test_a_body_that_does_not_come_in_time_is_refused() -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    async def run() -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def app(*_: Any) -> None:
            raise AssertionError("it was called without a body")

        await BoundedBodies(app, seconds=0.01)({"type": "http", "path": "/"}, receive, send)
        return sent

    assert asyncio.run(run())[0]["status"] == 408
