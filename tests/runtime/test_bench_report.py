import json
from pathlib import Path

import pytest

from obsdiff_runtime.benchmark import BenchReport, bench, table
from obsdiff_runtime.errors import BundleError, ConfigError


@pytest.fixture(scope="module")
def report(sd3_bundle: Path) -> BenchReport:
    return bench(sd3_bundle, against=sd3_bundle, iterations=6, warmup=1, num_inference_steps=2, threads=1)


def test_two_bundles_are_measured_in_the_same_rounds(report: BenchReport) -> None:
    assert list(report.candidates) == ["bundle", "against"]
    for candidate in report.candidates.values():
        assert candidate.end_to_end.count == 6
        assert candidate.components["transformer"].count == 12  # two steps a round, both guidance rows in one batch
        assert candidate.components["vae_decoder"].count == 6
        inside = candidate.components["transformer"].mean_ms * 2 + candidate.components["vae_decoder"].mean_ms
        assert inside < candidate.end_to_end.mean_ms
        assert set(candidate.load_ms) == set(candidate.components)
        assert set(candidate.devices.values()) == {"CPUExecutionProvider"}
    assert set(report.comparisons) == {"end_to_end", *report.candidates["bundle"].components}
    assert report.comparisons["end_to_end"].rounds == 6


def test_a_report_is_json_and_says_what_it_ran_on(report: BenchReport) -> None:
    data = json.loads(json.dumps(report.to_json()))
    assert data["machine"]["versions"].keys() == {"obsdiff_runtime", "python", "numpy", "onnxruntime"}
    assert data["machine"]["cpu"]
    assert data["num_inference_steps"] == 2
    assert data["host_peak_bytes"] > 2**20


def test_a_table_shows_every_component_and_the_verdict(report: BenchReport) -> None:
    text = table(report)
    for word in ("end to end", "transformer", "vae_decoder", "text_encoder_2", "p99 ms", "images/s", "peak memory"):
        assert word in text
    assert report.comparisons["end_to_end"].verdict in text


def test_no_iterations_and_no_bundle_are_errors(sd3_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="iterations should be at least 1"):
        bench(sd3_bundle, iterations=0)
    with pytest.raises(BundleError, match="is no bundle"):
        bench(sd3_bundle, against=tmp_path)
