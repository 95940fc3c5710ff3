"""The same prompt and noise through diffusers and through the bundle: the same film."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from obsdiff_export.ports import Port
from obsdiff_export.profiles import profile_for
from obsdiff_runtime import cli
from obsdiff_runtime.benchmark import bench
from obsdiff_runtime.bundle import NEXT_DECODER, Bundle, open_bundle
from obsdiff_runtime.errors import CancelledError, CompatibilityError, ConfigError, RunError
from obsdiff_runtime.kinds import Kind, Settings
from obsdiff_runtime.kinds.ltx import LTX, LTX_CONDITION
from obsdiff_runtime.kinds.wan import WAN
from obsdiff_runtime.pipeline import Images, Pipeline

PROMPTS = ["a large red circle above a small blue square", "a small green triangle"]
UNWANTED = ["two yellow stars", ""]


def both(pair: tuple[Any, Path], *, output_type: str = "np", **options: Any) -> tuple[Any, Images]:
    """(n, frames, height, width, 3) of diffusers, in 0..1, or its latents, and what the runtime draws."""
    theirs, folder = pair
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 32, "width": 48, "num_frames": 9}
    given |= {"max_sequence_length": 5, "negative_prompt": UNWANTED} | options
    with torch.no_grad():
        seeded = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
        expected = theirs(prompt=PROMPTS, generator=seeded, output_type=output_type, **given).frames
    return expected, Pipeline(folder, threads=1)(PROMPTS, seed=[7, 8], noise_source="torch", **given)


def psnr(expected: Any, images: Images) -> float:
    error = np.mean((expected - images.arrays / 255) ** 2)
    return float(-10 * np.log10(error))


@pytest.mark.stage("runtime", kind="wan")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_frames": 1},
        {"num_frames": 5, "height": 48, "width": 16},
        {"num_frames": 21, "num_inference_steps": 2},
        {"guidance_scale": 1.0, "num_inference_steps": 7},
    ],
)
def test_the_same_noise_gives_the_same_film(wan_pair: tuple[Any, Path], options: dict[str, Any]) -> None:
    expected, films = both(wan_pair, **options)
    assert films.arrays.shape == expected.shape
    assert expected.std() > 0.02
    assert psnr(expected, films) > 58  # that of rounding to 256 values is 58.9


def test_the_same_noise_gives_the_same_latents(wan_pair: tuple[Any, Path]) -> None:
    """Latents tell more than the pixels of a small random decoder."""
    expected, films = both(wan_pair, output_type="latent")
    assert films.latents.shape == (2, 4, 3, 8, 12)
    assert np.abs(films.latents - expected.numpy()).max() < 1e-4 * np.abs(films.latents).max()


@pytest.mark.stage("runtime", kind="wan_ti2v")
@pytest.mark.parametrize("options", [{}, {"num_frames": 1, "guidance_scale": 1.0}])
def test_the_same_noise_gives_the_same_film_by_a_timestep_for_each_token(
    wan_ti2v_pair: tuple[Any, Path], options: dict[str, Any]
) -> None:
    assert wan_ti2v_pair[0].config.expand_timesteps
    expected, films = both(wan_ti2v_pair, **options)
    assert films.arrays.shape == expected.shape
    assert expected.std() > 0.02
    assert psnr(expected, films) > 58


@pytest.mark.parametrize("pair", ["wan_pair", "wan_ti2v_pair"])
def test_what_is_told_of_the_frames_before_is_as_large_as_the_latents(
    pair: str, request: pytest.FixtureRequest
) -> None:
    """The sides of all inputs follow those of the latents, which their names tell."""
    inputs = open_bundle(request.getfixturevalue(pair)[1]).component(NEXT_DECODER).inputs
    sides = {port.shape[-2:] for port in inputs}
    assert sides == {("height", "width"), ("height_x2", "width_x2"), ("height_x4", "width_x4")}
    ports = [Port(name=port.name, dtype=port.dtype, shape=port.shape) for port in inputs]
    profile = profile_for(ports, {"batch": (1, 1, 4), "height": (2, 60, 90), "width": 104})
    assert profile[ports[-1].name].max == (4, 8, 2, 360, 416)


@pytest.mark.stage("runtime", kind="ltx")
@pytest.mark.parametrize("pair", ["ltx_pair", "ltx_condition_pair"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_frames": 1},
        {"num_frames": 17, "height": 64, "width": 160},
        {"guidance_scale": 1.0, "num_inference_steps": 7},
    ],
)
def test_a_film_that_is_decoded_whole_is_the_same(
    pair: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """The first sampler's levels depend on how many tokens the film has, and the tokens' turns on their seconds."""
    made = request.getfixturevalue(pair)
    expected, films = both(made, **{"height": 96, "width": 64, **options})
    assert films.arrays.shape == expected.shape
    assert expected.std() > 0.02
    assert psnr(expected, films) > 58
    latents, films = both(made, output_type="latent", **{"height": 96, "width": 64, **options})
    tokens = latents.flatten(2).mT if latents.ndim == 5 else latents
    ours = films.latents.reshape(2, 4, -1).transpose(0, 2, 1)
    assert np.abs(ours - tokens.numpy()).max() < 1e-4 * np.abs(ours).max()


@pytest.mark.parametrize(("pair", "kind"), [("ltx_pair", LTX), ("ltx_condition_pair", LTX_CONDITION)])
def test_ltx_is_told_what_diffusers_tells_it(pair: str, kind: Kind, request: pytest.FixtureRequest) -> None:
    theirs, folder = request.getfixturevalue(pair)
    told = Settings(num_inference_steps=1, guidance_scale=3.0, guided=True, height=64, width=64, max_sequence_length=20)
    found = kind.encode(Pipeline(folder, threads=1).networks, PROMPTS, False, told)
    with torch.no_grad():
        text, mask, *_ = theirs.encode_prompt(PROMPTS, None, False, max_sequence_length=20)
    np.testing.assert_allclose(found["encoder_hidden_states"], text.numpy(), atol=1e-5)
    np.testing.assert_array_equal(found["encoder_attention_mask"], mask.numpy())
    assert not mask.all()


def test_an_ltx_film_has_its_own_pace_and_numbers_of_frames(ltx_pair: tuple[Any, Path], tmp_path: Path) -> None:
    ours, told = Pipeline(ltx_pair[1], threads=1), []
    ours("red", num_frames=17, progress=lambda stage, done, total, note="": told.append((stage, done, total)))
    assert [each for each in told if each[0] == "decode"] == [("decode", 1, 1)] * 2
    with pytest.raises(ConfigError, match=r"num_frames 12: .* a multiple of 8 behind it; near are 9 and 17"):
        ours("red", num_frames=12)
    assert ours.resolver.choices.frame_step == 8
    line = ["generate", str(ltx_pair[1]), "red", "--steps", "2", "--threads", "1", "-q"]
    assert cli.run([*line, "-o", str(tmp_path / "film.webp")]) == 0
    with Image.open(tmp_path / "film.webp") as film:
        film.load()
        assert (film.n_frames, film.info["duration"]) == (9, 40)  # type: ignore[attr-defined]


def test_another_sampler_draws_what_diffusers_draws_by_it(
    wan_pair: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    monkeypatch.setattr(wan_pair[0], "scheduler", scheduler)
    name = {"_class_name": type(scheduler).__name__}
    monkeypatch.setattr(Bundle, "scheduler", lambda self: dict(scheduler.config) | name)
    expected, films = both(wan_pair)
    assert psnr(expected, films) > 58


@pytest.mark.parametrize(
    "prompts",
    [
        ["a large red circle above a small blue square", "a small green triangle"],
        ["  two   yellow\n\tstars &amp;amp; &lt;a ring&gt;", ""],
    ],
)
def test_wan_is_told_what_diffusers_tells_it_and_zeros_behind_a_text(
    wan_pair: tuple[Any, Path], prompts: list[str]
) -> None:
    theirs, folder = wan_pair
    size = {"height": 32, "width": 32, "max_sequence_length": 48}
    told = Settings(num_inference_steps=1, guidance_scale=3.0, guided=True, **size)
    found = WAN.encode(Pipeline(folder, threads=1).networks, prompts, False, told)["encoder_hidden_states"]
    with torch.no_grad():
        expected = theirs.encode_prompt(prompts, None, False, max_sequence_length=48)[0].numpy()
    assert not expected[:, -1].any()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_film_of_a_batch_is_the_one_drawn_alone(wan_pair: tuple[Any, Path]) -> None:
    ours = Pipeline(wan_pair[1], threads=1)
    together = ours(PROMPTS, seed=[3, 4], num_images=1)
    alone = ours(PROMPTS[1], seed=4)
    np.testing.assert_allclose(together.latents[1], alone.latents[0], atol=1e-5)
    assert len(together) == 2
    assert len(together.pil()) == 2 * 9


def test_a_call_tells_how_far_it_is_and_can_be_cancelled(wan_pair: tuple[Any, Path]) -> None:
    ours, told = Pipeline(wan_pair[1], threads=1), []
    ours("red", num_frames=13, progress=lambda stage, done, total, note="": told.append((stage, done, total)))
    assert [each for each in told if each[0] == "decode"] == [("decode", done, 4) for done in (1, 2, 3, 4)] + [
        ("decode", 1, 1)
    ]
    with pytest.raises(CancelledError, match="after step 2 of 4"):
        ours("red", on_step=lambda done, total, latents: latents.shape == (1, 4, 3, 8, 8) and done < 2)


def test_values_that_are_not_finite_are_named(wan_pair: tuple[Any, Path]) -> None:
    ours = Pipeline(wan_pair[1], threads=1)
    latents = np.zeros((4, 3, 8, 8), np.float32)
    latents[:, 1] = np.inf
    with pytest.raises(RunError, match=r"vae_decoder_next: .* values of its output sample are not finite"):
        ours.decode(latents)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_frames": 8}, "num_frames 8: a film has one frame and a multiple of 4 behind it; near are 5 and 9"),
        ({"height": 36}, "height should be a multiple of 8, not 36; near are 32, 40"),
        ({"latents": np.zeros((1, 4, 8, 8))}, r"latents should be \(1, 4, 3, 8, 8\) for this call"),
    ],
)
def test_what_is_no_film_is_refused(wan_pair: tuple[Any, Path], asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pipeline(wan_pair[1], threads=1)("red", **asked)


def test_a_film_begins_with_no_picture(wan_pair: tuple[Any, Path]) -> None:
    with pytest.raises(CompatibilityError, match="no VAE encoder"):
        Pipeline(wan_pair[1], threads=1)("red", image=np.zeros((32, 32, 3), np.uint8))


def test_a_picture_has_no_frames(sd_pair: tuple[Any, Path]) -> None:
    with pytest.raises(ConfigError, match="num_frames 5: this pipeline draws pictures"):
        Pipeline(sd_pair[1], threads=1)("red", num_frames=5)


def test_the_command_writes_what_the_pipeline_draws(
    wan_pair: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, path = str(wan_pair[1]), tmp_path / "film.npy"
    line = ["generate", folder, "red", "--seed", "3", "--num-frames", "5", "--steps", "2", "--threads", "1", "-q"]
    assert cli.run([*line, "-o", str(path)]) == 0
    expected = Pipeline(folder, threads=1)("red", seed=3, num_frames=5, num_inference_steps=2).arrays[0]
    np.testing.assert_array_equal(np.load(path), expected)
    assert cli.run([*line, "-o", str(tmp_path / "film.mp4")]) == 2
    assert "no film has such a file" in capsys.readouterr().err
    assert cli.run(["inspect", folder]) == 0
    assert "draws 32 x 32 x 9 frames in 4 steps" in capsys.readouterr().out


def test_pictures_have_no_pace(sd_pair: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", str(sd_pair[1]), "red", "--fps", "8", "-o", str(tmp_path / "a.png")]) == 2
    assert "--fps 8: this bundle draws pictures" in capsys.readouterr().err


def test_films_are_measured_as_pictures_are(wan_pair: tuple[Any, Path]) -> None:
    report = bench(wan_pair[1], iterations=1, warmup=0, num_frames=5, num_inference_steps=2)
    assert report.request.num_frames == 5
    found = next(iter(report.candidates.values()))
    assert {"vae_decoder", "vae_decoder_next"} <= found.components.keys()
