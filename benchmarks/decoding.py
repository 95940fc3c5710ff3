"""What decoding takes, whole and in tiles: memory of the runtime's process, and seconds of the CPU.

    python benchmarks/decoding.py                                    a picture of 1024 x 1024, AutoencoderKL's widths
    python benchmarks/decoding.py --film --height 240 --width 416    a film of 5 frames, Wan 2.1's widths

Weights are random, of the published widths, in float32; ONNX Runtime decodes random latents on the CPU, each row in a
process of its own that imports no torch. Prints a table; asserts nothing.
"""

import multiprocessing
import resource
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from obsdiff_runtime.autoencoder import Autoencoder, latent_channels
from obsdiff_runtime.bundle import DECODER, ENCODER, Defaults, Manifest, open_bundle, write_manifest
from obsdiff_runtime.networks import Networks

WIDTHS = (128, 256, 512, 512)
"""Of AutoencoderKL in Stable Diffusion; those of Wan's are its defaults."""


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
    film: Annotated[bool, typer.Option(help="Decode a film of Wan instead of a picture.")] = False,
    tiles: Annotated[str, typer.Option(help="Pixels a side, by commas; 0: whole.")] = "0,512,256",
    threads: Annotated[int, typer.Option(help="Of the host.")] = 2,
) -> None:
    apart = multiprocessing.get_context("spawn")
    table = Table("", "memory, GiB", "CPU seconds")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        writer = apart.Process(target=write, args=(folder, film))
        writer.start()
        writer.join()
        for side in (int(text) for text in tiles.split(",")):
            ours, theirs = apart.Pipe()
            worker = apart.Process(target=decode, args=(folder, height, width, film, side, threads, theirs))
            worker.start()
            theirs.close()
            try:
                run: Run = ours.recv()
            except EOFError:
                table.add_row(named(side), "killed", "")
                continue
            finally:
                worker.join()
            table.add_row(named(side), f"{run.peak_bytes / 2**30:.2f}", f"{run.cpu_seconds:.0f}")
    Console().print(table)


def named(side: int) -> str:
    return f"tiles of {side}" if side else "whole"


def write(folder: Path, film: bool) -> None:
    """A bundle of nothing but decoders."""
    import torch
    from diffusers import AutoencoderKL, AutoencoderKLWan

    from obsdiff.delivery import UNCOMPARED, Delivered
    from obsdiff.families.autoencoders import autoencoder
    from obsdiff_export.onnx import export

    torch.manual_seed(0)
    picture = {
        "block_out_channels": WIDTHS,
        "down_block_types": ("DownEncoderBlock2D",) * len(WIDTHS),
        "up_block_types": ("UpDecoderBlock2D",) * len(WIDTHS),
        "layers_per_block": 2,
    }
    vae = (AutoencoderKLWan() if film else AutoencoderKL(**picture)).eval()
    components = {}
    for component in autoencoder(SimpleNamespace(vae=vae), height=64, width=64):
        if component.name != ENCODER:
            model = export(component, folder / component.name, dtype=torch.float32)
            components[component.name] = Delivered(
                component=component, model=model, max_error=UNCOMPARED, patterns=()
            ).entry(folder)
    write_manifest(
        folder,
        Manifest(
            created_by="a benchmark",
            family="wan" if film else "unet",
            pipeline_class="WanPipeline" if film else "StableDiffusionPipeline",
            sparsity="dense",
            defaults=Defaults(height=64, width=64, num_inference_steps=1, guidance_scale=1.0),
            components=components,
        ),
    )


def decode(folder: Path, height: int, width: int, film: bool, side: int, threads: int, answer: Connection) -> None:
    networks = Networks(open_bundle(folder), "onnxruntime", threads)
    config = networks.bundle.config(DECODER)
    vae = Autoencoder(networks, config, side or None)
    shape = (latent_channels(config), *((2,) if film else ()), height // vae.scale, width // vae.scale)
    latents = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for name in networks.bundle.manifest.components:
        networks.session(name)
    start = time.process_time()
    vae.decode(latents)
    seconds = time.process_time() - start
    answer.send(Run(peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, cpu_seconds=seconds))


if __name__ == "__main__":
    typer.run(main)
