"""Are sparse kernels worth it here: engines built with and without the flag, timed by turns; the faster one is shipped.

Three variants: "sparse" and "pruned" hold the same weights, built with and without the sparse flag, so that they differ
by kernels alone; "dense" is the model before pruning. Which tactics a builder picks changes from build to build, so
each variant is built several times. Each pass times one build of every variant, interleaved. Then the fastest build
with the flag meets the fastest without it in a pass of their own, which decides: they were not picked by it.

Where no weight is 2:4 the flag changes nothing, and "pruned" meets "dense" alone: what a cut gains.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

import numpy as np

from obsdiff_export.decision import Decision, against_dense, between_builds, decide, not_measured, spread
from obsdiff_export.proof.judging import IGNORES
from obsdiff_runtime.backends.trt import RTX, TENSORRT
from obsdiff_runtime.decoding import encode
from obsdiff_runtime.errors import ConfigError, ObsdiffError
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.timing import LEAST, Comparison, compare, interleaved

Variant = Literal["sparse", "pruned", "dense"]

VARIANTS: Final[tuple[Variant, ...]] = ("sparse", "pruned", "dense")
"""In the order they are built in: a short budget is spent on the two that the decision is about."""

BUILDS: Final = 3
ROUNDS: Final = 40
WARMUP: Final = 10

_BACKENDS: Final = {backend.package: backend for backend in (TENSORRT, RTX)}


class Built(Protocol):
    """What is built: `build.Engine`, or anything else with a key."""

    @property
    def key(self) -> str: ...


class Plan(Built, Protocol):
    """An engine in a file of its own."""

    @property
    def path(self) -> Path: ...


E = TypeVar("E", bound=Built)
P = TypeVar("P", bound=Plan)

BuildEngine = Callable[[Variant, int], E]
"""(variant, repeat) -> engine. Repeats of a variant are builds of the same. Raises an ObsdiffError where it cannot."""

TimeEngines = Callable[[Mapping[str, E]], Mapping[str, Sequence[float]]]
"""Engines by name -> seconds by name, as many of each; value i of every name is from round i, in which each ran once.
Raises an ObsdiffError where an engine cannot run."""


@dataclass(frozen=True, kw_only=True)
class Build(Generic[E]):
    """One build.

    Attributes:
        seconds: it took to build.
        p50_ms: median time of a run in its pass; None where it was not timed.
    """

    variant: Variant
    repeat: int
    engine: E
    seconds: float
    p50_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A build that was refused or crashed."""

    variant: Variant
    repeat: int
    message: str


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A variant over its timed builds.

    Attributes:
        p50_ms: median over the builds of the median time of a run.
        spread: largest less smallest of those medians, as a fraction of their median; None for one build.
    """

    builds: int
    p50_ms: float
    spread: float | None


@dataclass(frozen=True, kw_only=True)
class Versus(Generic[E]):
    """What was built, timed and decided.

    Attributes:
        shipped: the engine to serve with.
        variant: of it: "sparse" or "pruned".
        decision: why this one.
        builds: in the order they were made.
        failures: builds that gave no engine.
        spreads: by variant, of those that were timed.
        against_dense: of every pass, the other variants against "dense"; empty where that was not built.
    """

    shipped: E
    variant: Variant
    decision: Decision
    builds: tuple[Build[E], ...]
    failures: tuple[Failure, ...]
    spreads: Mapping[Variant, Spread]
    against_dense: tuple[Comparison, ...]

    def others(self) -> tuple[E, ...]:
        """Engines that are not shipped: their files may be deleted."""
        kept = self.shipped.key
        return tuple({build.engine.key: build.engine for build in self.builds if build.engine.key != kept}.values())

    def to_json(self) -> dict[str, Any]:
        """For the receipt and the manifest's `measurements`; engines by key."""
        data: dict[str, Any] = encode(replace(self, builds=()))
        data["shipped"] = self.shipped.key
        data["builds"] = [{**vars(build), "engine": build.engine.key} for build in self.builds]
        return data


