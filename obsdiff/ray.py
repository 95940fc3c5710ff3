"""Bundles behind Ray Serve: replicas of the HTTP server of `obsdiff serve`, as many as the load needs.

    serve run obsdiff.ray:build bundles=sd35m replicas=2 max_replicas=8 gpus=1 backend=tensorrt

or from Python: `serve.run(obsdiff.ray.build(obsdiff.ray.Asked(bundles=["sd35m"], replicas=2)))`. The API is the same;
one replica answers each request, and so `/metrics` and `/ready` tell of one of them. What a replica that dies had under
way fails with 500; clients that retry, as OpenAI's do, are answered by another. It never imports torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, field_validator

from obsdiff_runtime.errors import ConfigError, MissingPackageError
from obsdiff_runtime.flags import SERVE
from obsdiff_runtime.server.options import Options, read_options

try:
    from ray import serve
    from ray.serve.config import AutoscalingConfig
except ModuleNotFoundError as error:
    raise MissingPackageError(f"{error.name} is absent: pip install 'obsdiff[ray]'") from error

if TYPE_CHECKING:
    from fastapi import FastAPI

DEFAULTS = {flag.key: flag.default for flag in SERVE}


class Asked(BaseModel):
    """What to serve and how; the fields that `obsdiff serve` has too are its flags.

    Attributes:
        bundles: folders, or NAME=FOLDER, that every node can read; the first one is the default.
        drain: seconds that a replica has for what it accepted, before it is taken away.
        replicas: how many there are at least.
        max_replicas: how many there may be; None: no more than `replicas`.
        target_requests: under way in a replica, on average, above which another one is started; None: as many as
            `max_rows` lets share a run of the denoiser.
        cpus: that a replica reserves; None: `threads`, or one.
        gpus: that a replica reserves; parts of one are shared.
    """

    model_config = ConfigDict(extra="forbid")

    bundles: list[str]
    backend: str = DEFAULTS["backend"]
    threads: PositiveInt | None = None
    vae_tiling: bool = DEFAULTS["vae_tiling"]
    vae_tile: PositiveInt | None = None
    max_rows: PositiveInt = DEFAULTS["max_rows"]
    max_queue: PositiveInt = DEFAULTS["max_queue"]
    max_steps: PositiveInt = DEFAULTS["max_steps"]
    max_pixels: PositiveInt | None = None
    max_prompt: PositiveInt = DEFAULTS["max_prompt"]
    deadline: PositiveFloat = DEFAULTS["deadline"]
    drain: PositiveFloat = DEFAULTS["drain"]
    api_keys: Path | None = None
    replicas: PositiveInt = 1
    max_replicas: PositiveInt | None = None
    target_requests: PositiveFloat | None = None
    cpus: PositiveFloat | None = None
    gpus: float = 0.0

    @field_validator("bundles", mode="before")
    @classmethod
    def _one_or_several(cls, given: object) -> object:
        return [given] if isinstance(given, str) else given


def build(asked: Asked) -> serve.Application:
    """The application, for `serve.run` or `serve run obsdiff.ray:build`.

    Raises:
        ConfigError: `max_replicas` is smaller than `replicas`, or the file of API keys cannot be read.
    """
    most = asked.max_replicas or asked.replicas
    if most < asked.replicas:
        raise ConfigError(f"max_replicas {most} is less than replicas {asked.replicas}")
    options = read_options({**DEFAULTS, **asked.model_dump()})
    bundles = [_absolute(text) for text in asked.bundles]

    def application() -> "FastAPI":
        return _application(bundles, options)

    @serve.ingress(application)
    class Replica:
        """Loads the bundles in a process of its own."""

        def check_health(self) -> None:
            server = self.app.state.server  # type: ignore[attr-defined]  # of Ray's class around this one
            dead = [name for name, model in server.models.items() if not model.batcher.is_alive]
            if dead:
                raise RuntimeError(f"{', '.join(dead)} cannot draw any more")

    deployment = serve.deployment(
        Replica,
        name="obsdiff",
        max_ongoing_requests=asked.max_rows + asked.max_queue,  # more are refused by the replica, with a time to retry
        graceful_shutdown_timeout_s=asked.drain,
        ray_actor_options={"num_cpus": asked.cpus or asked.threads or 1, "num_gpus": asked.gpus},
        **_size(asked, most),
    )
    found: serve.Application = deployment.bind()
    return found


def _size(asked: Asked, most: int) -> dict[str, Any]:
    if most == asked.replicas:
        return {"num_replicas": most}
    target = asked.target_requests or max(1, asked.max_rows // 2)
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=asked.replicas, max_replicas=most, target_ongoing_requests=target
        )
    }


def _absolute(text: str) -> str:
    """A bundle as it is named, by a path that holds in other processes too."""
    name, equals, folder = text.partition("=")
    return f"{name}={Path(folder).resolve()}" if equals else str(Path(text).resolve())


def _application(bundles: list[str], options: Options) -> "FastAPI":
    """The routes over models that are loaded here, in a replica's process."""
    from obsdiff_runtime.server.app import create_app
    from obsdiff_runtime.server.run import load

    return create_app(load(bundles, options))
