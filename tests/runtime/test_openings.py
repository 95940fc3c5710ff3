"""Films that begin or end with a picture: the same one, prompt and noise through diffusers and through the bundle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LTXImageToVideoPipeline, LTXPipeline
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from kinds import no_ftfy
from obsdiff.families import parts
from obsdiff.families.autoencoders import use_tiles
from obsdiff.pictures import opener
from obsdiff_runtime import cli
from obsdiff_runtime.benchmark import bench
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.openings import pixel_values
from obsdiff_runtime.pictures import read_picture
from obsdiff_runtime.pipeline import Images, Pipeline

PROMPTS = ["a large red circle above a small blue square", "a small green triangle"]
UNWANTED = ["two yellow stars", ""]
KINDS = ("wan_i2v", "wan_flf2v", "wan22_i2v", "wan_ti2v")
END = ("wan_flf2v",)
"""Whose films end with a picture."""


def picture(height: int, width: int) -> Any:
    pixels = np.random.default_rng(0).integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(pixels).resize((width, height)))


def both(
    pair: tuple[Any, Path],
    *,
    output_type: str = "np",
    vae_tiling: int | bool = False,
    ends: bool = False,
    **options: Any,
) -> tuple[Any, Images]:
    """(n, frames, height, width, 3) of diffusers, in 0..1, or its latents, and what the runtime draws.

    `ends`: films do, with a picture, too.
    """
    theirs, folder = opener(pair[0]), pair[1]
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 32, "width": 48, "num_frames": 9}
    given |= {"negative_prompt": UNWANTED, "max_sequence_length": 512} | options
    image = picture(given["height"], given["width"])
    last = 255 - image if ends else None
    with torch.no_grad(), no_ftfy():
        seeded = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
        told = {"image": Image.fromarray(image), "generator": seeded, "output_type": output_type}
        told |= {} if last is None else {"last_image": Image.fromarray(last)}
        expected = theirs(prompt=PROMPTS, **told, **given).frames
    ours = Pipeline(folder, threads=1, vae_tiling=vae_tiling)
    return expected, ours(PROMPTS, image=image, last_image=last, seed=[7, 8], noise_source="torch", **given)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(kind, options, marks=pytest.mark.stage("runtime", kind=kind))
        for kind in KINDS
        for options in (
            {},
            {"num_frames": 5 if kind in END else 1, "guidance_scale": 1.0},
            {"num_frames": 25, "height": 48, "width": 16, "num_inference_steps": 2},
        )
    ],
)
def test_the_same_picture_gives_the_same_film(
    kind: str, options: dict[str, Any], make_pair: Callable[[str], tuple[Any, Path]]
) -> None:
    expected, films = both(make_pair(kind), ends=kind in END, **options)
    assert films.arrays.shape == expected.shape
    assert expected.std() > 0.02
    assert -10 * np.log10(np.mean((expected - films.arrays / 255) ** 2)) > 58  # that of rounding to 256 values is 58.9


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_picture_gives_the_same_latents(kind: str, make_pair: Callable[[str], tuple[Any, Path]]) -> None:
    """Latents tell more than the pixels of a small random decoder; another picture gives others."""
    pair = make_pair(kind)
    expected, films = both(pair, output_type="latent", ends=kind in END)
    scale = float(expected.abs().max())
    np.testing.assert_allclose(films.latents, expected.numpy(), atol=1e-4 * scale)
    same = {"seed": [7, 8], "noise_source": "torch", "num_frames": 9, "negative_prompt": UNWANTED}
    image = picture(32, 48)
    last = 255 - image if kind in END else None
    for other in ((255 - image, last), *([(image, image)] if kind in END else [])):
        drawn = Pipeline(pair[1], threads=1)(PROMPTS, image=other[0], last_image=other[1], **same)
        assert np.abs(drawn.latents - films.latents).max() > 1e-2 * scale


@pytest.mark.parametrize("num_frames", [5, 9])
def test_the_same_last_picture_gives_the_same_latents(num_frames: int, wan22_i2v_pair: tuple[Any, Path]) -> None:
    expected, films = both(wan22_i2v_pair, output_type="latent", ends=True, num_frames=num_frames)
    scale = float(expected.abs().max())
    np.testing.assert_allclose(films.latents, expected.numpy(), atol=1e-4 * scale)
    _, others = both(wan22_i2v_pair, output_type="latent", num_frames=num_frames)
    assert np.abs(others.latents - films.latents).max() > 1e-2 * scale


@pytest.mark.parametrize(
    ("kind", "side", "options"),
    [
        ("wan22_i2v", 16, {"ends": False}),
        ("wan22_i2v", 16, {"ends": True}),
        ("wan_ti2v", 32, {"height": 80, "width": 112}),  # read in tiles twice as large
    ],
)
def test_a_picture_is_read_in_tiles_as_diffusers_reads_it(
    kind: str, side: int, options: dict[str, Any], make_pair: Callable[[str], tuple[Any, Path]]
) -> None:
    pair = make_pair(kind)
    given = {"output_type": "latent", "num_inference_steps": 2, **options}
    use_tiles(pair[0].vae, side)
    try:
        expected, films = both(pair, vae_tiling=side, **given)
    finally:
        pair[0].vae.disable_tiling()
    np.testing.assert_allclose(films.latents, expected.numpy(), atol=1e-4 * float(expected.abs().max()))
    assert not np.array_equal(films.latents, both(pair, **given)[1].latents)


def both_ltx(pair: tuple[Any, Path], *, seed: int = 7, **options: Any) -> tuple[Any, Images]:
    """Latents of diffusers, (tokens, channels), and what the runtime draws, one film that begins with a picture."""
    theirs, folder = pair
    if isinstance(theirs, LTXPipeline):
        theirs = parts.again(theirs, LTXImageToVideoPipeline)
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 64, "width": 96, "num_frames": 17}
    given |= {"negative_prompt": "two yellow stars", "max_sequence_length": 20} | options
    image = picture(given["height"], given["width"])
    with torch.no_grad():
        told = {"image": Image.fromarray(image), "generator": torch.Generator().manual_seed(seed)}
        found = theirs(prompt=PROMPTS[0], output_type="latent", **told, **given).frames
    expected = (found.flatten(2).mT if found.ndim == 5 else found)[0].numpy()
    ours = Pipeline(folder, threads=1)
    return expected, ours(PROMPTS[0], image=image, seed=seed, noise_source="torch", **given)


@pytest.mark.stage("runtime", kind="ltx")
@pytest.mark.parametrize("kind", ["ltx", "ltx_condition"])
@pytest.mark.parametrize(
    "options",
    [{}, {"guidance_scale": 1.0, "num_inference_steps": 3}, {"num_frames": 9, "height": 96, "width": 32}],
)
def test_the_same_picture_gives_the_same_film_of_ltx(
    kind: str, options: dict[str, Any], make_pair: Callable[[str], tuple[Any, Path]]
) -> None:
    """Its latents are drawn with the film's own noise, and of later versions stirred at each step."""
    expected, films = both_ltx(make_pair(kind), **options)
    found = films.latents[0].reshape(4, -1).T
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(np.abs(expected).max()))
    given = {"seed": 7, "noise_source": "torch", "height": 64, "width": 96, "num_frames": 17}
    plain = Pipeline(make_pair(kind)[1], threads=1)(PROMPTS[0], **given)
    assert plain.latents[0].size != found.size or np.abs(plain.latents[0].reshape(4, -1).T - found).max() > 1e-2


