"""Loading candidates and letting them draw by turns; everything that is read from clocks and counters is read here."""

import io
import itertools
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.benchmark.report import END_TO_END, Candidate, Energy, Memory, Outside
from obsdiff_runtime.benchmark.runner import Drawn, Loaded, Request, Runner
from obsdiff_runtime.progress import Progress
from obsdiff_runtime.quantiles import Interval
from obsdiff_runtime.timing import latency, turns
from obsdiff_runtime.vitals import Sensors

PNG_RUNS: Final = 3
SHORTEST_COUNTED_SECONDS: Final = 0.2
"""Of a call whose energy is told: NVML's counter moves about every tenth of a second."""

GROWTH: Final = "growth of what all programs use, by NVML; of the first on a GPU with CUDA's own share"

STAGES: Final[Mapping[str, str]] = {
    "text_encoder": "text",
    "vision_encoder": "text",
    "image_encoder": "text",
    "vae_encoder": "text",  # of pictures that are told beside it
    "vae_decoder": "decode",
}
"""How components begin that belong to a stage; the others are the denoiser's, "denoise"."""


@dataclass(frozen=True, kw_only=True)
class Take:
    """One call that counts; `joules` of the GPU it ran on, None where they are not counted."""

    seconds: float
    drawn: Drawn
    joules: float | None


@dataclass
class Entry:
    """A candidate while it is measured.

    Attributes:
        runner: what draws.
        loaded: what loading it gave.
        host_growth_bytes: see `report.Memory`.
        device_growth_bytes: of the GPU's memory that is used by anybody, as NVML tells it; None where it does not.
        takes: calls that count.
    """

    runner: Runner
    loaded: Loaded
    host_growth_bytes: int | None
    device_growth_bytes: int | None
    takes: list[Take] = field(default_factory=list)

    def seconds(self, part: str) -> list[float]:
        """(rounds,): of the whole call, or of all runs of a component."""
        if part == END_TO_END:
            return [take.seconds for take in self.takes]
        return [sum(take.drawn.components[part]) for take in self.takes]


def load(runner: Runner, request: Request, sensors: Sensors) -> Entry:
    """Loads a candidate and lets it draw once, which tells what memory it takes."""
    resident, used = sensors.resident_bytes(), _used_bytes(sensors)
    loaded = runner.load(request)
    grown, now = sensors.resident_bytes(), _used_bytes(sensors)
    device = None
    if loaded.gpu is not None and loaded.gpu in used and loaded.gpu in now:
        device = max(now[loaded.gpu] - used[loaded.gpu], 0)
    return Entry(
        runner=runner,
        loaded=loaded,
        host_growth_bytes=None if resident is None or grown is None else max(grown - resident, 0),
        device_growth_bytes=device,
    )


def play(
    entries: Mapping[str, Entry],
    request: Request,
    *,
    iterations: int,
    warmup: int,
    sensors: Sensors,
    progress: Progress,
) -> None:
    """Lets the candidates draw by turns; adds to `takes` of each.

    Args:
        entries: by name.
        request: what each call draws.
        iterations: rounds that count.
        warmup: rounds before that do not.
        sensors: where energy is read.
        progress: told of stage "bench" after each round.
    """
    counters = {
        name: None if entry.loaded.gpu is None else sensors.gpu(entry.loaded.gpu) for name, entry in entries.items()
    }
    for index, name in turns(entries, iterations, warmup, progress):
        counter, runner = counters[name], entries[name].runner
        before = None if counter is None else counter.energy_joules()
        start = time.perf_counter()
        drawn = runner.draw(request)
        seconds = time.perf_counter() - start
        after = None if counter is None else counter.energy_joules()
        if index >= 0:
            joules = None if before is None or after is None else after - before
            entries[name].takes.append(Take(seconds=seconds, drawn=drawn, joules=joules))


