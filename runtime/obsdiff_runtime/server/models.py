"""The bundles that are served: each a model with a name, a pipeline and a batcher."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obsdiff_runtime.bundle import Bundle, open_bundle
from obsdiff_runtime.controls import steering
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.kinds import Settings
from obsdiff_runtime.pipeline import Pipeline
from obsdiff_runtime.server.batcher import Batcher, Watch
from obsdiff_runtime.server.limits import MAX_FORM_BYTES
from obsdiff_runtime.server.options import DEFAULT_BOUNDS, DEFAULT_LIMITS, Bounds, Limits
from obsdiff_runtime.server.orders import Order
from obsdiff_runtime.server.schemas import FORMATS, MOST_PICTURES


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedModel:
    """A model of the server.

    Attributes:
        id: what requests call it.
        created: Unix time at which it was loaded.
    """

    id: str
    pipeline: Pipeline
    batcher: Batcher
    bounds: Bounds
    created: int

    @property
    def details(self) -> dict[str, Any]:
        """What /v1/models tells of it."""
        manifest = self.pipeline.bundle.manifest
        sessions = {name: self.pipeline.networks.session(name).device for name in self.pipeline.networks.load_seconds}
        return {
            "family": manifest.family,
            "sparsity": manifest.sparsity,
            "defaults": dataclasses.asdict(manifest.defaults),
            "backend": self.pipeline.networks.backend_name,
            "devices": sessions,
            "takes": self.takes,
        }

    @property
    def takes(self) -> dict[str, Any]:
        """What requests can choose, as far as that differs between models; see `Choices`."""
        choices = self.pipeline.resolver.choices
        least, most = choices.pictures
        most = MOST_PICTURES if most is None else min(most, MOST_PICTURES)
        pictures = {"least": least, "most": most, "bytes": MAX_FORM_BYTES} if most else None
        return {**dataclasses.asdict(choices), "pictures": pictures, "formats": self.formats}

    @property
    def formats(self) -> tuple[str, ...]:
        """Of files that hold what it draws."""
        films = self.pipeline.resolver.choices.frame_step is not None
        return tuple(name for name in FORMATS if not films or name != "jpeg")

    def resolve(self, call: Mapping[str, Any]) -> Settings:
        """What a call will use.

        Args:
            call: arguments of `Pipeline.begin`, None for its own.

        Raises:
            ConfigError: it asks for too much, or for what the pipeline cannot do.
        """
        settings = self.pipeline.resolver.resolve(
            call["num_inference_steps"],
            call["guidance_scale"],
            call["height"],
            call["width"],
            guidance_scale_2=call["guidance_scale_2"],
            num_frames=call["num_frames"],
            references=call.get("reference", ()),
            image=call.get("image"),
            last_image=call.get("last_image"),
            mask=call.get("mask") is not None,
            control=steering(call.get("control"), call.get("control_scale")),
            strength=call.get("strength"),
        )
        self.bounds.check(
            {name: call[name] for name in ("prompt", "negative_prompt")},
            settings,
            self.pipeline.bundle.manifest.defaults,
        )
        return settings

    def order(self, call: dict[str, Any], settings: Settings, images: int, previews: int) -> Order:
        """An order of so many images, and so many previews of each.

        Args:
            call: arguments of `Pipeline.begin`.
            settings: what it resolves to.
            images: how many.
            previews: of each.
        """
        rows = images * (2 if settings.guided else 1)
        return Order(call=call, images=images, rows=rows, previews=previews, deadline_s=self.bounds.deadline_s)


def serve_bundle(
    bundle: Bundle | Path | str,
    *,
    name: str | None = None,
    backend: str = "onnxruntime",
    threads: int | None = None,
    vae_tiling: bool | int = False,
    limits: Limits = DEFAULT_LIMITS,
    bounds: Bounds = DEFAULT_BOUNDS,
    watch: Callable[[str], Watch] | None = None,
    warm_up: bool = True,
) -> ServedModel:
    """Loads a bundle and starts its batcher.

    Args:
        bundle: opened, or a folder, whose every file is compared with its sha256.
        name: what requests call it; the folder's name if None.
        backend: one of `backends.BACKENDS`.
        threads: of the host, all if None.
        vae_tiling: see `Pipeline`.
        limits: of the batcher.
        bounds: of a request.
        watch: makes what is told of its runs, from its name.
        warm_up: draw one image of one step first, so that everything is loaded.

    Raises:
        ObsdiffError: it cannot be loaded, or cannot draw.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    pipeline = Pipeline(opened, backend=backend, threads=threads, vae_tiling=vae_tiling)
    name = name or pipeline.bundle.root.resolve().name
    if warm_up:
        steps, pictures = _fewest_steps(pipeline), pipeline.example_pictures()
        pipeline(pipeline.example, num_inference_steps=steps, **pictures)
    batcher = Batcher(pipeline, limits, None if watch is None else watch(name), name)
    return ServedModel(id=name, pipeline=pipeline, batcher=batcher, bounds=bounds, created=int(time.time()))


def _fewest_steps(pipeline: Pipeline) -> int:
    """One, or as many as the scheduler needs."""
    return min(4, pipeline.bundle.manifest.defaults.num_inference_steps)


def distinct(models: Sequence[ServedModel]) -> dict[str, ServedModel]:
    """By name.

    Raises:
        ConfigError: two have one name.
    """
    named = {model.id: model for model in models}
    if len(named) < len(models):
        raise ConfigError("two models have the same name; give them as NAME=BUNDLE")
    return named