@pytest.mark.parametrize("kind", ["ltx", "ltx_condition"])
def test_films_of_ltx_with_and_without_a_picture_are_drawn_together_as_alone(
    kind: str, make_pair: Callable[[str], tuple[Any, Path]]
) -> None:
    ours = Pipeline(make_pair(kind)[1], threads=1)
    told = {"num_inference_steps": 3, "height": 64, "width": 96, "num_frames": 9}
    image = picture(64, 96)
    alone = [ours("red", image=shown, seed=5, **told).latents[0] for shown in (image, None)]
    drawings = [ours.begin("red", image=shown, seed=5, **told)[0] for shown in (image, None)]
    while not drawings[0].is_over:
        ours.step(drawings)
    for drawing, expected in zip(drawings, alone, strict=True):
        np.testing.assert_allclose(drawing.sample, expected, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (97, 41), (20, 30)])
def test_an_image_encoder_is_told_what_transformers_tells_it(height: int, width: int) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image = picture(height, width)[:height, :width]
    expected = processor(images=Image.fromarray(image), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixel_values(image, processor.to_dict()), expected, atol=1e-6)


def test_what_opens_no_film_is_refused(
    wan22_i2v_pair: tuple[Any, Path], wan_flf2v_pair: tuple[Any, Path], wan_pair: tuple[Any, Path]
) -> None:
    ours = Pipeline(wan22_i2v_pair[1], threads=1)
    with pytest.raises(ConfigError, match=r"films of this pipeline begin with a picture; give it one \(image, or --im"):
        ours("red")
    assert not ours.networks.load_seconds, "before anything is loaded"
    with pytest.raises(
        ConfigError, match="strength says how much of an image is changed, and here a film begins with it"
    ):
        ours("red", image=picture(32, 32), strength=0.5)
    with pytest.raises(ConfigError, match="begin with a picture, and no other is told; give it as the image"):
        ours("red", reference=picture(32, 32))
    with pytest.raises(ConfigError, match="height 48 is not that of the image, 32"):
        ours("red", image=picture(32, 32), height=48)
    with pytest.raises(ConfigError, match="height 32 is not that of the last_image, 48; resize it before"):
        ours("red", image=picture(32, 32), last_image=picture(48, 32))
    ends = Pipeline(wan_flf2v_pair[1], threads=1)
    assert ends.resolver.choices.pictures == (2, 2)
    with pytest.raises(ConfigError, match=r"films of this pipeline end with a picture, too; give it one \(last_image"):
        ends("red", image=picture(32, 32))
    assert not ends.networks.load_seconds, "before anything is loaded"
    for given in ({"last_image": picture(32, 32)}, {"image": picture(32, 32), "num_frames": 1}):
        with pytest.raises(ConfigError, match="a film that ends with a picture begins with another"):
            ours("red", **{"last_image": picture(32, 32), **given})
    assert not Pipeline(wan_pair[1], threads=1).resolver.opens


