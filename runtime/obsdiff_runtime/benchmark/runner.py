"""What can be measured: anything that loads, and draws images when it is asked. A bundle does so by `BundleRunner`."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.backends import backend as find_backend
from obsdiff_runtime.bundle import ENCODER, MANIFEST, Bundle, Defaults, open_bundle
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.kinds.table import kind_of
from obsdiff_runtime.pipeline import Images, Pipeline
from obsdiff_runtime.progress import Progress, silent

DEFAULT_BACKEND: Final = "onnxruntime"
HOST_DEVICE: Final = "CPUExecutionProvider"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What every candidate is asked to draw, once a round; nothing in it is a default any more.

    Attributes:
        max_sequence_length: text tokens of T5, or of the zeros in its place; None: the candidate's own.
        num_images: in one batch.
        seed: of the noise.
        num_frames: of a film; None where pictures are drawn.
        guidance_scale_2: of the denoisers behind the first, where some take turns; None: as the first one's.
    """

    prompt: str
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int | None
    num_images: int
    seed: int
    num_frames: int | None = None
    guidance_scale_2: float | None = None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured.

    Attributes:
        name: short, for tables.
        kind: "bundle", "diffusers", ...
        path: of its folder, or its id on the Hub.
        backend: what runs it ("onnxruntime", "torch").
        sparsity: of its denoiser, "dense" where nothing was pruned.
        stored_bytes: of its folder.
        vae_tile: pixels along a side of the tiles that its VAE works in, None where pictures go through it whole.
    """

    name: str
    kind: str
    path: str
    backend: str
    sparsity: str
    stored_bytes: int
    vae_tile: int | None = None


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What loading gave.

    Attributes:
        load_seconds: by component, or for all of it as "pipeline".
        first_image_seconds: the first call, without loading: what is compiled, tuned or reserved then, is in it.
        devices: where each component runs.
        dtype: that the denoiser computes in.
        gpu: number of the GPU that it runs on; None where it runs on the CPU.
        versions: of what executes.
    """

    load_seconds: Mapping[str, float]
    first_image_seconds: float
    devices: Mapping[str, str]
    dtype: str
    gpu: int | None
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One call.

    Attributes:
        pictures: (num_images, height, width, 3), uint8; of films with frames before the height.
        components: seconds of each run of a component.
        first_step_seconds: from the call to the end of the first denoising step.
        stages: seconds of "text", "denoise" and "decode"; empty where they cannot be told apart.
    """

    pictures: NDArray[np.uint8]
    components: Mapping[str, Sequence[float]]
    first_step_seconds: float
    stages: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Peak memory of the GPU that a candidate takes, and who says so."""

    peak_bytes: int
    source: str


class Runner(Protocol):
    """A candidate."""

    @property
    def subject(self) -> Subject: ...

    @property
    def defaults(self) -> Defaults:
        """How it draws where nothing else is asked for."""
        ...

    @property
    def example(self) -> str:
        """What it draws then: any prompt that it can."""
        ...

    def check(self, request: Request) -> None:
        """Raises ConfigError where it cannot draw that; asked before anything is loaded."""
        ...

    def load(self, request: Request) -> Loaded:
        """Loads everything and draws once."""
        ...

    def draw(self, request: Request) -> Drawn:
        """Draws; returns when the pictures are in the host's memory."""
        ...

    def device_memory(self) -> DeviceMemory | None:
        """Of all calls so far; None where it cannot tell."""
        ...


