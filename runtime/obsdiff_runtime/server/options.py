"""How a server serves, and what it lets requests ask for. Imports nothing heavy: the command line reads it."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Attributes:
    max_rows: of one run of the denoiser, and of all images that are under way; an order that is larger runs alone.
    max_waiting: orders that may wait to be begun.
    """

    max_rows: int = 16
    max_waiting: int = 64


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The most that a request may ask for.

    Attributes:
        prompt_characters: of prompt and negative prompt, each.
        pixels: of an image; None: four times the model's own size.
        steps: denoising steps.
        deadline_s: from request to answer.
    """

    prompt_characters: int = 4000
    pixels: int | None = None
    steps: int = 150
    deadline_s: float = 300.0


DEFAULT_LIMITS: Final = Limits()
DEFAULT_BOUNDS: Final = Bounds()


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to serve.

    Attributes:
        host, port: to listen at; port 0 takes a free one.
        backend: of every bundle; see `backends.BACKENDS`.
        threads: of the host for each bundle, all if None.
        api_keys: one must come with each request, where there are any.
        drain_s: how long accepted requests may take after a signal.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    backend: str = "onnxruntime"
    threads: int | None = None
    api_keys: tuple[str, ...] = ()
    limits: Limits = DEFAULT_LIMITS
    bounds: Bounds = DEFAULT_BOUNDS
    drain_s: float = 120.0
