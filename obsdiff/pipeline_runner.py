"""A diffusers pipeline as a candidate of the benchmark: run by torch as it is, or with its blocks compiled."""

import contextlib
import inspect
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, Protocol

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from obsdiff import calls, checkpoint, job, pictures, ranks
from obsdiff.defaults import defaults_of, frame_scale, vae_scale
from obsdiff.delivery import DTYPES
from obsdiff.families import parts
from obsdiff.families.autoencoders import use_tiles
from obsdiff.loading import LoadedPipeline, ModelConfigs, load_configs, load_pipeline, shipped_pipeline
from obsdiff.recipe import Sampling
from obsdiff.residuals import block_modules
from obsdiff.sampling import exactly, in_steps, quiet, telling
from obsdiff.weights import main_dtype
from obsdiff_runtime.autoencoder import film_frames, tile_side
from obsdiff_runtime.benchmark.runner import DeviceMemory, Drawn, Loaded, Request, Subject
from obsdiff_runtime.bundle import Defaults
from obsdiff_runtime.errors import CompatibilityError, ConfigError, first_line, require_count
from obsdiff_runtime.kinds import EXAMPLE
from obsdiff_runtime.kinds.table import KINDS
from obsdiff_runtime.turns import require_taken

COMPILED: Final = "compiled"
DIFFUSERS: Final = "diffusers"
BACKENDS: Final = {DIFFUSERS: "torch", COMPILED: "torch.compile"}

_GRAPHS: Final = 256
"""That torch.compile may keep of one block's code: those of a shrunk model differ in their widths."""

Mark = Any


class _Clock(Protocol):
    """Marks moments of the work on a device, without waiting for it."""

    def mark(self) -> Mark: ...

    def seconds(self, start: Mark, end: Mark) -> float:
        """Between two marks; waits for the work before the second."""
        ...


class _HostClock:
    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class _CudaClock:
    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


@dataclass(frozen=True, kw_only=True)
class _Memory:
    """Of torch's allocator on a GPU: what this pipeline's weights take, and the most that a call needed besides."""

    weights_bytes: int
    call_bytes: int = 0


