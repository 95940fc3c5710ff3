import itertools
import json
from collections.abc import Iterator

import numpy as np
import pytest

from obsdiff_runtime import timing
from obsdiff_runtime.decoding import encode
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.timing import compare, interleaved, latency, time_interleaved


class Clock:
    """A clock that moves only when work is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def work(self, name: str, seconds: Iterator[float]) -> object:
        def run() -> None:
            self.calls.append(name)
            self.now += next(seconds)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_rounds_alternate_and_the_warm_up_is_left_out(clock: Clock) -> None:
    work = {
        "a": clock.work("a", iter([9.0, 1.0, 2.0, 3.0])),
        "b": clock.work("b", iter([9.0, 4.0, 5.0, 6.0])),
    }
    assert interleaved(work, 3, 1, lambda *_: None) == {"a": [1, 2, 3], "b": [4, 5, 6]}
    assert "".join(clock.calls) == "baabbaab"


def test_latency_is_numpy_s_percentiles_in_milliseconds() -> None:
    seconds = np.random.default_rng(0).gamma(2, 0.01, 200)
    found = latency(list(seconds))
    assert found.count == 200
    percentiles = [found.p50_ms, found.p90_ms, found.p95_ms, found.p99_ms]
    assert percentiles == pytest.approx(np.percentile(seconds, [50, 90, 95, 99]) * 1000)
    ends = (found.min_ms, found.mean_ms, found.max_ms)
    assert ends == pytest.approx((seconds.min() * 1000, seconds.mean() * 1000, seconds.max() * 1000))


def test_latency_s_intervals_enclose_its_percentiles_and_are_open_where_rounds_are_few() -> None:
    found = latency(list(np.random.default_rng(0).gamma(2, 0.01, 200)))
    assert found.p50_interval_ms.low < found.p50_ms < found.p50_interval_ms.high  # type: ignore[operator]
    assert found.p90_interval_ms.low < found.p90_ms < found.p90_interval_ms.high  # type: ignore[operator]
    assert found.p99_interval_ms.high is None  # 368 rounds are needed
    assert latency([1.0] * 100, rounds=5).p50_interval_ms.high is None  # 20 runs in each of 5 rounds


def test_the_same_thing_twice_is_no_difference(clock: Clock) -> None:
    draw = np.random.default_rng(0).normal(1, 0.05, (2, 40))
    found = time_interleaved(
        {"dense": clock.work("dense", iter(draw[0])), "same": clock.work("same", iter(draw[1]))}, 38, 2
    )
    (comparison,) = found.comparisons
    assert "no difference beyond noise" in comparison.verdict
    assert comparison.low < 1 < comparison.high  # type: ignore[operator]


def test_a_difference_no_larger_than_between_two_loads_of_a_network_is_none() -> None:
    """Also one that is certain: of two sessions of one graph, the one opened later is 2 % faster."""
    for share, outcome in ((1.02, "no different"), (0.98, "no different"), (1.04, "faster"), (0.96, "slower")):
        found = compare("later", [1.0] * 40, "first", [share] * 40)
        assert found.low == found.high == share
        assert found.outcome == outcome
        assert ("no difference beyond noise" in found.verdict) == (outcome == "no different")


def test_a_real_difference_is_stated_with_its_interval() -> None:
    draw = np.random.default_rng(0).normal(1, 0.05, (2, 40))
    found = compare("pruned", list(draw[0]), "dense", list(1.5 * draw[1]))
    assert found.verdict.startswith("pruned is faster than dense: 1.5")
    assert found.low is not None
    assert 1.4 < found.low < found.speedup < found.high < 1.6  # type: ignore[operator]
    assert compare("dense", list(1.5 * draw[1]), "pruned", list(draw[0])).verdict.startswith("dense is slower")


def test_a_machine_that_slows_down_does_not_make_one_faster(clock: Clock) -> None:
    drift = 1 + np.arange(40) / 10
    noise = np.random.default_rng(0).normal(1, 0.01, (2, 40))
    found = compare("b", list(drift * noise[0]), "a", list(drift * noise[1]))
    assert "no difference" in found.verdict


@pytest.mark.parametrize("count", [1, 5])
def test_too_few_rounds_are_told_from_noise_by_nobody(count: int) -> None:
    found = compare("b", [1.0] * count, "a", [2.0] * count)
    assert found.low is None
    assert "too few rounds" in found.verdict


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    hits = [
        (found := compare("b", [1.0] * 15, "a", list(np.exp(draw.standard_normal(15))))).low is not None
        and found.high is not None
        and found.low <= 1 <= found.high
        for _ in range(400)
    ]
    assert 0.93 < np.mean(hits) <= 1  # 95 %, and the binomial's steps only make it more


def test_nothing_to_time_and_no_rounds_are_errors() -> None:
    with pytest.raises(ConfigError, match="nothing to time"):
        time_interleaved({}, 3)
    with pytest.raises(ConfigError, match="iterations should be at least 1"):
        time_interleaved({"a": lambda: None}, 0)


def test_timings_are_json() -> None:
    counter = itertools.count()
    found = time_interleaved({"a": lambda: next(counter), "b": lambda: next(counter)}, 7, 0)
    data = json.loads(json.dumps(encode(found)))
    assert set(data["latencies"]) == {"a", "b"}
    assert data["comparisons"][0]["against"] == "a"
    assert next(counter) == 14