class BundleRunner:
    """A bundle on a backend; see `Runner`."""

    def __init__(
        self,
        bundle: Bundle | Path | str,
        *,
        backend: str = DEFAULT_BACKEND,
        threads: int | None = None,
        vae_tiling: bool | int = False,
    ) -> None:
        """Checks the bundle; `threads` of the host to use, all if None; `vae_tiling` as of `Pipeline`.

        Raises:
            ConfigError: the folder is one of diffusers, or there is no such backend or tile.
            BundleError: it is no bundle, or not as it was exported.
            CompatibilityError: the runtime cannot run this pipeline, or its schema is newer.
        """
        find_backend(backend)
        opened = bundle if isinstance(bundle, Bundle) else open_bundle(_bundle_folder(Path(bundle)))
        self._pipeline = Pipeline(opened, backend=backend, threads=threads, vae_tiling=vae_tiling)
        self._backend = backend
        self._runs: list[tuple[str, float]] = []
        self._pipeline.networks.observer = lambda component, seconds: self._runs.append((component, seconds))

    @property
    def subject(self) -> Subject:
        bundle = self._pipeline.bundle
        name = bundle.root.resolve().name
        return Subject(
            name=name if self._backend == DEFAULT_BACKEND else f"{name}@{self._backend}",
            kind="bundle",
            path=str(bundle.root),
            backend=self._backend,
            sparsity=bundle.manifest.sparsity,
            stored_bytes=bundle.total_bytes(),
            vae_tile=self._pipeline.vae_tile,
        )

    @property
    def defaults(self) -> Defaults:
        return self._pipeline.bundle.manifest.defaults

    @property
    def example(self) -> str:
        return self._pipeline.example

    def check(self, request: Request) -> None:
        self._pipeline.resolver.resolve(
            request.num_inference_steps,
            request.guidance_scale,
            request.height,
            request.width,
            request.max_sequence_length,
            guidance_scale_2=request.guidance_scale_2,
            num_frames=request.num_frames,
        )

    def load(self, request: Request) -> Loaded:
        networks, shown = self._pipeline.networks, self._pipeline.example_pictures()
        for name in networks.bundle.manifest.components:
            if name != ENCODER or shown:
                networks.session(name)
        start = time.perf_counter()
        self._call(request)
        first = time.perf_counter() - start
        devices = {name: networks.session(name).device for name in networks.load_seconds}
        return Loaded(
            load_seconds=dict(networks.load_seconds),
            first_image_seconds=first,
            devices=devices,
            dtype=self._dtype(),
            gpu=None if set(devices.values()) == {HOST_DEVICE} else 0,
            versions=find_backend(self._backend).versions(),
        )

    def draw(self, request: Request) -> Drawn:
        self._runs.clear()
        start, steps = time.perf_counter(), list[float]()

        def note_step(stage: str, done: int, total: int, note: str = "") -> None:
            if stage == "denoise":
                steps.append(time.perf_counter() - start)

        images = self._call(request, note_step)
        components: dict[str, list[float]] = {}
        for name, seconds in self._runs:
            components.setdefault(name, []).append(seconds)
        return Drawn(
            pictures=images.arrays, components=components, first_step_seconds=steps[0], stages=dict(images.seconds)
        )

    def device_memory(self) -> DeviceMemory | None:
        """What TensorRT says of its sessions; ONNX Runtime does not tell."""
        networks = self._pipeline.networks
        known = [getattr(networks.session(name), "memory", None) for name in networks.load_seconds]
        if not known or any(memory is None for memory in known):
            return None
        peak = sum((m.weights_bytes or 0) + m.activations_bytes + m.buffers_bytes for m in known if m is not None)
        return DeviceMemory(peak_bytes=peak, source="its engines' weights, activations and buffers")

    def _call(self, request: Request, progress: Progress = silent) -> Images:
        return self._pipeline(
            request.prompt,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            guidance_scale_2=request.guidance_scale_2,
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            max_sequence_length=request.max_sequence_length,
            num_images=request.num_images,
            seed=request.seed,
            **self._pipeline.example_pictures(request.height, request.width),
            progress=progress,
        )

    def _dtype(self) -> str:
        manifest = self._pipeline.bundle.manifest
        entry = manifest.components[kind_of(manifest.pipeline_class).denoiser]
        return entry.dtype if entry.precision in ("", entry.dtype) else f"{entry.precision} in {entry.dtype}"


def open_runner(
    text: str, *, backend: str = DEFAULT_BACKEND, threads: int | None = None, vae_tiling: bool | int = False
) -> BundleRunner:
    """The bundle that `FOLDER` or `FOLDER@BACKEND` names; `backend` where it names none."""
    folder, at, named = text.rpartition("@")
    if not at or Path(text).exists():
        folder, named = text, backend
    return BundleRunner(folder, backend=named, threads=threads, vae_tiling=vae_tiling)


def _bundle_folder(folder: Path) -> Path:
    """The folder, unless it is one of diffusers, which people name without its kind."""
    if (folder / "model_index.json").is_file() and not (folder / MANIFEST).is_file():
        raise ConfigError(f"{folder} is no bundle but a diffusers folder: name it diffusers:{folder}")
    return folder
