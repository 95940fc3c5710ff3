"""Denoisers that take turns (Wan 2.2): the same prompt and noise through diffusers and through the bundle."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from obsdiff_runtime import cli
from obsdiff_runtime.benchmark import bench
from obsdiff_runtime.bundle import Bundle, read_manifest, write_manifest
from obsdiff_runtime.errors import BundleError, ConfigError
from obsdiff_runtime.pipeline import Images, Pipeline
from obsdiff_runtime.turns import denoiser_at

PROMPTS = ["a large red circle above a small blue square", "a small green triangle"]
TURNS = {"transformer": 875.0, "transformer_2": 0.0}


def both(pair: tuple[Any, Path], *, output_type: str = "np", **options: Any) -> tuple[Any, Images]:
    """(n, frames, height, width, 3) of diffusers, in 0..1, or its latents, and what the runtime draws."""
    theirs, folder = pair
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 32, "width": 48, "num_frames": 5}
    given |= {"max_sequence_length": 5, "negative_prompt": ["two yellow stars", ""]} | options
    with torch.no_grad():
        seeded = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
        expected = theirs(PROMPTS, generator=seeded, output_type=output_type, **given).frames
    return expected, Pipeline(folder, threads=1)(PROMPTS, seed=[7, 8], noise_source="torch", **given)


@pytest.mark.stage("runtime", kind="wan22")
@pytest.mark.parametrize("options", [{}, {"guidance_scale_2": 1.5}, {"guidance_scale": 1.0, "num_inference_steps": 7}])
def test_the_same_noise_gives_the_same_film(wan22_pair: tuple[Any, Path], options: dict[str, Any]) -> None:
    expected, films = both(wan22_pair, **options)
    assert expected.std() > 0.02
    assert -10 * np.log10(np.mean((expected - films.arrays / 255) ** 2)) > 58  # rounding to 256 values is 58.9


def test_each_denoiser_draws_with_its_own_scale(wan22_pair: tuple[Any, Path]) -> None:
    """Latents tell more than the pixels of a small random decoder; as much as they tell, both scales count."""
    given = {"output_type": "latent", "guidance_scale": 4.0}
    expected, films = both(wan22_pair, guidance_scale_2=2.0, **given)
    scale = np.abs(films.latents).max()
    assert np.abs(films.latents - expected.numpy()).max() < 1e-4 * scale
    assert np.abs(both(wan22_pair, **given)[1].latents - films.latents).max() > 1e-2 * scale


def test_the_session_is_chosen_by_the_timestep(wan22_pair: tuple[Any, Path]) -> None:
    ours, runs = Pipeline(wan22_pair[1], threads=1), []
    ours.networks.observer = lambda component, seconds: runs.append(component)
    ours("red", num_frames=1)
    assert ours.bundle.manifest.turns == TURNS
    assert [name for name in runs if name in TURNS] == ["transformer"] * 2 + ["transformer_2"] * 2


def test_a_denoiser_is_called_from_its_timestep_on() -> None:
    found = [denoiser_at(TURNS, timestep) for timestep in (999, 875, 874.9, 0)]
    assert found == ["transformer", "transformer", "transformer_2", "transformer_2"]


def test_films_that_are_at_other_denoisers_do_not_share_a_run(wan22_pair: tuple[Any, Path]) -> None:
    ours = Pipeline(wan22_pair[1], threads=1)
    first, second = (ours.begin("red", seed=seed, num_frames=1)[0] for seed in (1, 2))
    assert first.shapes == second.shapes
    for _ in range(2):
        ours.step([first])
    assert first.denoiser == "transformer_2"
    assert first.shapes != second.shapes


def test_a_scale_of_the_bundle_holds_until_the_first_one_is_given(wan22_pair: tuple[Any, Path]) -> None:
    ours = Pipeline(wan22_pair[1], threads=1)
    assert ours.resolver.resolve().scale_of(first=False) == 3.0
    defaults = dataclasses.replace(ours.bundle.manifest.defaults, guidance_scale_2=2.0)
    manifest = dataclasses.replace(ours.bundle.manifest, defaults=defaults)
    ours = Pipeline(Bundle(root=ours.bundle.root, manifest=manifest), threads=1)
    asked: list[dict[str, float]] = [{}, {"guidance_scale": 5.0}, {"guidance_scale_2": 1.0}]
    assert [ours.resolver.resolve(**each).scale_of(first=False) for each in asked] == [2.0, 5.0, 1.0]
    with pytest.raises(ConfigError, match="guidance_scale_2 should be a finite number"):
        ours.resolver.resolve(guidance_scale_2=float("nan"))


def test_one_denoiser_has_one_scale(wan_pair: tuple[Any, Path]) -> None:
    with pytest.raises(ConfigError, match="guidance_scale_2 2: one denoiser takes all steps of this pipeline"):
        Pipeline(wan_pair[1], threads=1)("red", guidance_scale_2=2.0)


def test_a_bundle_without_one_of_its_denoisers_is_refused(wan22_pair: tuple[Any, Path], tmp_path: Path) -> None:
    manifest = read_manifest(wan22_pair[1])
    components = {name: entry for name, entry in manifest.components.items() if name != "transformer_2"}
    with pytest.raises(BundleError, match="transformer_2 is to take its turn, and the bundle has no such component"):
        write_manifest(tmp_path, dataclasses.replace(manifest, components=components))


def test_the_command_takes_the_second_scale_and_both_denoisers_are_measured(
    wan22_pair: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, path = str(wan22_pair[1]), tmp_path / "film.npy"
    line = ["generate", folder, "red", "--num-frames", "1", "--threads", "1", "-q", "--guidance-scale-2", "1.5"]
    assert cli.run([*line, "-o", str(path)]) == 0
    expected = Pipeline(folder, threads=1)("red", num_frames=1, guidance_scale_2=1.5).arrays[0]
    np.testing.assert_array_equal(np.load(path), expected)
    assert cli.run(["inspect", folder]) == 0
    assert "  transformer from timestep 875 on, transformer_2 from timestep 0 on\n" in capsys.readouterr().out
    report = bench(folder, iterations=1, warmup=0, num_frames=1, guidance_scale_2=1.5)
    assert report.request.guidance_scale_2 == 1.5
    assert TURNS.keys() <= next(iter(report.candidates.values())).components.keys()