def compare_engines(
    build: BuildEngine[E],
    timing: TimeEngines[E] | str,
    *,
    variants: Sequence[Variant] = VARIANTS,
    builds: int = BUILDS,
    budget_seconds: float | None = None,
    floor: float = LEAST,
    now: Callable[[], float] = time.monotonic,
    progress: Progress = silent,
) -> Versus[E]:
    """Builds the variants in turn, times them, and says which engine to ship.

    Args:
        build: makes an engine.
        timing: times engines by turns, `timed_by` say; or why nothing can be timed here: then the engine with the flag
            is built alone and shipped unmeasured.
        variants: "sparse", "pruned", and "dense" where that model is at hand; or "pruned" and "dense".
        builds: of each variant.
        budget_seconds: no build is begun that would end later, if it takes as long as the longest so far; the first is
            always made. None: no limit.
        floor: the smallest gain that counts, as a fraction.
        now: a clock, in seconds.
        progress: told of stage "compare" build by build.

    Raises:
        ConfigError: a variant that the decision needs is absent, or no build is asked for.
        ObsdiffError: no engine could be built at all; the error of the first.
    """
    if not set(_pair(variants)) <= set(variants) or builds < 1:
        raise ConfigError(f"two variants are to be compared, {builds} builds of {', '.join(variants)} cannot be")
    contest = _Contest(build, timing, variants, builds, budget_seconds, now, progress)
    for repeat in range(builds):
        if not contest.play(repeat):
            break
    return contest.result(floor)


def timed_by(
    open_run: Callable[[E], AbstractContextManager[Callable[[], object]]],
    *,
    rounds: int = ROUNDS,
    warmup: int = WARMUP,
    progress: Progress = silent,
) -> TimeEngines[E]:
    """Times engines on this machine, all of them loaded at once.

    Args:
        open_run: loads an engine and gives what runs it once and returns when it is done; unloads on exit.
        rounds: that count.
        warmup: rounds before that do not.
        progress: told of stage "bench".
    """

    def run_all(engines: Mapping[str, E]) -> Mapping[str, Sequence[float]]:
        with ExitStack() as stack:
            runs = {name: stack.enter_context(open_run(engine)) for name, engine in engines.items()}
            return interleaved(runs, rounds, warmup, progress)

    return run_all


def timing_here(
    backend: str,
    inputs: Mapping[str, np.ndarray[Any, Any]],
    *,
    rounds: int = ROUNDS,
    warmup: int = WARMUP,
    progress: Progress = silent,
) -> TimeEngines[P] | str:
    """What times plans on this GPU, as `compare_engines` wants it; or why there is nothing to time.

    A run computes from inputs that lie on the GPU already: nothing is copied.

    Args:
        backend: the builder's name.
        inputs: of one call at the served size, by name.
        rounds: that count.
        warmup: rounds before that do not.
        progress: told of stage "bench".
    """
    if backend in IGNORES:
        return IGNORES[backend]
    if backend not in _BACKENDS:
        return f"engines of {backend} are not timed here, those of {', '.join(_BACKENDS)} are"
    runtime = _BACKENDS[backend]
    obstacle = runtime.obstacle()
    if obstacle:
        return obstacle

    @contextmanager
    def open_run(engine: P) -> Iterator[Callable[[], object]]:
        session = runtime.open_plan(engine.path)
        try:
            session.run(inputs)
            yield session.rerun
        finally:
            session.close()

    return timed_by(open_run, rounds=rounds, warmup=warmup, progress=progress)


