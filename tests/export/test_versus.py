"""The A/B of engines, on a simulated GPU: builds that differ, a clock that drifts, noise of known size."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from obsdiff_export.decision import between_builds, decide
from obsdiff_export.versus import TimeEngines, Variant, Versus, compare_engines, timed_by, timing_here
from obsdiff_runtime.backends.trt import TENSORRT
from obsdiff_runtime.errors import BuildError, CompatibilityError, ConfigError, ObsdiffError
from obsdiff_runtime.timing import Comparison


@dataclass(frozen=True)
class Plan:
    key: str
    seconds: float
    path: Path = Path("a.plan")


@dataclass
class Gpu:
    """Builds take a while, and what they give runs for a time that differs from build to build.

    effect: how much faster the sparse flag makes a run; build_noise, run_noise: relative standard deviations;
    drift: how much slower the GPU is from one pass to the next.
    """

    effect: float = 0.0
    dense_effect: float = 0.0
    build_noise: float = 0.005
    run_noise: float = 0.02
    drift: float = 0.0
    build_seconds: float = 60.0
    seed: int = 0
    now: float = 0.0
    built: list[tuple[str, int]] = field(default_factory=list)
    passes: list[tuple[str, ...]] = field(default_factory=list)
    refuse: dict[tuple[str, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def clock(self) -> float:
        return self.now

    def build(self, variant: Variant, repeat: int) -> Plan:
        self.now += self.build_seconds
        if (variant, repeat) in self.refuse:
            raise BuildError(self.refuse[variant, repeat])
        self.built.append((variant, repeat))
        gain = {"sparse": self.effect, "pruned": 0.0, "dense": self.dense_effect}[variant]
        noise = self.random.normal(1, self.build_noise)
        return Plan(key=f"{variant}-{repeat}", seconds=0.05 / (1 + gain) * noise)

    def time(self, plans: Mapping[str, Plan]) -> dict[str, list[float]]:
        slow = 1 + self.drift * len(self.passes)
        self.passes.append(tuple(plan.key for plan in plans.values()))
        return {
            name: list(plan.seconds * slow * self.random.normal(1, self.run_noise, 40)) for name, plan in plans.items()
        }

    def contest(self, timing: TimeEngines[Plan] | str | None = None, **options: object) -> Versus[Plan]:
        return compare_engines(self.build, timing or self.time, now=self.clock, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("effect", "outcome"), [(0.0, "no different"), (0.02, "no different"), (0.10, "faster"), (-0.08, "slower")]
)
def test_the_faster_engine_is_shipped_and_noise_is_called_noise(effect: float, outcome: str, seed: int) -> None:
    found = Gpu(effect=effect, seed=seed).contest()
    assert found.decision.outcome == outcome
    assert found.variant == ("sparse" if effect == 0.10 else "pruned")
    assert found.shipped.key.startswith(found.variant)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("slower", "outcome", "words"),
    [
        (0.0, "no different", "against the dense model"),
        (-0.25, "faster", r"^1\.3\dx against the dense model"),
        (0.10, "slower", "against the dense model"),
    ],
)
def test_what_a_cut_gains_is_told_and_the_cut_model_shipped(slower: float, outcome: str, words: str, seed: int) -> None:
    gpu = Gpu(dense_effect=slower, seed=seed)
    found = gpu.contest(variants=("pruned", "dense"))
    assert (found.decision.outcome, found.variant, found.decision.sparse) == (outcome, "pruned", False)
    assert re.search(words, found.decision.why)
    assert found.decision.why.endswith("no weight is 2:4, and the sparse flag would change nothing")
    assert {variant for variant, _ in gpu.built} == {"pruned", "dense"}
    assert len(found.against_dense) == 3
    assert json.dumps(found.to_json())


def test_a_cut_model_is_shipped_where_the_dense_one_cannot_be_built() -> None:
    found = Gpu(refuse={("dense", 0): "no"}).contest(variants=("pruned", "dense"))
    assert (found.variant, found.decision.outcome) == ("pruned", "not measured")
    assert found.decision.why.startswith("not measured: the build of the dense model failed: no; the engine without")


def test_a_gpu_that_warms_up_between_passes_changes_nothing() -> None:
    for effect, variant in ((0.0, "pruned"), (0.10, "sparse")):
        found = Gpu(effect=effect, drift=0.2).contest()
        assert found.variant == variant
        assert found.decision.noise is not None
        assert found.decision.noise < 0.03, "the drift is not taken for noise between builds"


def test_a_gain_that_builds_differ_by_anyway_is_no_gain() -> None:
    comparison = Comparison(name="sparse", against="pruned", rounds=40, speedup=1.05, low=1.04, high=1.06, verdict="")
    found = decide(comparison, noise=0.08)
    assert (found.outcome, found.sparse) == ("no different", False)
    assert "within the 8% that counts as noise between builds" in found.why
    assert decide(comparison, noise=0.01).outcome == "faster"


def test_a_pass_of_its_own_decides_between_the_fastest_builds() -> None:
    gpu = Gpu(effect=0.1)
    found = gpu.contest()
    assert len(gpu.passes) == 4
    fastest = {
        name: min((build for build in found.builds if build.variant == name), key=lambda build: build.p50_ms or 0)
        for name in ("sparse", "pruned")
    }
    assert gpu.passes[-1] == (fastest["sparse"].engine.key, fastest["pruned"].engine.key)
    assert found.shipped.key == fastest["sparse"].engine.key
    assert {plan.key for plan in found.others()} == {b.engine.key for b in found.builds} - {found.shipped.key}
    assert len(found.others()) == 8


def test_spreads_are_of_builds_and_the_dense_model_is_compared_too() -> None:
    found = Gpu(effect=0.1, dense_effect=-0.3).contest()
    assert [found.spreads[name].builds for name in ("sparse", "pruned", "dense")] == [3, 3, 3]
    times = [build.p50_ms for build in found.builds if build.variant == "pruned"]
    assert found.spreads["pruned"].p50_ms == pytest.approx(np.median(times))
    assert found.spreads["pruned"].spread == pytest.approx(np.ptp(times) / np.median(times))
    assert [entry.name for entry in found.against_dense] == ["sparse", "pruned"] * 3
    assert [entry.speedup for entry in found.against_dense][::2] == pytest.approx([1.1 / 0.7] * 3, rel=0.03)


def test_a_budget_that_one_build_uses_up_ships_what_was_asked_for_unmeasured() -> None:
    gpu = Gpu(build_seconds=400)
    found = gpu.contest(budget_seconds=600)
    assert gpu.built == [("sparse", 0)]
    assert found.variant == "sparse"
    assert found.decision.outcome == "not measured"
    assert found.decision.why == (
        "not measured: one build took 400 s, the time for all is 600 s; the engine with the sparse flag is shipped"
    )


def test_a_budget_of_one_build_each_decides_by_one_pass() -> None:
    gpu = Gpu(effect=0.1)
    found = gpu.contest(budget_seconds=200)
    assert gpu.built == [("sparse", 0), ("pruned", 0), ("dense", 0)]
    assert len(gpu.passes) == 1
    assert (found.variant, found.decision.noise) == ("sparse", None)
    assert "between builds unknown" in found.decision.why


def test_a_budget_without_the_dense_model_still_compares_the_flag() -> None:
    found = Gpu(effect=0.1).contest(budget_seconds=125)
    assert [build.variant for build in found.builds] == ["sparse", "pruned"]
    assert (found.decision.outcome, found.against_dense) == ("faster", ())


def test_without_a_gpu_the_flagged_engine_is_built_once_and_shipped_unmeasured() -> None:
    gpu = Gpu()
    found = gpu.contest("no NVIDIA GPU is visible")
    assert gpu.built == [("sparse", 0)]
    assert found.decision.why.startswith("not measured: no NVIDIA GPU is visible;")
    assert found.variant == "sparse"


def test_an_engine_that_does_not_run_ends_the_contest() -> None:
    def fails(plans: Mapping[str, Plan]) -> dict[str, list[float]]:
        raise CompatibilityError("sparse-0.plan was built for 8.6")

    gpu = Gpu()
    found = gpu.contest(fails)
    assert gpu.built == [("sparse", 0), ("pruned", 0), ("dense", 0)]
    assert found.decision.why.startswith("not measured: sparse-0.plan was built for 8.6;")


@pytest.mark.parametrize(
    ("refused", "shipped", "why"),
    [
        ("sparse", "pruned", "the build with the sparse flag failed: no; the engine without"),
        ("pruned", "sparse", "the build without the sparse flag failed: no; the engine with"),
    ],
)
def test_a_build_that_fails_leaves_the_other_to_be_shipped(refused: str, shipped: str, why: str) -> None:
    found = Gpu(refuse={(refused, 0): "no"}).contest()
    assert found.variant == shipped
    assert why in found.decision.why
    assert [(failure.variant, failure.repeat, failure.message) for failure in found.failures] == [(refused, 0, "no")]


def test_a_later_build_that_fails_leaves_the_earlier_passes() -> None:
    gpu = Gpu(effect=0.1, refuse={("pruned", 1): "killed"})
    found = gpu.contest()
    assert (found.variant, found.decision.outcome, len(found.failures)) == ("sparse", "faster", 1)
    assert found.shipped.key == "sparse-0", "the second build was never timed"


def test_a_dense_model_that_cannot_be_built_is_left_out() -> None:
    found = Gpu(effect=0.1, refuse={("dense", 0): "too large"}).contest()
    assert (found.variant, found.against_dense, len(found.builds)) == ("sparse", (), 6)


def test_where_nothing_builds_the_first_error_is_raised() -> None:
    with pytest.raises(BuildError, match="first"):
        Gpu(refuse={("sparse", 0): "first", ("pruned", 0): "second"}).contest()


def test_a_bug_in_a_build_is_no_refusal() -> None:
    def build(variant: Variant, repeat: int) -> Plan:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compare_engines(build, "no GPU")


def test_the_decision_needs_both_variants() -> None:
    with pytest.raises(ConfigError, match="two variants are to be compared"):
        Gpu().contest(variants=("sparse", "dense"))


def test_too_few_rounds_decide_nothing() -> None:
    comparison = Comparison(name="sparse", against="pruned", rounds=3, speedup=2, low=None, high=None, verdict="")
    found = decide(comparison, noise=0.0)
    assert (found.outcome, found.sparse) == ("not measured", True)
    assert "3 rounds are too few" in found.why


def test_noise_between_builds_needs_two() -> None:
    assert between_builds([{"pruned": [1.0], "dense": [2.0]}]) is None
    assert between_builds([{"pruned": [1.0]}, {"pruned": [1.1]}]) == pytest.approx(0.1 / 1.05)
    assert between_builds([{"pruned": [1.0], "dense": [2.0]}, {"pruned": [2.0], "dense": [4.0]}]) == 0


def test_the_result_is_json() -> None:
    data = json.loads(json.dumps(Gpu(effect=0.1, refuse={("dense", 1): "no"}).contest().to_json(), allow_nan=False))
    assert data["shipped"].startswith("sparse-")
    assert data["decision"]["outcome"] == "faster"
    assert data["builds"][0]["engine"] == "sparse-0"
    assert data["failures"] == [{"variant": "dense", "repeat": 1, "message": "no"}]
    assert data["spreads"]["sparse"]["builds"] == 3


def test_engines_are_loaded_together_timed_by_turns_and_unloaded() -> None:
    events: list[str] = []

    @contextmanager
    def open_run(plan: Plan) -> Iterator[Callable[[], object]]:
        events.append(f"load {plan.key}")
        yield lambda: events.append(plan.key)
        events.append(f"unload {plan.key}")

    plans = {"sparse": Plan("s", 1), "pruned": Plan("p", 1)}
    seconds = timed_by(open_run, rounds=3, warmup=1)(plans)
    assert {name: len(values) for name, values in seconds.items()} == {"sparse": 3, "pruned": 3}
    assert " ".join(events) == "load s load p p s s p p s s p unload p unload s"


def test_engines_are_unloaded_where_one_does_not_load() -> None:
    events: list[str] = []

    @contextmanager
    def open_run(plan: Plan) -> Iterator[Callable[[], object]]:
        if plan.key == "p":
            raise ObsdiffError("no memory")
        try:
            yield lambda: None
        finally:
            events.append("unloaded")

    with pytest.raises(ObsdiffError, match="no memory"):
        timed_by(open_run)({"sparse": Plan("s", 1), "pruned": Plan("p", 1)})
    assert events == ["unloaded"]


def test_a_builder_that_ignores_the_flag_needs_no_timing() -> None:
    assert "ignores" in str(timing_here("tensorrt_rtx", {}))
    assert "engines of openvino are not timed here, those of tensorrt" in str(timing_here("openvino", {}))


def test_plans_are_timed_without_copies_and_unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Session:
        def run(self, inputs: Mapping[str, np.ndarray]) -> None:
            events.append(f"run with {list(inputs)}")

        def rerun(self) -> None:
            events.append("rerun")

        def close(self) -> None:
            events.append("close")

    monkeypatch.setattr(TENSORRT, "obstacle", lambda: "no GPU")
    assert timing_here("tensorrt", {}) == "no GPU"
    monkeypatch.setattr(TENSORRT, "obstacle", lambda: "")
    monkeypatch.setattr(TENSORRT, "open_plan", lambda path: events.append(f"open {path}") or Session())
    timing = timing_here("tensorrt", {"x": np.zeros(1)}, rounds=2, warmup=0)
    assert not isinstance(timing, str)
    assert list(timing({"sparse": Plan("s", 1)})) == ["sparse"]
    assert events == ["open a.plan", "run with ['x']", "rerun", "rerun", "close"]