def test_a_film_that_can_begin_with_a_picture_keeps_it(wan_ti2v_pair: tuple[Any, Path], monkeypatch: Any) -> None:
    """Films with and without one go through the denoiser together, and are drawn as alone."""
    ours = Pipeline(wan_ti2v_pair[1], threads=1)
    given: dict[str, Any] = {"height": 32, "width": 48}
    opened, plain = (ours.begin("red", seed=3, **given, **told)[0] for told in ({"image": picture(32, 48)}, {}))
    assert opened.shapes == plain.shapes
    while not plain.is_over:
        ours.step([opened, plain])
    for drawing, told in ((opened, {"image": picture(32, 48)}), (plain, {})):
        alone = ours("red", seed=3, **given, **told).latents[0]
        np.testing.assert_allclose(drawing.sample, alone, atol=1e-5)
    first = ours._vae.open(picture(32, 48), 1)
    np.testing.assert_array_equal(opened.sample[:, :1], first)
    assert np.abs(plain.sample[:, :1] - first).max() > 0.1
    monkeypatch.setattr(ours.networks, "has", lambda component: component != "vae_encoder")
    assert ours.resolver.choices.pictures == (0, 0)
    with pytest.raises(ConfigError, match="strength says how much of an image is changed, and there is no image"):
        ours("red", strength=0.5)


@pytest.mark.parametrize("kind", ["wan", "wan_ti2v", "wan_i2v", "sd"])
def test_films_of_others_end_with_no_picture(kind: str, make_pair: Callable[[str], tuple[Any, Path]]) -> None:
    """diffusers leaves it out for TI2V, and fails for I2V of Wan 2.1, whose image encoder sees two pictures then."""
    ours = Pipeline(make_pair(kind)[1], threads=1)
    image = picture(32, 32) if ours.resolver.opens else None
    with pytest.raises(ConfigError, match="no film of this pipeline ends with a picture"):
        ours("red", image=image, last_image=picture(32, 32))


def test_a_text_of_another_length_is_refused(make_pair: Callable[[str], tuple[Any, Path]]) -> None:
    with pytest.raises(ConfigError, match="max_sequence_length is fixed to 512 in this bundle's graph, not 8"):
        Pipeline(make_pair("wan_i2v")[1], threads=1)("red", image=picture(32, 32), max_sequence_length=8)


def test_the_commands_take_a_file(
    wan22_i2v_pair: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the bundle's size, whatever its own; what is measured begins with a blank one."""
    folder, path = str(wan22_i2v_pair[1]), tmp_path / "film.npy"
    Image.fromarray(picture(40, 72)).save(tmp_path / "photo.png")
    line = ["generate", folder, "red", "--steps", "2", "--num-frames", "5", "--threads", "1", "-q", "-o", str(path)]
    assert cli.run([*line, "--image", str(tmp_path / "photo.png"), "--seed", "3"]) == 0
    image = read_picture(tmp_path / "photo.png", 8, 32, 32)
    ours, given = Pipeline(folder, threads=1), {"image": image, "seed": 3, "num_frames": 5, "num_inference_steps": 2}
    np.testing.assert_array_equal(np.load(path), ours("red", **given).arrays[0])
    Image.fromarray(picture(72, 40)).save(tmp_path / "end.png")
    ends = ["--image", str(tmp_path / "photo.png"), "--last-image", str(tmp_path / "end.png")]
    assert cli.run([*line, *ends, "--seed", "3"]) == 0
    last = read_picture(tmp_path / "end.png", 8, 32, 32)
    np.testing.assert_array_equal(np.load(path), ours("red", last_image=last, **given).arrays[0])
    assert cli.run(line) == 2
    assert "begin with a picture" in capsys.readouterr().err
    report = bench(folder, iterations=1, warmup=0, num_frames=5, num_inference_steps=2)
    assert {"vae_encoder", "vae_encoder_next"} <= next(iter(report.candidates.values())).components.keys()