class _Contest(Generic[E]):
    """What has been built and timed so far."""

    def __init__(
        self,
        build: BuildEngine[E],
        timing: TimeEngines[E] | str,
        variants: Sequence[Variant],
        builds: int,
        budget_seconds: float | None,
        now: Callable[[], float],
        progress: Progress,
    ) -> None:
        self._build, self._timing, self._now, self._progress = build, timing, now, progress
        self._variants = [name for name in VARIANTS if name in variants]
        self._pair = _pair(variants)
        self._total = len(self._variants) * builds
        self._budget_seconds, self._started = budget_seconds, now()
        self._builds: list[Build[E]] = []
        self._errors: list[tuple[Failure, ObsdiffError]] = []
        self._passes: list[Mapping[str, Sequence[float]]] = []
        self._longest_seconds = self._round_seconds = 0.0
        self._obstacle = timing if isinstance(timing, str) else ""

    def play(self, repeat: int) -> bool:
        """One build of every variant and their pass; False where another would tell nothing more."""
        if repeat and not self._affordable(self._round_seconds):
            return False
        started, made = self._now(), dict[str, E]()
        for variant in list(self._variants):
            if self._builds and (self._obstacle or not (repeat or self._affordable(self._longest_seconds))):
                break
            if variant == "dense" and not set(self._pair) - {"dense"} <= made.keys():
                break
            if (engine := self._make(variant, repeat)) is not None:
                made[variant] = engine
        self._round_seconds = self._now() - started
        if not set(self._pair) <= made.keys():
            return False
        seconds = self._time(made)
        if seconds is not None:
            self._passes.append(seconds)
            self._builds = [_timed(build, seconds) if build.repeat == repeat else build for build in self._builds]
        return seconds is not None

    def result(self, floor: float) -> Versus[E]:
        """Raises the first build's error where there is nothing to ship."""
        if not any(build.variant != "dense" for build in self._builds):
            raise self._errors[0][1]
        decision = self._decide(floor)
        variant: Variant = "sparse" if decision.sparse else "pruned"
        shipped = self._fastest(variant)
        return Versus(
            shipped=shipped.engine,
            variant=variant,
            decision=decision,
            builds=tuple(self._builds),
            failures=tuple(failure for failure, _ in self._errors),
            spreads={name: found for name in self._variants if (found := self._spread(name)) is not None},
            against_dense=tuple(
                compare(name, found[name], "dense", found["dense"])
                for found in self._passes
                if "dense" in found
                for name in ("sparse", "pruned")
                if name in found
            ),
        )

    def _affordable(self, seconds: float) -> bool:
        spent = self._now() - self._started
        return self._budget_seconds is None or spent + seconds <= self._budget_seconds

    def _make(self, variant: Variant, repeat: int) -> E | None:
        """An engine, None where the builder refused; then this variant is built no more."""
        self._progress("compare", len(self._builds), self._total, f"{variant}, build {repeat + 1}")
        started = self._now()
        try:
            engine = self._build(variant, repeat)
        except ObsdiffError as error:
            self._errors.append((Failure(variant=variant, repeat=repeat, message=str(error)), error))
            self._variants.remove(variant)
            return None
        seconds = self._now() - started
        self._longest_seconds = max(self._longest_seconds, seconds)
        self._builds.append(Build(variant=variant, repeat=repeat, engine=engine, seconds=seconds))
        return engine

    def _time(self, engines: Mapping[str, E]) -> Mapping[str, Sequence[float]] | None:
        """Seconds by variant, None where they cannot run."""
        if isinstance(self._timing, str):
            return None
        try:
            return self._timing(engines)
        except ObsdiffError as error:
            self._obstacle = str(error)
            return None

    def _decide(self, floor: float) -> Decision:
        have = {build.variant for build in self._builds}
        if not self._passes:
            return not_measured(self._reason(), sparse="sparse" in have, floor=floor)
        seconds: Mapping[str, Sequence[float]] | None = self._passes[0]
        if len(self._passes) > 1:
            seconds = self._time({name: self._fastest(name).engine for name in self._pair})
        if seconds is None:
            return not_measured(self._obstacle, sparse="sparse" in have, floor=floor)
        first, second = self._pair
        found = compare(first, seconds[first], second, seconds[second])
        judge = decide if first == "sparse" else against_dense
        return judge(found, noise=between_builds(self._passes), floor=floor)

    def _reason(self) -> str:
        """Why there is no pass."""
        if self._obstacle:
            return self._obstacle
        failed = [failure for failure, _ in self._errors if failure.variant in self._pair]
        if failed:
            which = {
                "sparse": "with the sparse flag",
                "pruned": "without the sparse flag",
                "dense": "of the dense model",
            }
            return f"the build {which[failed[0].variant]} failed: {failed[0].message}"
        spent = self._now() - self._started
        return f"one build took {spent:.0f} s, the time for all is {self._budget_seconds:.0f} s"

    def _fastest(self, variant: Variant) -> Build[E]:
        """Of the timed builds; the first where none is."""
        own = [build for build in self._builds if build.variant == variant]
        return min(own, key=lambda build: float("inf") if build.p50_ms is None else build.p50_ms)

    def _spread(self, variant: Variant) -> Spread | None:
        found = [b.p50_ms for b in self._builds if b.variant == variant and b.p50_ms is not None]
        if not found:
            return None
        return Spread(builds=len(found), p50_ms=statistics.median(found), spread=spread(found))


def _pair(variants: Sequence[Variant]) -> tuple[Variant, Variant]:
    """What the decision is about: the second is what the first is compared with."""
    return ("sparse", "pruned") if "sparse" in variants else ("pruned", "dense")


def _timed(build: Build[E], seconds: Mapping[str, Sequence[float]]) -> Build[E]:
    return replace(build, p50_ms=statistics.median(seconds[build.variant]) * 1000)
