"""What decoding takes, whole and in tiles: memory of the runtime's process, and seconds of the CPU.

    python benchmarks/decoding.py                                  a picture of 1024 x 1024, AutoencoderKL's widths
    python benchmarks/decoding.py --of wan --height 240 --width 416    a film of 5 frames, Wan 2.1's widths
    python benchmarks/decoding.py --of ti2v --height 240 --width 416   the same of Wan 2.2 TI2V's
    python benchmarks/decoding.py --of ltx --height 256 --width 384 --tiles 0,256   of 33 frames, LTX-Video 0.9's
    python benchmarks/decoding.py --of qwen --tiles 0              Qwen-Image's; dc: AutoencoderDC's, of Sana

Weights are random, of the published widths, in float32; ONNX Runtime decodes random latents on the CPU, each row in a
process of its own that imports no torch. Beside what the process held stands what `obsdiff plan` says of it. Prints a
table; asserts nothing.
"""

import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Final

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from obsdiff_runtime.autoencoder import Autoencoder, latent_channels, latent_frames
from obsdiff_runtime.bundle import DECODER, ENCODER, Defaults, Manifest, open_bundle, write_manifest
from obsdiff_runtime.networks import Networks

WIDTHS: Final = (128, 256, 512, 512)
"""Of AutoencoderKL in Stable Diffusion; those of the others are their defaults."""

OF: Final[dict[str, tuple[str, str, dict[str, Any]]]] = {
    "kl": (
        "AutoencoderKL",
        "StableDiffusionPipeline",
        {
            "block_out_channels": WIDTHS,
            "down_block_types": ("DownEncoderBlock2D",) * len(WIDTHS),
            "up_block_types": ("UpDecoderBlock2D",) * len(WIDTHS),
            "layers_per_block": 2,
        },
    ),
    "dc": ("AutoencoderDC", "SanaPipeline", {}),
    "qwen": ("AutoencoderKLQwenImage", "QwenImagePipeline", {}),
    "wan": ("AutoencoderKLWan", "WanPipeline", {}),
    "ti2v": (
        "AutoencoderKLWan",
        "WanPipeline",
        {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
        },
    ),
    "ltx": ("AutoencoderKLLTXVideo", "LTXPipeline", {}),
}
"""Class, a pipeline that has it, and its configuration, by what `--of` calls it."""

FILMS: Final = {"wan": 5, "ti2v": 5, "ltx": 33}
"""Frames of the film, of those that decode one."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One decoding.

    Attributes:
        peak_bytes: most that its process ever held.
        cpu_seconds: of all threads.
    """

    peak_bytes: int
    cpu_seconds: float


def main(
    height: Annotated[int, typer.Option(help="In pixels.")] = 1024,
    width: Annotated[int, typer.Option(help="In pixels.")] = 1024,
    of: Annotated[
        str, typer.Option(help="Autoencoder: kl, dc, qwen, or wan, ti2v or ltx, which decode a film.")
    ] = "kl",
    tiles: Annotated[str, typer.Option(help="Pixels a side, by commas; 0: whole.")] = "0,512,256",
    threads: Annotated[int, typer.Option(help="Of the host.")] = 2,
) -> None:
    apart = multiprocessing.get_context("spawn")
    table = Table("", "memory, GiB", "planned", "CPU seconds")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        with ProcessPoolExecutor(1, mp_context=apart) as other:
            other.submit(write, folder, of).result()
            sides = [int(text) for text in tiles.split(",")]
            plans = [other.submit(plan, of, height, width, side).result() for side in sides]
        for side, planned in zip(sides, plans, strict=True):
            ours, theirs = apart.Pipe()
            worker = apart.Process(target=decode, args=(folder, height, width, FILMS.get(of), side, threads, theirs))
            worker.start()
            theirs.close()
            try:
                run: Run = ours.recv()
            except EOFError:
                table.add_row(named(side), "killed", planned, "")
                continue
            finally:
                worker.join()
            table.add_row(named(side), f"{run.peak_bytes / 2**30:.2f}", planned, f"{run.cpu_seconds:.0f}")
    Console().print(table)


def named(side: int) -> str:
    return f"tiles of {side}" if side else "whole"


def write(folder: Path, of: str) -> None:
    """A bundle of nothing but decoders."""
    import diffusers
    import torch

    from obsdiff.delivery import UNCOMPARED, Delivered
    from obsdiff.families.autoencoders import autoencoder
    from obsdiff.families.table import FAMILIES
    from obsdiff_export.onnx import export

    torch.manual_seed(0)
    name, pipeline, config = OF[of]
    vae = getattr(diffusers, name)(**config).eval()
    components = {}
    for component in autoencoder(SimpleNamespace(vae=vae, config={}), height=64, width=64):
        if component.name != ENCODER:
            model = export(component, folder / component.name, dtype=torch.float32)
            components[component.name] = Delivered(
                component=component, model=model, max_error=UNCOMPARED, patterns=()
            ).entry(folder)
    write_manifest(
        folder,
        Manifest(
            created_by="a benchmark",
            family=next(each.name for each in FAMILIES.values() if each.pipeline == pipeline),
            pipeline_class=pipeline,
            sparsity="dense",
            defaults=Defaults(height=64, width=64, num_inference_steps=1, guidance_scale=1.0),
            components=components,
        ),
    )


def plan(of: str, height: int, width: int, side: int) -> str:
    """What `obsdiff plan` says of it, in GiB."""
    import diffusers
    import torch

    from obsdiff.decoding import decoding

    name, _, config = OF[of]
    with torch.device("meta"):
        configs = {"vae": dict(getattr(diffusers, name)(**config).config), "model_index": {"vae": ["diffusers", name]}}
    found = decoding(configs, height=height, width=width, num_frames=FILMS.get(of), tile=side or None)
    assert found is not None
    return f"{(found.tile_bytes if side else found.whole_bytes) / 2**30:.2f}"


def decode(
    folder: Path, height: int, width: int, frames: int | None, side: int, threads: int, answer: Connection
) -> None:
    networks = Networks(open_bundle(folder), "onnxruntime", threads)
    config = networks.bundle.config(DECODER)
    vae = Autoencoder(networks, config, side or None)
    shape = (
        latent_channels(config),
        *(() if frames is None else (latent_frames(frames, vae.frame_scale),)),
        height // vae.scale,
        width // vae.scale,
    )
    latents = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for name in networks.bundle.manifest.components:
        networks.session(name)
    start = time.process_time()
    vae.decode(latents)
    seconds = time.process_time() - start
    answer.send(Run(peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, cpu_seconds=seconds))


if __name__ == "__main__":
    typer.run(main)
