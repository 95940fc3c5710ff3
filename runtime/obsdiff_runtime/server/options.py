"""How a server serves, and what it lets requests ask for. Imports nothing heavy: the command line reads it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from obsdiff_runtime.errors import ConfigError

if TYPE_CHECKING:
    from obsdiff_runtime.bundle import Defaults
    from obsdiff_runtime.kinds import Settings


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
        pixels: of an image; None: four times the model's own size. Of a film, times as many frames as the model's own.
        steps: denoising steps.
        deadline_s: from request to answer.
    """

    prompt_characters: int = 4000
    pixels: int | None = None
    steps: int = 150
    deadline_s: float = 300.0

    def check(self, texts: Mapping[str, str], settings: "Settings", defaults: "Defaults") -> None:
        """Raises ConfigError where a request asks for more.

        Args:
            texts: prompt and negative prompt, by the name that messages call them.
            settings: what the request resolved to.
            defaults: of the bundle.
        """
        for name, text in texts.items():
            if len(text) > self.prompt_characters:
                raise ConfigError(f"{name} has {len(text)} characters; at most {self.prompt_characters} are taken")
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ConfigError(f"{name} is no valid Unicode text") from None
        if settings.num_inference_steps > self.steps:
            raise ConfigError(f"num_inference_steps is {settings.num_inference_steps}; at most {self.steps} are taken")
        pixels, most = settings.height * settings.width, self.pixels or 4 * defaults.height * defaults.width
        if pixels > most:
            raise ConfigError(f"size has {pixels} pixels; at most {most} are drawn here")
        frames, own = settings.num_frames or 1, defaults.num_frames or 1
        if frames * pixels > own * most:
            raise ConfigError(f"num_frames is {frames}; at most {own * most // pixels} of that size are drawn here")


DEFAULT_LIMITS: Final = Limits()
DEFAULT_BOUNDS: Final = Bounds()


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to serve.

    Attributes:
        host, port: to listen at; port 0 takes a free one.
        backend: of every bundle; see `backends.BACKENDS`.
        threads: of the host for each bundle, all if None.
        vae_tiling: of every bundle; see `Pipeline`.
        api_keys: one must come with each request, where there are any.
        drain_s: how long accepted requests may take after a signal.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    backend: str = "onnxruntime"
    threads: int | None = None
    vae_tiling: bool | int = False
    api_keys: tuple[str, ...] = ()
    limits: Limits = DEFAULT_LIMITS
    bounds: Bounds = DEFAULT_BOUNDS
    drain_s: float = 120.0


def read_tiling(given: Mapping[str, Any]) -> bool | int:
    """What `Pipeline` takes, from the values of `flags.TILING` by their keys."""
    tile: int | None = given["vae_tile"]
    return bool(given["vae_tiling"]) if tile is None else tile


def read_bounds(given: Mapping[str, Any]) -> Bounds:
    """From the values of `flags.BOUNDS` by their keys.

    Raises:
        ConfigError: one is not above 0; names its flag.
    """
    _check_positive(given, "max_steps", "max_prompt", "max_pixels")
    return Bounds(prompt_characters=given["max_prompt"], pixels=given["max_pixels"], steps=given["max_steps"])


def read_options(given: Mapping[str, Any]) -> Options:
    """From the values of `flags.SERVE` by their keys.

    Raises:
        ConfigError: one is not above 0, or the file of API keys cannot be used.
    """
    _check_positive(given, "max_rows", "max_queue", "deadline")
    return Options(
        host=given["host"],
        port=given["port"],
        backend=given["backend"],
        threads=given["threads"],
        vae_tiling=read_tiling(given),
        api_keys=() if given["api_keys"] is None else read_keys(given["api_keys"]),
        limits=Limits(max_rows=given["max_rows"], max_waiting=given["max_queue"]),
        bounds=replace(read_bounds(given), deadline_s=given["deadline"]),
        drain_s=given["drain"],
    )


def read_keys(path: Path) -> tuple[str, ...]:
    """API keys, one a line.

    Raises:
        ConfigError: the file cannot be read, or holds none.
    """
    try:
        keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the API keys cannot be read: {error}") from None
    if not keys:
        raise ConfigError(f"{path}: holds no API key; one a line is expected")
    return keys


def _check_positive(given: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if given[name] is not None and given[name] <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {given[name]:g}: should be more than 0")
