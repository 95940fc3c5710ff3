"""The benchmark with candidates that take known times, and with real bundles."""

import json
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from obsdiff_runtime.benchmark import bench, table
from obsdiff_runtime.benchmark.report import BenchReport
from obsdiff_runtime.benchmark.runner import DeviceMemory
from obsdiff_runtime.errors import BundleError, CompatibilityError, ConfigError
from obsdiff_runtime.vitals import CpuTime, Sensors

Make = Callable[..., Any]
QUIET = Sensors(gpu=lambda index: None, resident_bytes=lambda: None, cpu_time=lambda: None, load_average=lambda: 0.0)


def noisy(median: float, seed: int) -> Iterator[float]:
    random = np.random.default_rng(seed)
    return (median * float(np.exp(0.03 * value)) for value in iter(random.standard_normal, None))


def test_figures_are_those_of_the_calls_that_count(fake_runner: Make) -> None:
    runner = fake_runner("a", chain([99.0, 99.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]))
    report = bench(runner, iterations=7, warmup=2, num_images=3, sensors=QUIET)
    found = report.candidates["a"]
    assert (found.end_to_end.count, found.end_to_end.p50_ms, found.end_to_end.max_ms) == (7, 4000, 7000)
    assert (found.end_to_end.p50_interval_ms.low, found.end_to_end.p50_interval_ms.high) == (1000, 7000)
    assert found.images_per_second == 3 / 4
    assert (found.images_per_second_interval.low, found.images_per_second_interval.high) == (3 / 7, 3)
    assert found.components["transformer"].count == 14
    assert found.components["transformer"].p50_ms == pytest.approx(0.3 * 4000)
    assert found.time_to_first_step.p50_ms == pytest.approx(0.45 * 4000)
    assert found.outside.share == pytest.approx(0.2)
    assert found.outside.stages_ms == pytest.approx({"text": 200, "denoise": 480, "decode": 120})
    assert (found.load_ms, found.first_image_ms) == ({"transformer": 5000}, 2000)
    assert found.rounds_ms["end_to_end"][:2] == ((1000,), (2000,))
    assert report.request.num_inference_steps == 2


def test_of_several_candidates_each_is_compared_with_the_first(fake_runner: Make) -> None:
    a, b, c = (fake_runner(name, noisy(s, seed)) for seed, (name, s) in enumerate((("a", 3), ("b", 2), ("c", 3))))
    report = bench(a, b, c, iterations=20, sensors=QUIET)
    assert (report.baseline, list(report.comparisons)) == ("a", ["b", "c"])
    assert report.comparisons["b"]["end_to_end"].verdict.startswith("b is faster than a: 1.5")
    assert "no difference beyond noise" in report.comparisons["c"]["end_to_end"].verdict
    assert set(report.comparisons["b"]) == {"end_to_end", "text_encoder", "transformer", "vae_decoder"}
    text = table(report)
    assert "faster" in text
    assert "noise" in text


def test_with_against_everyone_is_compared_with_that_one(fake_runner: Make) -> None:
    a, b, x = (fake_runner(name, noisy(seconds, 0)) for name, seconds in (("a", 1), ("b", 2), ("x", 4)))
    report = bench(a, b, against=x, iterations=6, sensors=QUIET)
    assert (report.baseline, list(report.candidates)) == ("x", ["a", "b", "x"])
    assert report.comparisons["a"]["end_to_end"].speedup == pytest.approx(4)
    assert report.comparisons["b"]["transformer"].speedup == pytest.approx(2)


def test_every_candidate_draws_once_a_round_and_none_twice(fake_runner: Make) -> None:
    runners = [fake_runner(name, repeat(1.0)) for name in "abc"]
    bench(*runners, iterations=4, warmup=3, sensors=QUIET)
    assert [runner.calls for runner in runners] == [7, 7, 7]


def test_equal_names_are_told_apart(fake_runner: Make) -> None:
    report = bench(*(fake_runner(name, repeat(1.0)) for name in ("a", "a", "b")), iterations=1, sensors=QUIET)
    assert list(report.candidates) == ["/fakes/a #1", "/fakes/a #2", "b"]


def test_energy_is_what_the_counter_moved_while_a_candidate_drew(fake_runner: Make, fake_gpu: Make) -> None:
    gpu = fake_gpu(watts=500.0)
    slow, fast = fake_runner("slow", repeat(4.0), gpu=gpu), fake_runner("fast", repeat(1.0), gpu=gpu)
    sensors = Sensors(gpu=lambda index: gpu if index == 0 else None)
    report = bench(slow, fast, iterations=5, num_images=2, sensors=sensors)
    assert [found.energy.joules_per_image for found in report.candidates.values()] == pytest.approx([1000, 250])
    assert "idle power included" in table(report)
    assert report.conditions.gpus["0"].after is not None


