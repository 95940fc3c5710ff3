"""How long a bundle takes, end to end and component by component, beside another one or alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from obsdiff_runtime.bundle import Bundle, open_bundle
from obsdiff_runtime.decoding import encode
from obsdiff_runtime.pipeline import Pipeline
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.timing import Comparison, Latency, Machine, compare, host_peak_bytes, interleaved, latency, machine

PROMPT: Final = "a large red circle above a small blue square"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One bundle of a benchmark.

    Attributes:
        end_to_end: text to image, without loading.
        components: per run of a component; the denoiser runs once a step.
        load_ms: loading each component.
        bundle_bytes: the whole folder as listed.
        devices: where each component ran.
    """

    path: str
    sparsity: str
    images_per_second: float
    end_to_end: Latency
    components: Mapping[str, Latency]
    load_ms: Mapping[str, float]
    bundle_bytes: int
    devices: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """What `bench` measured.

    Attributes:
        candidates: by label, the bundle first.
        comparisons: of the other bundle with it, end to end and for each component both have.
        host_peak_bytes: largest resident memory of this process so far, with everything it has loaded; None where
            the system does not tell.
    """

    candidates: Mapping[str, Candidate]
    comparisons: Mapping[str, Comparison]
    backend: str
    threads: int | None
    iterations: int
    warmup: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    num_images: int
    host_peak_bytes: int | None
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        report: dict[str, Any] = encode(self)
        return report


def bench(
    bundle: Bundle | Path | str,
    *,
    against: Bundle | Path | str | None = None,
    iterations: int = 10,
    warmup: int = 2,
    prompt: str = PROMPT,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    num_images: int = 1,
    backend: str = "onnxruntime",
    threads: int | None = None,
    progress: Progress = silent,
) -> BenchReport:
    """Measures a bundle end to end and component by component, beside another one if one is given.

    Args:
        bundle: the one in question.
        against: what it is compared with, run in the same rounds.
        iterations: rounds that count.
        warmup: rounds before that do not.
        prompt: of every call.
        height: in pixels, the bundle's default if None; so are the next ones.
        width: in pixels.
        num_inference_steps: of every call.
        guidance_scale: of every call.
        num_images: drawn in one batch.
        backend: one of `backends.BACKENDS`.
        threads: of the host, all if None.
        progress: told of stage "bench" after each round.

    Raises:
        ConfigError: no iterations, or arguments the pipeline does not take.
    """
    opened = {"bundle": bundle} | ({} if against is None else {"against": against})
    runs = {
        label: _Run(Pipeline(path if isinstance(path, Bundle) else open_bundle(path), backend=backend, threads=threads))
        for label, path in opened.items()
    }
    defaults = runs["bundle"].pipeline.bundle.manifest.defaults
    options: dict[str, Any] = {
        "height": defaults.height if height is None else height,
        "width": defaults.width if width is None else width,
        "num_inference_steps": defaults.num_inference_steps if num_inference_steps is None else num_inference_steps,
        "guidance_scale": defaults.guidance_scale if guidance_scale is None else guidance_scale,
        "num_images": num_images,
    }
    calls = {label: run.call(prompt, options) for label, run in runs.items()}
    seconds = interleaved(calls, iterations, warmup, progress)
    comparisons = {}
    if against is not None:
        comparisons["end_to_end"] = compare("bundle", seconds["bundle"], "against", seconds["against"])
        comparisons |= _compare_components(runs, iterations)
    return BenchReport(
        candidates={label: run.candidate(seconds[label], iterations, num_images) for label, run in runs.items()},
        comparisons=comparisons,
        backend=backend,
        threads=threads,
        iterations=iterations,
        warmup=warmup,
        host_peak_bytes=host_peak_bytes(),
        machine=machine(backend),
        **options,
    )


class _Run:
    """A pipeline, and the seconds its components took in each call."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.rounds: list[dict[str, list[float]]] = []
        pipeline.networks.observer = self._observe

    def call(self, prompt: str, options: Mapping[str, Any]) -> Callable[[], object]:
        def draw() -> object:
            self.rounds.append({})
            return self.pipeline(prompt, **options)

        return draw

    def _observe(self, component: str, seconds: float) -> None:
        self.rounds[-1].setdefault(component, []).append(seconds)

    def components(self, iterations: int) -> dict[str, list[list[float]]]:
        """Seconds of each run of a component, by round that counts."""
        counted = self.rounds[-iterations:]
        return {name: [round_[name] for round_ in counted] for name in counted[0]}

    def candidate(self, seconds: Sequence[float], iterations: int, num_images: int) -> Candidate:
        networks, bundle = self.pipeline.networks, self.pipeline.bundle
        end_to_end = latency(seconds)
        return Candidate(
            path=str(bundle.root),
            sparsity=bundle.manifest.sparsity,
            images_per_second=num_images / (end_to_end.p50_ms / 1000),
            end_to_end=end_to_end,
            components={
                name: latency([second for round_ in rounds for second in round_])
                for name, rounds in self.components(iterations).items()
            },
            load_ms={name: took * 1000 for name, took in networks.load_seconds.items()},
            bundle_bytes=bundle.total_bytes(),
            devices={name: networks.session(name).device for name in networks.load_seconds},
        )


def _compare_components(runs: Mapping[str, _Run], iterations: int) -> dict[str, Comparison]:
    """A component's time in a round is the sum of its runs."""
    mine, theirs = (runs[label].components(iterations) for label in ("bundle", "against"))
    return {
        name: compare("bundle", [sum(r) for r in mine[name]], "against", [sum(r) for r in theirs[name]])
        for name in mine
        if name in theirs
    }


def table(report: BenchReport) -> str:
    """The report as text for a terminal."""
    guidance = f"guidance {report.guidance_scale:g}"
    lines = [
        f"{report.height}x{report.width}, {report.num_inference_steps} steps, {guidance}, batch {report.num_images}; "
        f"{report.iterations} rounds after {report.warmup} of warm-up",
        f"{report.machine.cpu}, {report.threads or report.machine.logical_cores} threads; "
        + ", ".join(f"{name} {version}" for name, version in report.machine.versions.items()),
    ]
    width = max(len(name) for candidate in report.candidates.values() for name in ("end to end", *candidate.components))
    for label, candidate in report.candidates.items():
        lines += [
            "",
            f"{label}: {candidate.path} ({candidate.sparsity}, {candidate.bundle_bytes / 1e6:.1f} MB), "
            f"{candidate.images_per_second:.2f} images/s",
            f"  {'':{width}}  {'runs':>6}" + "".join(f"{name:>10}" for name in _COLUMNS),
        ]
        rows = {"end to end": candidate.end_to_end, **candidate.components}
        lines += [f"  {name:{width}}  {_row(found)}" for name, found in rows.items()]
    if report.comparisons:
        lines.append("")
        lines += [f"{name.replace('_', ' ')}: {found.verdict}" for name, found in report.comparisons.items()]
    if report.host_peak_bytes is not None:
        lines += ["", f"peak memory of the process: {report.host_peak_bytes / 2**20:.0f} MiB"]
    return "\n".join(lines)


_COLUMNS: Final = ("p50 ms", "p90 ms", "p99 ms", "min ms", "mean ms")


def _row(found: Latency) -> str:
    values = (found.p50_ms, found.p90_ms, found.p99_ms, found.min_ms, found.mean_ms)
    return f"{found.count:>6}" + "".join(f"{value:>10.2f}" for value in values)
