"""What has to be known to read a benchmark's figures, in words."""

from collections.abc import Iterator, Mapping

from obsdiff_runtime.benchmark.report import Candidate, Conditions
from obsdiff_runtime.quantiles import rounds_needed

TAKEN_SHARE = 0.05
"""Of the cores that are used: so much of others' work is told."""


def remarks(
    candidates: Mapping[str, Candidate], conditions: Conditions, *, iterations: int, threads: int | None
) -> tuple[str, ...]:
    """One sentence each, without a full stop."""
    used = min(threads or conditions.cores, conditions.cores)
    return (
        *_busy(conditions, used),
        *_few(iterations),
        *_different(candidates),
        *_throttled(conditions),
    )


def _busy(conditions: Conditions, used: int) -> Iterator[str]:
    load, others = conditions.load_average, conditions.others_cores
    if load is not None and load > used:
        yield f"the machine was busy before: load average {load:.1f} for {used} cores in use"
    if others is not None and others > TAKEN_SHARE * used and others + used > conditions.cores:
        yield (
            f"the machine was busy: other programs kept {others:.1f} of {conditions.cores} cores while this one "
            f"wanted {used}; measure again when it is idle"
        )


def _few(iterations: int) -> Iterator[str]:
    missing = [(name, rounds_needed(share)) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))]
    short = [f"{name} {count}" for name, count in missing if count > iterations]
    if short:
        yield f"not enough rounds for both ends of every interval (?): {', '.join(short)} are needed, not {iterations}"


def _different(candidates: Mapping[str, Candidate]) -> Iterator[str]:
    for what, values in (
        ("compute in different types", {name: found.dtype for name, found in candidates.items()}),
        ("run on different devices", {name: _place(found) for name, found in candidates.items()}),
    ):
        if len(set(values.values())) > 1:
            yield f"the candidates {what}: " + ", ".join(f"{name} {value}" for name, value in values.items())


def _place(candidate: Candidate) -> str:
    return "/".join(dict.fromkeys("CPU" if "CPU" in where else where for where in candidate.devices.values()))


def _throttled(conditions: Conditions) -> Iterator[str]:
    for number, state in conditions.gpus.items():
        after = state.after
        if after is None or after.power_watts is None or after.power_limit_watts is None:
            continue
        if after.power_watts > 0.97 * after.power_limit_watts:
            yield (
                f"GPU {number} draws {after.power_watts:.0f} of {after.power_limit_watts:.0f} W that it may: its clock "
                "is held down"
            )