@cache
def _stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class PipelineRunner:
    """See `obsdiff_runtime.benchmark.runner.Runner`."""

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        compiled: bool = False,
        dtype: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        vae_tiling: bool | int = False,
    ) -> None:
        """Reads configurations only.

        Args:
            model: as for `load_pipeline`; the shipped pipeline if None.
            compiled: compile the denoiser's blocks with torch.compile.
            dtype: fp32, fp16 or bf16; if None as stored, but fp32 on a CPU.
            device: cpu, cuda or cuda:N; cuda where there is one if None.
            threads: of the host to use, all if None.
            vae_tiling: put pictures through the VAE in tiles; see the runtime's `Pipeline`.

        Raises:
            ConfigError: there is no such dtype, no such number of threads, or no such tile.
            ModelError: there is no such model, or no pipeline in it.
        """
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"--dtype {dtype}: torch candidates take {', '.join(DTYPES)}")
        if threads is not None:
            require_count("threads", threads)
        self._model: str | Path = shipped_pipeline() if model is None else model
        self._kind = COMPILED if compiled else DIFFUSERS
        self._device = torch.device(ranks.device_of(device))
        self._dtype = torch.float32 if dtype is None and self._device.type == "cpu" else DTYPES.get(dtype or "")
        self._threads = threads
        self._configs: ModelConfigs = load_configs(self._model)
        if "model_index" not in self._configs.configs:
            raise ConfigError(f"{self._model} is a denoiser alone; name the folder of its pipeline")
        self._tile = tile_side(vae_tiling, None, self._configs.configs.get("vae", {}))
        self._clock: _Clock = _HostClock() if self._device.type == "cpu" else _CudaClock()
        self._loaded: LoadedPipeline | None = None
        self._memory: _Memory | None = None

    @property
    def subject(self) -> Subject:
        given = Path(self._model)
        folder = given if self._loaded is None else self._loaded.folder  # of a Hub id: known once it is loaded
        manifest = checkpoint.pruned_manifest(folder) if folder.is_dir() else None
        return Subject(
            name=f"{self._kind}:{given.resolve().name}",
            kind=self._kind,
            path=str(self._model),
            backend=BACKENDS[self._kind],
            sparsity="dense" if manifest is None else manifest.sparsity,
            stored_bytes=_stored_bytes(folder),
            vae_tile=self._tile,
        )

    @property
    def defaults(self) -> Defaults:
        found = defaults_of(None, self._configs.configs)
        return Defaults(
            height=found.height,
            width=found.width,
            num_inference_steps=found.num_inference_steps,
            guidance_scale=found.guidance_scale,
            num_frames=found.num_frames,
            max_sequence_length=found.max_sequence_length,
        )

    @property
    def example(self) -> str:
        kind = KINDS.get(str(self._configs.configs["model_index"]["_class_name"]))
        return EXAMPLE if kind is None else kind.example

    def check(self, request: Request) -> None:
        if request.num_inference_steps < 1:
            raise ConfigError(f"num_inference_steps should be at least 1, not {request.num_inference_steps}")
        if request.height < 1 or request.width < 1:
            raise ConfigError(f"a picture cannot have {request.height}x{request.width} pixels")
        configs, family = self._configs.configs, self._configs.family
        sampling = Sampling(
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            height=request.height,
            width=request.width,
            max_sequence_length=request.max_sequence_length,
            batch_size=request.num_images,
            seed=request.seed,
            num_frames=request.num_frames,
            frame_scale=frame_scale(configs),
            guidance_scale_2=request.guidance_scale_2,
        )
        require_taken(request.guidance_scale_2, bool(self._configs.behind), f"of {self._model}")
        film_frames(request.num_frames, self.defaults.num_frames, frame_scale(configs), who=str(self._model))
        pipeline = str(configs["model_index"]["_class_name"])
        job.check_size(pipeline, configs[family.denoiser], vae_scale(configs), sampling)

    def load(self, request: Request) -> Loaded:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        before, start = self._allocated(), time.perf_counter()
        loaded = load_pipeline(self._model, dtype=self._dtype, device=self._device)
        if self._kind == COMPILED:
            for denoiser in loaded.denoisers.values():
                for name in block_modules(loaded.family.linears(denoiser)):
                    denoiser.get_submodule(name).compile()
        if self._tile is not None:
            use_tiles(loaded.pipeline.vae, self._tile)
        self._loaded, load_seconds = loaded, time.perf_counter() - start
        self._memory = None if before is None else _Memory(weights_bytes=(self._allocated() or 0) - before)
        start = time.perf_counter()
        drawn = self._first(request)
        first = time.perf_counter() - start
        return Loaded(
            load_seconds={"pipeline": load_seconds},
            first_image_seconds=first,
            devices=dict.fromkeys(drawn.components, self._place()),
            dtype=str(main_dtype(loaded.denoiser)).removeprefix("torch."),
            gpu=None if self._device.type == "cpu" else self._device.index or 0,
            versions={"torch": torch.__version__, "diffusers": diffusers.__version__},
        )

    def draw(self, request: Request) -> Drawn:
        pipeline, clock = self._ready().pipeline, self._clock
        options = inspect.signature(pipeline.__call__).parameters
        length = request.max_sequence_length
        takes_length = length is not None and "max_sequence_length" in options
        told: dict[str, Any] = {"max_sequence_length": length} if takes_length else {}
        films = parts.draws_films(type(pipeline))
        told |= {"num_videos_per_prompt" if films else "num_images_per_prompt": request.num_images}
        for name in ("num_frames", "guidance_scale_2"):
            told |= {} if getattr(request, name) is None else {name: getattr(request, name)}
        told |= pictures.example(pipeline, request.height, request.width)
        laps: dict[str, list[tuple[Mark, Mark]]] = {}
        steps: list[Mark] = []

        def note_step(_: int, __: Tensor) -> None:
            if not steps:
                steps.append(clock.mark())

        with ExitStack() as stack:
            stack.enter_context(quiet(pipeline))
            stack.enter_context(self._graphs_kept())
            stack.enter_context(self._watched(laps))
            before, start = self._allocated(reset=True), clock.mark()
            images = calls.call(pipeline, own_timesteps=True)(
                prompt=request.prompt,
                height=request.height,
                width=request.width,
                generator=torch.Generator("cpu").manual_seed(request.seed),
                **{parts.guidance_argument(type(pipeline)): request.guidance_scale},
                **in_steps(type(pipeline), request.num_inference_steps),
                **exactly(pipeline, embedded=False, pixels=request.height * request.width),
                **telling(pipeline, note_step),
                **told,
            )[0]  # images, or frames
        self._remember(before)
        return Drawn(
            pictures=np.stack([_bytes(np.asarray(image)) for image in images]),
            components={name: [clock.seconds(*lap) for lap in found] for name, found in laps.items()},
            first_step_seconds=clock.seconds(start, steps[0]),
            stages={},
        )

    def device_memory(self) -> DeviceMemory | None:
        if self._memory is None:
            return None
        peak = self._memory.weights_bytes + self._memory.call_bytes
        return DeviceMemory(peak_bytes=peak, source="torch's allocator, without CUDA's own share")

    def _first(self, request: Request) -> Drawn:
        try:
            return self.draw(request)
        except RuntimeError as error:  # what torch.compile raises begins with it
            if self._kind == COMPILED and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise CompatibilityError(
                    f"torch.compile cannot compile {self._model} here: {first_line(error)}; "
                    "does this machine have a C++ compiler?"
                ) from error
            raise

    def _ready(self) -> LoadedPipeline:
        if self._loaded is None:
            raise RuntimeError("load() comes before draw()")
        return self._loaded

    def _watched(self, laps: dict[str, list[tuple[Mark, Mark]]]) -> contextlib.AbstractContextManager[None]:
        return _watching(_components(self._ready()), self._clock, laps)

    def _graphs_kept(self) -> contextlib.AbstractContextManager[object]:
        if self._kind != COMPILED:
            return contextlib.nullcontext()
        import torch._dynamo

        kept: contextlib.AbstractContextManager[object] = torch._dynamo.config.patch(recompile_limit=_GRAPHS)
        return kept

    def _place(self) -> str:
        return "CPU" if self._device.type == "cpu" else torch.cuda.get_device_name(self._device)

    def _allocated(self, *, reset: bool = False) -> int | None:
        """Bytes that torch holds of the GPU now; `reset` lets the peak begin here. None on a CPU."""
        if self._device.type == "cpu":
            return None
        if reset:
            torch.cuda.reset_peak_memory_stats(self._device)
        return int(torch.cuda.memory_allocated(self._device))

    def _remember(self, before: int | None) -> None:
        if before is not None and self._memory is not None:
            needed = int(torch.cuda.max_memory_allocated(self._device)) - before
            self._memory = replace(self._memory, call_bytes=max(needed, self._memory.call_bytes))


