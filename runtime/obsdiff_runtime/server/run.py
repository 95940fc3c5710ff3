"""A process that serves bundles until it is told to stop.

The first SIGTERM or SIGINT drains: new requests are refused with 503 and /ready says so, those that were accepted are
answered, and then the process ends. A second one ends it at once, with 128 and its number as exit code.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

from obsdiff_runtime.errors import ConfigError, MissingPackageError
from obsdiff_runtime.server.models import distinct, serve_bundle
from obsdiff_runtime.server.options import Options

if TYPE_CHECKING:
    from obsdiff_runtime.server.app import Server

LOOK_EVERY_S: Final = 0.1
SLOW_CLIENT_S: Final = 20
"""For answers that are on their way when the drawing is done."""


def named(bundles: Sequence[str]) -> dict[str | None, Path]:
    """`NAME=FOLDER` or `FOLDER` each."""
    found: dict[str | None, Path] = {}
    for text in bundles:
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else text)
        key = name if equals else path.resolve().name
        if key in found:
            raise ConfigError(f"two models are called {key}; give them as NAME={path}")
        found[key] = path
    return found


def serve(bundles: Sequence[str], options: Options, ready: Callable[[str], None] = lambda url: None) -> None:
    """Loads the bundles and answers requests until a signal comes.

    Args:
        bundles: folders, or NAME=FOLDER; the first one is what requests get that name no model.
        options: how.
        ready: told the address once requests are taken.

    Raises:
        ObsdiffError: a bundle cannot be loaded.
        ConfigError: the address is taken.
        MissingPackageError: the `serve` extra is not installed.
    """
    try:
        import uvicorn

        from obsdiff_runtime.server.app import create_app
    except ModuleNotFoundError as error:
        raise _absent(error) from error
    listener = _bound(options.host, options.port)
    server = load(bundles, options)
    config = uvicorn.Config(
        create_app(server),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SLOW_CLIENT_S,
        server_header=False,
        lifespan="off",
    )

    class Draining(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if server.draining:
                os._exit(128 + sig)  # uvicorn would wait until connections are closed
            server.drain()
            threading.Thread(target=self._end_when_idle, daemon=True).start()

        def _end_when_idle(self) -> None:
            end = time.monotonic() + options.drain_s
            while not server.is_idle and time.monotonic() < end:
                time.sleep(LOOK_EVERY_S)
            self.should_exit = True

    try:
        with listener:
            host, port = listener.getsockname()[:2]
            listener.listen(config.backlog)  # so that who is told the address can connect, and waits for uvicorn
            ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            Draining(config).run([listener])
    finally:
        for model in server.models.values():
            model.batcher.stop()


def load(bundles: Sequence[str], options: Options) -> "Server":
    """What the routes need: every bundle loaded, its batcher running, its metrics counted.

    Raises:
        ObsdiffError: a bundle cannot be loaded.
        MissingPackageError: the `serve` extra is not installed.
    """
    try:
        from obsdiff_runtime.server.app import Server
        from obsdiff_runtime.server.metrics import Metrics
    except ModuleNotFoundError as error:
        raise _absent(error) from error
    metrics = Metrics()
    models = distinct(
        [
            serve_bundle(
                folder,
                name=name,
                backend=options.backend,
                threads=options.threads,
                vae_tiling=options.vae_tiling,
                limits=options.limits,
                bounds=options.bounds,
                watch=metrics.of,
            )
            for name, folder in named(bundles).items()
        ]
    )
    for name, model in models.items():
        metrics.of(name).watch(lambda m=model: m.batcher.running, lambda m=model: m.batcher.waiting)  # type: ignore[misc]
    return Server(models=models, metrics=metrics, api_keys=options.api_keys)


def _absent(error: ModuleNotFoundError) -> MissingPackageError:
    return MissingPackageError(
        f"{error.name} is absent: pip install 'obsdiff[serve]', or without torch 'obsdiff-runtime[serve]'"
    )


def _bound(host: str, port: int) -> socket.socket:
    """A socket at that address, which takes no connections yet."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ConfigError(f"cannot listen at {host}:{port}: {error.strerror}") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen at {host}:{port}: {error.strerror}") from error
    return listener
