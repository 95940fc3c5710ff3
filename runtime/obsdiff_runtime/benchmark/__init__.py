"""How long bundles and pipelines take to draw: several candidates by turns, each compared with one of them.

A candidate is a `runner.Runner`; names and folders are bundles. `rounds` measures, `report` holds what was found, and
`text` shows it on a terminal.
"""

from collections.abc import Mapping
from pathlib import Path

from obsdiff_runtime import vitals
from obsdiff_runtime.benchmark import rounds
from obsdiff_runtime.benchmark.remarks import remarks
from obsdiff_runtime.benchmark.report import END_TO_END, BenchReport, Conditions, GpuState
from obsdiff_runtime.benchmark.rounds import Entry
from obsdiff_runtime.benchmark.runner import DEFAULT_BACKEND, BundleRunner, Request, Runner, open_runner
from obsdiff_runtime.benchmark.text import table as table
from obsdiff_runtime.bundle import Bundle
from obsdiff_runtime.errors import ConfigError, require_count
from obsdiff_runtime.gpus import find_gpus
from obsdiff_runtime.nvml import GpuVitals
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.timing import Comparison, check_rounds, compare, host_peak_bytes, machine
from obsdiff_runtime.vitals import CpuTime, CpuVitals, Sensors


def bench(
    *candidates: Runner | Bundle | Path | str,
    against: Runner | Bundle | Path | str | None = None,
    iterations: int = 10,
    warmup: int = 2,
    prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_scale_2: float | None = None,
    max_sequence_length: int | None = None,
    num_images: int = 1,
    seed: int = 0,
    backend: str = DEFAULT_BACKEND,
    threads: int | None = None,
    vae_tiling: bool | int = False,
    sensors: Sensors | None = None,
    progress: Progress = silent,
) -> BenchReport:
    """Measures candidates end to end and component by component, by turns.

    Args:
        *candidates: a bundle, its folder, "FOLDER@BACKEND", or anything else that draws.
        against: what each of them is compared with; the first of them if None.
        iterations: rounds that count; in each, every candidate draws once.
        warmup: rounds before that do not.
        prompt: of every call, the first candidate's default if None; so are the next seven.
        height: in pixels.
        width: in pixels.
        num_frames: of a film.
        num_inference_steps: of every call.
        guidance_scale: of every call.
        guidance_scale_2: likewise, of the denoisers behind the first, where some take turns.
        max_sequence_length: of every call.
        num_images: drawn in one batch.
        seed: of the noise.
        backend: of bundles that name none; one of `backends.BACKENDS`.
        threads: of the host, all if None.
        vae_tiling: of bundles; see `Pipeline`.
        sensors: what reads the machine.
        progress: told of stage "bench" after each round.

    Raises:
        ConfigError: nothing to measure, no iterations, or arguments that a candidate does not take.
    """
    _check(iterations, warmup, num_images, candidates)
    sensors = Sensors() if sensors is None else sensors
    load_average = sensors.load_average()
    everyone = [*candidates, *([] if against is None else [against])]
    runners = _named([_runner(each, backend, threads, vae_tiling) for each in everyone])
    leader = next(iter(runners.values()))
    first = leader.defaults
    request = Request(
        prompt=leader.example if prompt is None else prompt,
        height=first.height if height is None else height,
        width=first.width if width is None else width,
        num_frames=first.num_frames if num_frames is None else num_frames,
        num_inference_steps=first.num_inference_steps if num_inference_steps is None else num_inference_steps,
        guidance_scale=first.guidance_scale if guidance_scale is None else guidance_scale,
        guidance_scale_2=first.guidance_scale_2 if guidance_scale is guidance_scale_2 is None else guidance_scale_2,
        max_sequence_length=first.max_sequence_length if max_sequence_length is None else max_sequence_length,
        num_images=num_images,
        seed=seed,
    )
    for runner in runners.values():
        runner.check(request)
    entries = {name: rounds.load(runner, request, sensors) for name, runner in runners.items()}
    before = _Moment(entries, sensors)
    rounds.play(entries, request, iterations=iterations, warmup=warmup, sensors=sensors, progress=progress)
    after = _Moment(entries, sensors)
    found = {name: rounds.figures(entry, request) for name, entry in entries.items()}
    conditions = _conditions(load_average, before, after)
    baseline = list(runners)[0 if against is None else -1]
    return BenchReport(
        request=request,
        iterations=iterations,
        warmup=warmup,
        threads=threads,
        candidates=found,
        baseline=baseline,
        comparisons=_comparisons(entries, baseline),
        host_peak_bytes=host_peak_bytes(),
        machine=machine({k: v for entry in entries.values() for k, v in entry.loaded.versions.items()}),
        conditions=conditions,
        notes=remarks(found, conditions, iterations=iterations, threads=threads),
    )


