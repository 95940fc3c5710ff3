"""Latents decoded in tiles by diffusers and by the bundle: the same pictures, and the same films."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as state
from PIL import Image

from obsdiff.families.autoencoders import PATCH, use_tiles
from obsdiff_runtime import cli
from obsdiff_runtime.autoencoder import Autoencoder, nearest_tile, tile_overlap, tile_side
from obsdiff_runtime.benchmark import bench, table
from obsdiff_runtime.bundle import Bundle, EngineEntry, open_bundle
from obsdiff_runtime.errors import ConfigError, ResourceError
from obsdiff_runtime.pipeline import Pipeline
from obsdiff_runtime.server.models import serve_bundle
from obsdiff_runtime.server.options import read_options
from obsdiff_runtime.shapes import Range
from obsdiff_runtime.verbs import describe

NAMES = ["sd", "flux2", "qwen", "sana"]
SIDE = 32


def in_diffusers(theirs: Any, ours: Autoencoder, latents: Any, side: int) -> Any:
    """(..., height, width, 3), in 0..1."""
    vae = copy.copy(theirs.vae)
    use_tiles(vae, side)
    factor, shift = ours._affine()
    if latents.ndim == 4:
        factor, shift = (value[:, None] if value.ndim else value for value in (factor, shift))
    given = torch.from_numpy(latents * factor + shift)[None]
    with torch.no_grad():
        if hasattr(vae, "bn"):
            deviation = (vae.bn.running_var + vae.bn.eps).sqrt()[:, None, None]
            given = torch.pixel_shuffle(given * deviation + vae.bn.running_mean[:, None, None], PATCH)
        one_frame = type(vae).__name__ == "AutoencoderKLQwenImage"
        told = [torch.zeros(1)] if getattr(vae.config, "timestep_conditioning", False) else []
        found = vae.decode(given[:, :, None] if one_frame else given, *told).sample[0]
    pixels = (found[:, 0] if one_frame else found) / 2 + 0.5
    return np.moveaxis(pixels.clamp(0, 1).numpy(), 0, -1)


def psnr(expected: Any, found: Any) -> float:
    return float(-10 * np.log10(np.mean((expected - found / 255) ** 2)))


def check(pair: tuple[Any, Path], height: int, width: int, *frames: int, side: int = SIDE) -> None:
    """Diffusers' tiles are those of the runtime, and where there are several they show."""
    theirs, folder = pair
    tiled, whole = Pipeline(folder, threads=1, vae_tiling=side), Pipeline(folder, threads=1)
    scale = tiled._vae.scale
    shape = (tiled._channels, *frames, height // scale, width // scale)
    latents = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    found = tiled.decode(latents)
    expected = in_diffusers(theirs, tiled._vae, latents, side)
    assert found.shape == expected.shape
    assert expected.std() > 0.02
    assert psnr(expected, found) > 58  # that of rounding to 256 values is 58.9
    same = np.array_equal(found, whole.decode(latents))
    assert same == (max(height, width) <= side)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("height", "width"), [(32, 16), (96, 96), (80, 136), (24, 104), (72, 48)])
def test_pictures_in_tiles(name: str, height: int, width: int, make_pair: Callable[[str], Any]) -> None:
    """One tile; several; a last one that is smaller, either way; less than a tile high."""
    check(make_pair(name), height, width)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("height", "width"), [(80, 136), (24, 104)])
def test_pictures_are_read_in_tiles(name: str, height: int, width: int, make_pair: Callable[[str], Any]) -> None:
    theirs, folder = make_pair(name)
    ours = Pipeline(folder, threads=1, vae_tiling=SIDE)._vae
    picture = np.random.default_rng(5).integers(0, 256, (height, width, 3), np.uint8)
    found = ours.encode(picture)[0]
    vae = copy.copy(theirs.vae)
    use_tiles(vae, SIDE)
    pixels = torch.from_numpy(picture.transpose(2, 0, 1) / np.float32(127.5) - 1)[None]
    with torch.no_grad():
        encoded = vae.encode(pixels[:, :, None] if name == "qwen" else pixels)
    expected = (encoded.latent if name == "sana" else encoded.latent_dist.mean)[0]
    if name == "qwen":
        expected = expected[:, 0]
    if name == "flux2":
        deviation = (vae.bn.running_var + vae.bn.eps).sqrt()[:, None, None]
        expected = (torch.pixel_unshuffle(expected, PATCH) - vae.bn.running_mean[:, None, None]) / deviation
    error = np.abs(found - expected.numpy()).max() / np.abs(expected.numpy()).max()
    assert error < 1e-4