def figures(entry: Entry, request: Request) -> Candidate:
    """All that a candidate's calls say."""
    takes, loaded, count = entry.takes, entry.loaded, len(entry.takes)
    end_to_end = latency(entry.seconds(END_TO_END))
    names = list(takes[0].drawn.components)
    runs = {name: [take.drawn.components[name] for take in takes] for name in names}
    interval = end_to_end.p50_interval_ms
    per_second = Interval(low=_rate(request, interval.high), high=_rate(request, interval.low))
    return Candidate(
        subject=entry.runner.subject,
        dtype=loaded.dtype,
        devices=loaded.devices,
        load_ms={name: seconds * 1000 for name, seconds in loaded.load_seconds.items()},
        first_image_ms=loaded.first_image_seconds * 1000,
        end_to_end=end_to_end,
        components={
            name: latency([second for round_ in runs[name] for second in round_], rounds=count) for name in names
        },
        images_per_second=request.num_images / (end_to_end.p50_ms / 1000),
        images_per_second_interval=per_second,
        time_to_first_step=latency([take.drawn.first_step_seconds for take in takes]),
        outside=_outside(takes),
        png_ms=_png_ms(takes[-1].drawn.pictures),
        memory=_memory(entry),
        energy=_energy(takes, loaded, request),
        rounds_ms={
            END_TO_END: tuple((take.seconds * 1000,) for take in takes),
            **{name: tuple(tuple(s * 1000 for s in round_) for round_ in runs[name]) for name in names},
        },
    )


def _rate(request: Request, call_ms: float | None) -> float | None:
    return None if call_ms is None else request.num_images / (call_ms / 1000)


def _outside(takes: list[Take]) -> Outside:
    seconds = [take.seconds - sum(map(sum, take.drawn.components.values())) for take in takes]
    stages: dict[str, list[float]] = {}
    for take in takes:
        left = dict(take.drawn.stages)
        for component, runs in take.drawn.components.items():
            stage = next((stage for prefix, stage in STAGES.items() if component.startswith(prefix)), "denoise")
            if stage in left:
                left[stage] -= sum(runs)
        for stage, rest in left.items():
            stages.setdefault(stage, []).append(rest)
    return Outside(
        latency=latency(seconds),
        share=statistics.median(each / take.seconds for each, take in zip(seconds, takes, strict=True)),
        stages_ms={stage: statistics.median(rest) * 1000 for stage, rest in stages.items()},
    )


def _memory(entry: Entry) -> Memory:
    told, grown = entry.runner.device_memory(), entry.device_growth_bytes
    if told is not None:
        peak, source = told.peak_bytes, told.source
    elif entry.loaded.gpu is None:
        peak, source = None, "it runs on the CPU"
    elif grown is None:
        peak, source = None, "NVML does not tell it here"
    else:
        peak, source = grown, GROWTH
    return Memory(host_growth_bytes=entry.host_growth_bytes, device_peak_bytes=peak, device_source=source)


def _energy(takes: list[Take], loaded: Loaded, request: Request) -> Energy:
    joules = [take.joules for take in takes if take.joules is not None]
    if loaded.gpu is None:
        return Energy(joules_per_image=None, source="it runs on the CPU, and NVML counts GPUs only")
    if len(joules) < len(takes):
        return Energy(joules_per_image=None, source="NVML has no energy counter here")
    if statistics.median(take.seconds for take in takes) < SHORTEST_COUNTED_SECONDS:
        source = (
            f"a call is shorter than {SHORTEST_COUNTED_SECONDS:g} s, too short for NVML's counter; draw more images"
        )
        return Energy(joules_per_image=None, source=source)
    images = len(takes) * request.num_images
    return Energy(joules_per_image=sum(joules) / images, source="NVML's counter of the whole GPU, idle power included")


def _png_ms(pictures: NDArray[np.uint8]) -> float | None:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        return None
    seconds = []
    for _ in range(PNG_RUNS):
        start = time.perf_counter()
        for picture in pictures.reshape(-1, *pictures.shape[-3:]):
            Image.fromarray(picture).save(io.BytesIO(), "PNG")
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1000


def _used_bytes(sensors: Sensors) -> dict[int, int]:
    """Of each GPU that NVML knows, by number."""
    found: dict[int, int] = {}
    for index in itertools.count():
        gpu = sensors.gpu(index)
        if gpu is None:
            return found
        used = gpu.used_bytes()
        if used is not None:
            found[index] = used
    return found
