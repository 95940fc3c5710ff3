"""A benchmark's report as text, in at most 100 columns and in trtexec's words."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Final, TypeVar

from obsdiff_runtime.benchmark.report import END_TO_END, BenchReport, Candidate, Conditions
from obsdiff_runtime.quantiles import Interval
from obsdiff_runtime.timing import Comparison, Latency

T = TypeVar("T")

COLUMNS: Final = 100
SIDE_BY_SIDE: Final = 3
"""Candidates in one block of the summary."""

_PART, _LETTER, _RUNS, _PLAIN, _SURE, _CELL, _WORD = 14, 2, 6, 7, 21, 23, 28
"""Widths of columns."""


def table(report: BenchReport) -> str:
    """The report as text for a terminal."""
    letters = {name: letter(index) for index, name in enumerate(report.candidates)}
    blocks = [
        [*_asked(report), *_where(report)],
        [line for name, found in report.candidates.items() for line in _subject(letters[name], name, found)],
        list(_latencies(report, letters)),
        *(list(_summary(block, letters)) for block in _blocks(report.candidates)),
        *(list(_speedups(block, report.baseline, letters)) for block in _blocks(report.comparisons)),
        [line for found in report.comparisons.values() for line in _wrapped(found[END_TO_END].verdict)],
        [line for note in report.notes for line in _wrapped(f"note: {note}")],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def conditions_in_words(conditions: Conditions) -> Iterator[str]:
    """A line each."""
    load, others = conditions.load_average, conditions.others_cores
    said = [f"{conditions.cores} cores"]
    said += [] if load is None else [f"load average {load:.1f} before"]
    said += [] if others is None else [f"other programs kept {others:.1f} cores during the rounds"]
    clock, fastest = conditions.cpu_after.mhz, conditions.cpu_after.max_mhz
    said += [] if clock is None else [f"CPU clock {clock:.0f}" + (f" of {fastest:.0f} MHz" if fastest else " MHz")]
    yield "; ".join(said)
    for number, state in conditions.gpus.items():
        said = [f"GPU {number}: {state.name}", f"driver {conditions.driver or 'unknown'}"]
        now = state.after
        if now is None:
            said.append("clocks, temperature and power not told (no NVML)")
        else:
            said += [
                f"SM clock {_of(now.sm_mhz, now.sm_max_mhz)} MHz",
                f"memory clock {_of(now.memory_mhz, now.memory_max_mhz)} MHz",
                f"{_told(now.temperature_c)} °C",
                f"{_of(now.power_watts, now.power_limit_watts)} W",
            ]
        yield ", ".join(said)


def figures_in_words(found: Candidate) -> dict[str, str]:
    """The summary of a candidate, by label; what was not measured is said not to be."""
    outside, memory, energy, first = found.outside, found.memory, found.energy, found.time_to_first_step
    return {
        "Throughput, images/s": with_interval(found.images_per_second, found.images_per_second_interval),
        "Time to first step, ms": with_interval(first.p50_ms, first.p50_interval_ms),
        "First image, ms": number(found.first_image_ms),
        "Load, ms": number(sum(found.load_ms.values())),
        "Outside components, ms": f"{number(outside.latency.p50_ms)} ({outside.share:.1%})",
        **{f"  in stage {stage}, ms": number(ms) for stage, ms in outside.stages_ms.items()},
        "PNG encoding, ms": "not measured" if found.png_ms is None else number(found.png_ms),
        "Host memory grew, MiB": _mebibytes(memory.host_growth_bytes),
        "Peak GPU memory, MiB": _mebibytes(memory.device_peak_bytes),
        "Energy, J/image": "not measured" if energy.joules_per_image is None else number(energy.joules_per_image),
    }


def sources_in_words(candidates: Mapping[str, Candidate]) -> Iterator[str]:
    """Who told GPU memory and energy, or why nobody did; a line each, with the candidates it holds for."""
    for what, said in (
        ("GPU memory", {name: found.memory.device_source for name, found in candidates.items()}),
        ("energy", {name: found.energy.source for name, found in candidates.items()}),
    ):
        for source in dict.fromkeys(said.values()):
            holds = [name for name, each in said.items() if each == source]
            who = "" if len(holds) == len(said) else f" of {', '.join(holds)}"
            yield f"{what}{who}: {source}"


def with_interval(value: float, interval: Interval) -> str:
    """12.34 [12.01, ?], an end that nobody knows as ?"""
    ends = ["?" if end is None else number(end) for end in (interval.low, interval.high)]
    return number(value) if ends == ["?", "?"] else f"{number(value)} [{ends[0]}, {ends[1]}]"


def speedup_in_words(found: Comparison) -> str:
    """1.31x [1.25, 1.40] faster"""
    if found.low is None or found.high is None:
        return f"{found.speedup:.2f}x too few rounds"
    word = "noise" if found.outcome == "no different" else found.outcome
    return f"{found.speedup:.2f}x [{found.low:.2f}, {found.high:.2f}] {word}"


def letter(index: int) -> str:
    """A, B, ... Z, A1, B1, ..."""
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[index % 26] + (str(index // 26) if index >= 26 else "")


def number(value: float) -> str:
    """Four significant digits, never an exponent."""
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    return f"{value:.{digits}f}"


def part_in_words(part: str) -> str:
    return part.replace("_", " ") if part == END_TO_END else part


def _asked(report: BenchReport) -> Iterator[str]:
    yield from _wrapped(asked_in_words(report))


def asked_in_words(report: BenchReport) -> str:
    asked = report.request
    return (
        f"{asked.height}x{asked.width}, {asked.num_inference_steps} steps, guidance {asked.guidance_scale:g}, "
        f"{asked.num_images} image{'s' if asked.num_images > 1 else ''} a call; {report.iterations} rounds after "
        f"{report.warmup} of warm-up, by turns"
    )


def _where(report: BenchReport) -> Iterator[str]:
    threads = report.threads or report.conditions.cores
    versions = ", ".join(f"{name} {version}" for name, version in report.machine.versions.items())
    yield from _wrapped(f"{report.machine.cpu}, {threads} thread{'s' if threads > 1 else ''}; {versions}")
    for line in conditions_in_words(report.conditions):
        yield from _wrapped(line)
    if report.host_peak_bytes is not None:
        yield f"peak memory of the process, everything loaded: {report.host_peak_bytes / 2**20:.0f} MiB"


def _subject(letter: str, name: str, found: Candidate) -> Iterator[str]:
    subject = found.subject
    where = "/".join(dict.fromkeys(found.devices.values()))
    facts = f"{subject.sparsity}, {subject.stored_bytes / 1e6:.1f} MB, {found.dtype}, {subject.backend} on {where}"
    if subject.vae_tile is not None:
        facts += f", VAE in tiles of {subject.vae_tile}"
    path = "" if subject.path == name else f"{subject.path}: "
    yield from _wrapped(f"{letter}  {name}: {path}{facts}", indent=3)


def _latencies(report: BenchReport, letters: Mapping[str, str]) -> Iterator[str]:
    sure = "".join(f"{name + ' [95 %]':>{_SURE}}" for name in ("median", "p90", "p99"))
    yield f"{'Latency, ms':<{_PART + _LETTER}}{'runs':>{_RUNS}}{'min':>{_PLAIN}}{'mean':>{_PLAIN}}{sure}"
    rows = {name: {END_TO_END: found.end_to_end, **found.components} for name, found in report.candidates.items()}
    for part in dict.fromkeys(part for found in rows.values() for part in found):
        said = part_in_words(part)[:_PART]
        for name, found in rows.items():
            if part in found:
                yield f"{said:<{_PART}}{letters[name]:>{_LETTER}}{_latency(found[part])}"
                said = ""


def _latency(found: Latency) -> str:
    sure = (
        (found.p50_ms, found.p50_interval_ms),
        (found.p90_ms, found.p90_interval_ms),
        (found.p99_ms, found.p99_interval_ms),
    )
    plain = f"{found.count:>{_RUNS}}{number(found.min_ms):>{_PLAIN}}{number(found.mean_ms):>{_PLAIN}}"
    return plain + "".join(f"{with_interval(value, interval):>{_SURE}}" for value, interval in sure)


def _summary(candidates: Mapping[str, Candidate], letters: Mapping[str, str]) -> Iterator[str]:
    columns = {letters[name]: figures_in_words(found) for name, found in candidates.items()}
    labels = list(dict.fromkeys(label for found in columns.values() for label in found))
    width = max(len(label) for label in labels)
    yield " " * width + "".join(f"{letter:>{_CELL}}" for letter in columns)
    for label in labels:
        yield f"{label:<{width}}" + "".join(f"{found.get(label, ''):>{_CELL}}" for found in columns.values())
    for line in sources_in_words({letters[name]: found for name, found in candidates.items()}):
        yield from _wrapped(line)


def _speedups(
    comparisons: Mapping[str, Mapping[str, Comparison]], baseline: str, letters: Mapping[str, str]
) -> Iterator[str]:
    yield f"Speed-up over {letters[baseline]}, median of the rounds [95 %]"
    yield " " * _PART + "".join(f"{letters[name]:>{_WORD}}" for name in comparisons)
    for part in dict.fromkeys(part for found in comparisons.values() for part in found):
        cells = (speedup_in_words(found[part]) if part in found else "" for found in comparisons.values())
        yield f"{part_in_words(part)[:_PART]:<{_PART}}" + "".join(f"{cell:>{_WORD}}" for cell in cells)


def _blocks(named: Mapping[str, T]) -> Iterator[dict[str, T]]:
    left = iter(named.items())
    while block := dict(islice(left, SIDE_BY_SIDE)):
        yield block


def _mebibytes(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 2**20:.0f}"


def _of(value: float | None, limit: float | None) -> str:
    return _told(value) + ("" if limit is None else f" of {limit:.0f}")


def _told(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f}"


def _wrapped(text: str, indent: int = 2) -> Sequence[str]:
    return textwrap.wrap(text, COLUMNS, subsequent_indent=" " * indent, break_on_hyphens=False)