@pytest.mark.parametrize("name", ["wan", "wan_ti2v"])
@pytest.mark.parametrize(("height", "width", "frames"), [(32, 32, 2), (80, 56, 3), (16, 72, 1)])
def test_films_in_tiles(name: str, height: int, width: int, frames: int, make_pair: Callable[[str], Any]) -> None:
    """Pixels of `wan_ti2v` are patches, which are blended alike."""
    check(make_pair(name), height, width, frames)


@pytest.mark.parametrize(("height", "width", "frames"), [(256, 128, 2), (288, 480, 1), (64, 512, 3)])
def test_films_that_are_decoded_whole_in_tiles(
    height: int, width: int, frames: int, make_pair: Callable[[str], Any]
) -> None:
    check(make_pair("ltx"), height, width, frames, side=256)


@pytest.mark.parametrize("name", [*NAMES, "wan", "wan_ti2v", "ltx"])
def test_diffusers_own_tiles_are_the_default(name: str, make_pair: Callable[[str], Any]) -> None:
    theirs, folder = make_pair(name)
    config = json.loads((folder / "vae_decoder" / "config.json").read_text())
    side = tile_side(True, None, config)
    assert side is not None
    vae = type(theirs.vae).from_config(theirs.vae.config)
    if hasattr(vae, "tile_overlap_factor"):
        expected = vae.tile_sample_min_size, vae.tile_overlap_factor * side
    else:
        high, wide = vae.tile_sample_min_height, vae.tile_sample_min_width
        assert high == wide
        expected = high, high - vae.tile_sample_stride_height
    assert (side, tile_overlap(side, config)) == expected


@pytest.mark.parametrize(
    ("config", "side", "expected"),
    [
        ({"block_out_channels": [8] * 4}, 300, 296),
        ({"block_out_channels": [8] * 4}, 20, 32),  # smaller ones do not overlap
        ({"_class_name": "AutoencoderDC", "encoder_block_out_channels": [8] * 7}, 256, 512),
    ],
)
def test_the_nearest_tile_is_one(config: dict[str, Any], side: int, expected: int) -> None:
    assert nearest_tile(side, config) == expected == tile_side(expected, None, config)


