"""Servers on free ports of this machine, in threads of the test's own process."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

Start = Callable[..., Any]


class Running:
    """A server and a client for it.

    Attributes:
        server: obsdiff_runtime.server.app.Server.
        url: its address.
        client: asks it.
    """

    def __init__(self, server: Any) -> None:
        import uvicorn

        from obsdiff_runtime.server.app import create_app
        from obsdiff_runtime.server.run import _bound

        self.server = server
        listener = _bound("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(create_app(server), log_level="error", access_log=False, lifespan="off")
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._uvicorn.serve([listener])), daemon=True)
        self._thread.start()
        while not self._uvicorn.started:
            time.sleep(0.01)
        self.client = httpx.Client(base_url=self.url, timeout=60)

    @property
    def batcher(self) -> Any:
        return next(iter(self.server.models.values())).batcher

    def draw(self, **asked: Any) -> httpx.Response:
        return self.client.post("/v1/images/generations", json={"prompt": "a small green triangle", **asked})

    def close(self) -> None:
        self.client.close()
        self._uvicorn.should_exit = self._uvicorn.force_exit = True
        self._thread.join(10)
        for model in self.server.models.values():
            model.batcher.stop()


@contextmanager
def served(*bundles: Path, api_keys: tuple[str, ...] = (), limits: Any = None, bounds: Any = None) -> Iterator[Running]:
    from obsdiff_runtime.server.app import Server
    from obsdiff_runtime.server.metrics import Metrics
    from obsdiff_runtime.server.models import serve_bundle
    from obsdiff_runtime.server.options import DEFAULT_BOUNDS, DEFAULT_LIMITS

    metrics = Metrics()
    models = {
        f"model-{index}": serve_bundle(
            bundle,
            name=f"model-{index}",
            threads=1,
            limits=limits or DEFAULT_LIMITS,
            bounds=bounds or DEFAULT_BOUNDS,
            watch=metrics.of,
        )
        for index, bundle in enumerate(bundles)
    }
    for name, model in models.items():
        metrics.of(name).watch(lambda m=model: m.batcher.running, lambda m=model: m.batcher.waiting)
    running = Running(Server(models=models, metrics=metrics, api_keys=api_keys))
    try:
        yield running
    finally:
        running.close()


@pytest.fixture(scope="session")
def shared(sd3_bundle: Path) -> Iterator[Running]:
    """One server for all tests that leave it as it was."""
    with served(sd3_bundle, sd3_bundle) as running:
        yield running


@pytest.fixture
def start(sd3_bundle: Path) -> Iterator[Start]:
    """start(api_keys=..., limits=..., bounds=...): a server of the test's own."""
    opened: list[Any] = []

    def begin(**options: Any) -> Running:
        opened.append(served(sd3_bundle, **options))
        running: Running = opened[-1].__enter__()
        return running

    yield begin
    for context in opened:
        context.__exit__(None, None, None)


@pytest.fixture(scope="session")
def serving() -> Callable[..., Any]:
    """serving(bundle, ..., limits=..., bounds=...): a context with a server."""
    return served
