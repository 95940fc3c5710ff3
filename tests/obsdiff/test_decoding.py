"""What decoding is planned to take: the allocator by hand, tensors by hand, and a decoder in ONNX Runtime itself."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from obsdiff import verbs
from obsdiff.costs import weight_bytes
from obsdiff.decoding import WORKSPACE, Arena, Decoding, decoding, peak_bytes
from obsdiff.families.autoencoders import autoencoder
from obsdiff.settings import Settings
from obsdiff_export.component import Component
from obsdiff_export.onnx import export
from obsdiff_runtime.errors import ConfigError

KIB, MIB = 2**10, 2**20

MEASURE = """
import sys
import numpy as np
import onnxruntime

def status(what):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))

session = onnxruntime.InferenceSession(sys.argv[1])
before = status("VmRSS")
session.run(None, {"latent_sample": np.zeros(eval(sys.argv[2]), np.float32)})
print(status("VmHWM") - before)
"""


def component(module: nn.Module, **inputs: Tensor) -> Component:
    return Component(name="it", module=module.to("meta"), inputs=inputs, dynamic_axes={}, outputs=("out",), config={})


def test_a_tensor_lies_in_the_smallest_free_chunk_and_regions_double() -> None:
    arena = Arena()
    first = arena.take(600 * KIB)  # in a region of 1 MiB, whose rest is smaller and stays with it
    second = arena.take(500 * KIB)  # in one of 2 MiB, which is divided
    assert [len(chunks) for chunks in arena.regions] == [1, 2]
    arena.give(first)
    assert arena.take(700 * KIB) is first
    third = arena.take(1200 * KIB)
    assert third.region == 1
    arena.give(second)
    arena.give(third)
    assert [(chunk.start, chunk.size) for chunk in arena.regions[1]] == [(0, 2 * MIB)]
    assert arena.touched_bytes == (700 + 500 + 1200) * KIB
    assert arena.take(5 * MIB).region == 2
    assert sum(chunk.size for chunk in arena.regions[2]) == 8 * MIB


def test_tensors_count_from_their_maker_to_their_last_reader() -> None:
    """(1, 1, 1024, 1024) is of 4 MiB: what the convolution makes, its sigmoid, and their product are there at once."""
    x = torch.empty(1, 1, 1024, 1024, device="meta")
    one = nn.Sequential(nn.Conv2d(1, 1, 1), nn.SiLU())
    assert peak_bytes(component(one), {"input": x}) == 12 * MIB
    again = nn.Sequential(one, nn.ZeroPad2d(1), nn.Conv2d(1, 1, 3), nn.SiLU())
    assert peak_bytes(component(again), {"input": x}) == 12 * MIB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_onnx_runtime_takes_what_is_planned(tmp_path: Path) -> None:
    """Both figures are of sizes alone, so that they hardly vary: 15 % is what is promised."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
    ).eval()
    decoder, _ = autoencoder(SimpleNamespace(vae=vae), height=32, width=32)  # type: ignore[arg-type]
    model = export(decoder, tmp_path / "decoder", dtype=torch.float32)
    shape = (1, 4, 96, 80)
    latents = torch.empty(shape, device="meta")
    vae.to("meta")
    planned = WORKSPACE * peak_bytes(decoder, {"latent_sample": latents}) + weight_bytes(vae.decoder)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(model.path), str(shape)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == pytest.approx(planned, rel=0.15)


@pytest.mark.parametrize("kind", ["sd3", "sana", "flux2", "qwen", "wan", "wan of patches", "ltx"])
def test_decoders_of_all_kinds_are_counted(kind: str, build_pipeline: Callable[..., Any]) -> None:
    pipeline = build_pipeline("wan", patch=2) if kind == "wan of patches" else build_pipeline(kind)
    name = type(pipeline.vae).__name__
    configs = {"vae": dict(pipeline.vae.config), "model_index": {"vae": ["diffusers", name]}}
    frames = {"wan": 9, "wan of patches": 9, "ltx": 17}.get(kind)
    small, large = (decoding(configs, height=side, width=side, num_frames=frames, tile=None) for side in (512, 1024))
    assert small is not None
    assert large is not None
    assert 3 < large.whole_bytes / small.whole_bytes < 20  # attention grows with the square
    assert large.tile == 512
    assert large.tile_bytes == small.whole_bytes


def test_later_frames_of_a_film_take_more_than_the_first(build_pipeline: Callable[..., Any]) -> None:
    vae = build_pipeline("wan").vae
    configs = {"vae": dict(vae.config), "model_index": {"vae": ["diffusers", "AutoencoderKLWan"]}}
    found = [decoding(configs, height=128, width=128, num_frames=frames, tile=None) for frames in (1, 5, 9, 81)]
    sizes = [each.whole_bytes for each in found if each is not None]
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3]


def test_a_plan_tells_of_decoding_and_of_tiles(sd15_folder: Path) -> None:
    asked: dict[str, Any] = {"model": str(sd15_folder), "sparsity": "2:4", "height": 256, "width": 256}
    plan = verbs.plan(Settings(**asked, vae_tile=64))
    assert plan.decoding is not None
    assert plan.decoding.tile == 64
    assert plan.decoding.tile_bytes < plan.decoding.whole_bytes
    assert "decoding takes" in plan.notes[-1]
    assert "--vae-tile 64" in plan.notes[-1]
    assert json.loads(json.dumps(plan.to_json()))["decoding"]["tile"] == 64
    with pytest.raises(ConfigError, match="tiles of 63 pixels: should be a multiple"):
        verbs.plan(Settings(**asked, vae_tile=63))


def test_a_plan_warns_where_decoding_takes_more_than_the_denoiser() -> None:
    assert Decoding(whole_bytes=2**30, tile=512, tile_bytes=2**28).notes(2**31) == ()
    assert Decoding(whole_bytes=2**30, tile=512, tile_bytes=2**30).notes(2**20) == ()


def test_an_autoencoder_that_does_not_run_is_no_reason_not_to_plan(caplog: pytest.LogCaptureFixture) -> None:
    configs = {"vae": {"patch_size": 2}, "model_index": {"vae": ["diffusers", "AutoencoderKLWan"]}}
    assert decoding(configs, height=64, width=64, num_frames=1, tile=None) is None
    assert "what decoding takes is not known: this AutoencoderKLWan does not run" in caplog.text