def _bytes(drawn: NDArray[Any]) -> NDArray[np.uint8]:
    """A picture, or the frames of a film, which come between 0 and 1."""
    return drawn if drawn.dtype == np.uint8 else np.rint(drawn * 255).astype(np.uint8)


def _components(loaded: LoadedPipeline) -> dict[str, tuple[nn.Module, ...]]:
    """What is timed, by the names that a bundle gives them."""
    pipeline, vae = loaded.pipeline, loaded.pipeline.vae
    encoders = {
        name: (module,)
        for name, module in pipeline.components.items()
        if name.startswith(("text_encoder", "image_encoder")) and isinstance(module, nn.Module)
    }
    quant = getattr(vae, "post_quant_conv", None)
    decoder = (vae.decoder,) if quant is None else (quant, vae.decoder)
    steering = (pipeline.controlnet,) if hasattr(pipeline, "controlnet") else ()  # in the denoiser's graph there
    denoisers = {name: (*steering, module) for name, module in loaded.denoisers.items()}
    return {**encoders, **denoisers, "vae_decoder": decoder}


@contextlib.contextmanager
def _watching(
    components: Mapping[str, tuple[nn.Module, ...]], clock: _Clock, laps: dict[str, list[tuple[Mark, Mark]]]
) -> Iterator[None]:
    """Until the block ends, each run of a component adds its start and end to `laps`; it ends with its last module."""

    def begin(started: list[Mark], *_: object) -> None:
        if not started:
            started.append(clock.mark())

    def end(name: str, started: list[Mark], *_: object) -> None:
        laps.setdefault(name, []).append((started.pop(), clock.mark()))

    with ExitStack() as stack:
        for name, modules in components.items():
            started: list[Mark] = []
            for module in modules:
                stack.callback(module.register_forward_pre_hook(partial(begin, started)).remove)
            stack.callback(modules[-1].register_forward_hook(partial(end, name, started)).remove)
        yield