def _check(iterations: int, warmup: int, num_images: int, candidates: tuple[object, ...]) -> None:
    if not candidates:
        raise ConfigError("there is nothing to measure; name a bundle")
    check_rounds(iterations, warmup)
    require_count("num_images", num_images)


def _runner(
    candidate: Runner | Bundle | Path | str, backend: str, threads: int | None, vae_tiling: bool | int
) -> Runner:
    if isinstance(candidate, str | Path):
        return open_runner(str(candidate), backend=backend, threads=threads, vae_tiling=vae_tiling)
    if isinstance(candidate, Bundle):
        return BundleRunner(candidate, backend=backend, threads=threads, vae_tiling=vae_tiling)
    return candidate


def _named(runners: list[Runner]) -> dict[str, Runner]:
    """By short name; by path where two share one, and numbered where that is the same too."""
    names = [runner.subject.name for runner in runners]
    labels = [
        name if names.count(name) == 1 else name.replace(Path(runner.subject.path).name, runner.subject.path, 1)
        for name, runner in zip(names, runners, strict=True)
    ]
    return {
        label if labels.count(label) == 1 else f"{label} #{labels[:index].count(label) + 1}": runner
        for index, (label, runner) in enumerate(zip(labels, runners, strict=True))
    }


def _comparisons(entries: Mapping[str, Entry], baseline: str) -> dict[str, dict[str, Comparison]]:
    """By candidate and by part: those parts that both have."""
    base = entries[baseline]
    parts = {name: {END_TO_END, *entry.takes[0].drawn.components} for name, entry in entries.items()}
    order = [END_TO_END, *base.takes[0].drawn.components]
    return {
        name: {
            part: compare(name, entry.seconds(part), baseline, base.seconds(part))
            for part in order
            if part in parts[name]
        }
        for name, entry in entries.items()
        if name != baseline
    }


class _Moment:
    """The machine, before the rounds or after them."""

    def __init__(self, entries: Mapping[str, Entry], sensors: Sensors) -> None:
        self.cpu: CpuVitals = vitals.cpu_vitals()
        self.cpu_time: CpuTime | None = sensors.cpu_time()
        numbers = sorted({entry.loaded.gpu for entry in entries.values() if entry.loaded.gpu is not None})
        self.gpus: dict[int, GpuVitals | None] = {
            number: None if (gpu := sensors.gpu(number)) is None else gpu.vitals() for number in numbers
        }


def _conditions(load_average: float | None, before: _Moment, after: _Moment) -> Conditions:
    gpus = find_gpus()
    return Conditions(
        cores=vitals.usable_cores(),
        load_average=load_average,
        others_cores=vitals.others_cores(before.cpu_time, after.cpu_time),
        cpu_before=before.cpu,
        cpu_after=after.cpu,
        driver=gpus.driver,
        gpus={
            str(number): GpuState(
                name=gpus.devices[number].name if number < len(gpus.devices) else "unknown",
                before=state,
                after=after.gpus[number],
            )
            for number, state in before.gpus.items()
        },
    )