@pytest.mark.parametrize(
    ("watts", "seconds", "why"),
    [(None, 1.0, "NVML has no energy counter here"), (500.0, 0.1, "a call is shorter than 0.2 s")],
)
def test_energy_that_cannot_be_measured_is_absent_and_says_why(
    fake_runner: Make, fake_gpu: Make, watts: float | None, seconds: float, why: str
) -> None:
    gpu = fake_gpu(watts=watts)
    report = bench(
        fake_runner("a", repeat(seconds), gpu=gpu),
        iterations=2,
        sensors=Sensors(gpu=lambda index: gpu if index == 0 else None),
    )
    energy = report.candidates["a"].energy
    assert (energy.joules_per_image, why in energy.source) == (None, True)
    assert why in " ".join(table(report).split())


def test_gpu_memory_is_the_candidate_s_own_word_else_what_nvml_saw_grow(fake_runner: Make, fake_gpu: Make) -> None:
    gpu = fake_gpu()
    tells = DeviceMemory(peak_bytes=3 * 2**20, source="its engines")
    report = bench(
        fake_runner("tells", repeat(1.0), gpu=gpu, takes_bytes=2**30, memory=tells),
        fake_runner("grows", repeat(1.0), gpu=gpu, takes_bytes=2 * 2**30),
        fake_runner("host", repeat(1.0)),
        iterations=1,
        sensors=Sensors(gpu=lambda index: gpu if index == 0 else None),
    )
    found = {name: candidate.memory for name, candidate in report.candidates.items()}
    assert [memory.device_peak_bytes for memory in found.values()] == [3 * 2**20, 2 * 2**30, None]
    assert (found["tells"].device_source, found["host"].device_source) == ("its engines", "it runs on the CPU")
    assert "GPU" in "".join(note for note in report.notes if "different devices" in note)


def test_host_memory_is_what_the_process_grew_by_while_loading(fake_runner: Make) -> None:
    resident = iter([100 * 2**20, 150 * 2**20, 150 * 2**20, 140 * 2**20])
    sensors = Sensors(gpu=lambda index: None, resident_bytes=lambda: next(resident))
    report = bench(fake_runner("a", repeat(1.0)), fake_runner("b", repeat(1.0)), iterations=1, sensors=sensors)
    grown = [found.memory.host_growth_bytes for found in report.candidates.values()]
    assert grown == [50 * 2**20, 0]


def test_a_busy_machine_is_said_and_an_idle_one_is_not(fake_runner: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obsdiff_runtime.vitals.usable_cores", lambda: 4)

    def notes(load: float, others: float, threads: int) -> str:
        moments = iter([CpuTime(at=0, busy=0, own=0), CpuTime(at=10, busy=10 * (others + threads), own=10 * threads)])
        sensors = Sensors(gpu=lambda index: None, cpu_time=lambda: next(moments), load_average=lambda: load)
        report = bench(fake_runner("a", repeat(1.0)), iterations=400, threads=threads, sensors=sensors)
        return " ".join(report.notes)

    assert notes(load=0.3, others=0.01, threads=4) == ""
    assert "load average 4.5 for 4 cores in use" in notes(load=4.5, others=0, threads=4)
    assert "other programs kept 1.5 of 4 cores" in notes(load=0.3, others=1.5, threads=4)
    assert notes(load=1.9, others=1.5, threads=2) == ""  # they had cores of their own


def test_a_report_of_too_few_rounds_says_how_many_are_needed(fake_runner: Make) -> None:
    report = bench(fake_runner("a", repeat(1.0)), fake_runner("b", repeat(1.0)), iterations=5, sensors=QUIET)
    assert "p50 6, p90 36, p99 368 are needed, not 5" in " ".join(report.notes)
    assert "too few rounds" in table(report)


def test_different_types_are_said(fake_runner: Make) -> None:
    report = bench(fake_runner("a", repeat(1.0)), fake_runner("b", repeat(1.0), dtype="float16"), sensors=QUIET)
    assert "the candidates compute in different types: a float32, b float16" in report.notes


def test_a_report_survives_json(fake_runner: Make, fake_gpu: Make) -> None:
    gpu = fake_gpu()
    report = bench(
        fake_runner("a", noisy(1.0, 0), gpu=gpu, takes_bytes=2**30),
        fake_runner("b", noisy(2.0, 1)),
        iterations=7,
        sensors=Sensors(gpu=lambda index: gpu if index == 0 else None),
    )
    text = json.dumps(report.to_json(), allow_nan=False)
    assert BenchReport.from_json(json.loads(text), source="a test") == report


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_table_fits_a_hundred_columns(fake_runner: Make, fake_gpu: Make, count: int) -> None:
    gpu = fake_gpu()
    names = [f"a-bundle-with-quite-a-long-name-{'x' * 90}-{index}" for index in range(count)]
    runners = [fake_runner(name, noisy(60.0, index), gpu=gpu) for index, name in enumerate(names)]
    report = bench(*runners, iterations=40, sensors=Sensors(gpu=lambda index: gpu if index == 0 else None))
    lines = table(report).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-1].strip()