def test_a_tile_goes_through_all_frames_before_the_next_one(wan_pair: Any) -> None:
    ours, told = Pipeline(wan_pair[1], threads=1, vae_tiling=16), []
    seen: list[str] = []
    ours.networks.observer = lambda name, seconds: seen.append(name)
    sample = np.zeros((4, 3, 3, 6), np.float32)
    ours._vae.decode(sample, lambda stage, done, total, note="": told.append((stage, done, total)))
    assert told == [("decode", done, 6) for done in range(1, 7)]
    assert seen == ["vae_decoder", "vae_decoder_next", "vae_decoder_next"] * 2


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (33, "tiles of 33 pixels: should be a multiple of 2; near are 32, 34"),
        (6, "tiles of 6 pixels do not overlap; give 8 or more"),
        (0, "tiles of 0 pixels do not overlap; give 8 or more"),
        (-8, "tiles of -8 pixels do not overlap; give 8 or more"),
    ],
)
def test_what_is_no_tile_is_refused(sd_pair: Any, side: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pipeline(sd_pair[1], threads=1, vae_tiling=side)


def test_the_command_decodes_in_tiles(sd_pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 16 pixels if so asked, and of diffusers' 32 if not."""
    folder, size = sd_pair[1], {"height": 48, "width": 40, "num_inference_steps": 1}
    line = ["generate", str(folder), "red", "--steps", "1", "--height", "48", "--width", "40", "--threads", "1", "-q"]
    for flags, tiling in ((["--vae-tile", "16"], 16), (["--vae-tiling"], 32), ([], False)):
        path = tmp_path / f"{tiling}.png"
        assert cli.run([*line, *flags, "-o", str(path)]) == 0
        expected = Pipeline(folder, threads=1, vae_tiling=tiling)("red", **size).arrays[0]
        np.testing.assert_array_equal(np.asarray(Image.open(path)), expected)
    drawn = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(drawn) == 3
    assert cli.run([*line, "--vae-tile", "0", "-o", str(tmp_path / "no.png")]) == 2
    assert "tiles of 0 pixels do not overlap" in capsys.readouterr().err


def test_servers_and_measurements_take_tiles(sd_pair: Any) -> None:
    for flags, tiling in ((["--vae-tile", "16"], 16), (["--vae-tiling"], True), ([], False)):
        given = vars(cli.COMMAND.parser().parse_args(["serve", str(sd_pair[1]), *flags]))
        assert read_options(given).vae_tiling is tiling
    served = serve_bundle(sd_pair[1], threads=1, vae_tiling=16, warm_up=False)
    served.batcher.stop()
    assert served.pipeline.decode(np.zeros((4, 9, 9), np.float32)).shape == (18, 18, 3)
    assert served.pipeline.vae_tile == 16
    report = bench(
        sd_pair[1], iterations=1, warmup=0, height=48, width=40, num_inference_steps=1, threads=1, vae_tiling=16
    )
    (measured,) = report.candidates.values()
    assert [len(runs) for runs in measured.rounds_ms["vae_decoder"]] == [4 * 4]
    assert measured.subject.vae_tile == 16
    assert "VAE in tiles of 16" in table(report)


def test_what_no_engine_takes_is_refused_before_anything_runs(sd_pair: Any) -> None:
    opened = open_bundle(sd_pair[1])
    decoder = opened.component("vae_decoder")
    profile = {"latent_sample": Range(min=(1, 4, 1, 1), opt=(1, 4, 16, 16), max=(1, 4, 16, 16))}
    engine = EngineEntry(path="a", key="a", backend="tensorrt", backend_version="10.13", profiles=(profile,))
    components = {**opened.manifest.components, "vae_decoder": replace(decoder, engines=(engine,))}
    defaults = replace(opened.manifest.defaults, vae_tile=32)
    bundle = Bundle(root=opened.root, manifest=replace(opened.manifest, components=components, defaults=defaults))
    assert "in 4 steps at guidance 3, decoded in tiles of 32" in describe(bundle)
    for tiling in (False, True, 16):
        Pipeline(bundle, backend="tensorrt", vae_tiling=tiling).resolver.resolve(height=96, width=96)
    too_large = Pipeline(bundle, backend="tensorrt", vae_tiling=64)
    too_large.resolver.resolve(height=32, width=32)
    with pytest.raises(ConfigError, match="obsdiff build BUNDLE --vae-tile 64") as told:
        too_large.resolver.resolve(height=48, width=40)
    assert "does not take height 48, width 40: its profile takes height 2 to 32, width 2 to 32" in str(told.value)
    Pipeline(bundle, vae_tiling=64).resolver.resolve(height=96, width=96)  # ONNX Runtime runs the graph
    broken = replace(opened.manifest, defaults=replace(defaults, vae_tile=-4))
    with pytest.raises(ConfigError, match="tiles of -4 pixels do not overlap"):
        Pipeline(Bundle(root=opened.root, manifest=broken))


@pytest.mark.parametrize(("tiling", "which"), [(False, "tiles"), (32, "smaller tiles")])
def test_where_memory_is_too_small_tiles_are_told_of(
    sd_pair: Any, monkeypatch: pytest.MonkeyPatch, tiling: bool | int, which: str
) -> None:
    """As ONNX Runtime says it on Linux when no more can be had."""
    ours = Pipeline(sd_pair[1], threads=1, vae_tiling=tiling)
    said = "Failed to allocate memory for requested buffer of size 14400000000"

    def run(names: Any, feeds: Any) -> None:
        raise state.Fail(said)

    monkeypatch.setattr(ours.networks.session("vae_decoder"), "_session", SimpleNamespace(run=run))
    with pytest.raises(ResourceError, match=r"vae_decoder: memory is too small for .* \(1, 4, 8, 8\)") as told:
        ours.decode(np.zeros((4, 8, 8), np.float32))
    assert f"it needs less in {which}: --vae-tile" in str(told.value)