def test_wrong_arguments_are_refused_before_anything_is_loaded(fake_runner: Make) -> None:
    runner = fake_runner("a", repeat(1.0))
    for options, message in (
        ({"iterations": 0}, "iterations should be at least 1"),
        ({"warmup": -1}, "warmup at least 0"),
        ({"num_images": 0}, "num_images should be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            bench(runner, sensors=QUIET, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="nothing to measure"):
        bench(sensors=QUIET)
    with pytest.raises(ConfigError, match="height should be"):
        bench(runner, fake_runner("b", repeat(1.0), refuses="height should be a multiple of 16"), sensors=QUIET)
    assert runner.calls == runner.clock.now == 0


@pytest.fixture(scope="module")
def report(sd3_bundle: Path) -> BenchReport:
    return bench(sd3_bundle, against=sd3_bundle, iterations=6, warmup=1, num_inference_steps=2, threads=1)


def test_two_bundles_are_measured_in_the_same_rounds(report: BenchReport) -> None:
    assert len(report.candidates) == 2
    for candidate in report.candidates.values():
        assert candidate.end_to_end.count == 6
        assert candidate.components["transformer"].count == 12  # two steps a round, both guidance rows in one batch
        assert candidate.components["vae_decoder"].count == 6
        inside = candidate.components["transformer"].mean_ms * 2 + candidate.components["vae_decoder"].mean_ms
        assert inside < candidate.end_to_end.mean_ms
        assert candidate.time_to_first_step.mean_ms < candidate.end_to_end.mean_ms
        assert 0 < candidate.outside.share < 1
        assert candidate.outside.stages_ms.keys() == {"text", "denoise", "decode"}
        assert min(candidate.outside.stages_ms.values()) > 0
        assert set(candidate.load_ms) == set(candidate.components)
        assert set(candidate.devices.values()) == {"CPUExecutionProvider"}
        assert candidate.png_ms is not None
    (comparison,) = report.comparisons.values()
    assert set(comparison) == {"end_to_end", *candidate.components}
    assert comparison["end_to_end"].rounds == 6


def test_a_report_says_what_it_ran_on(report: BenchReport) -> None:
    data = json.loads(json.dumps(report.to_json()))
    assert data["machine"]["versions"].keys() == {"obsdiff_runtime", "python", "numpy", "onnxruntime"}
    assert data["machine"]["cpu"]
    assert data["request"]["num_inference_steps"] == 2
    assert data["host_peak_bytes"] > 2**20


def test_a_table_shows_every_component_and_the_verdict(report: BenchReport) -> None:
    text = table(report)
    for word in ("end to end", "transformer", "vae_decoder", "text_encoder_2", "p99", "images/s", "peak memory"):
        assert word in text
    (comparison,) = report.comparisons.values()
    assert " ".join(comparison["end_to_end"].verdict.split()) in " ".join(text.split())


def test_a_bundle_can_name_its_backend(sd3_bundle: Path) -> None:
    named = bench(f"{sd3_bundle}@onnxruntime", iterations=1, warmup=0, num_inference_steps=1)
    assert [found.subject.backend for found in named.candidates.values()] == ["onnxruntime"]
    with pytest.raises(ConfigError, match="no backend 'onyx'; there are onnxruntime, "):
        bench(f"{sd3_bundle}@onyx")
    with pytest.raises(CompatibilityError, match="CUDAExecutionProvider"):
        bench(f"{sd3_bundle}@onnxruntime_cuda")


def test_a_folder_that_is_neither_and_a_damaged_bundle_are_told_apart(sd3_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is no bundle: it has no obsdiff"):
        bench(sd3_bundle, against=tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"a diffusers folder: name it diffusers:{tmp_path}"):
        bench(tmp_path)
    (tmp_path / "obsdiff.json").write_text("{")
    with pytest.raises(BundleError):
        bench(tmp_path)


def test_a_size_that_a_bundle_cannot_draw_is_refused(sd3_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="height should be a multiple of 4, not 33"):
        bench(sd3_bundle, height=33)
    with pytest.raises(ConfigError, match="width should be at most 32 for this model"):
        bench(sd3_bundle, width=64)
    with pytest.raises(ConfigError, match="num_inference_steps should be at least 1"):
        bench(sd3_bundle, num_inference_steps=0)
