"""The export of a denoiser larger than the memory: what it holds, how long it takes, whether the bits are right.

    python benchmarks/large_export.py                                  FLUX.1-dev, 11.9 B; needs 50 GB of disk
    python benchmarks/large_export.py tests/obsdiff/configs/sd35_large.json --folder /somewhere/with/room

Writes a checkpoint of the configuration's real shapes with random weights, sharded as diffusers would, and exports it
as `obsdiff export --low-memory` does, in a process of its own whose peak is all it ever held. Then every weight in the
ONNX file is compared with the checkpoint's, bit by bit. Prints a table; asserts nothing.
"""

import dataclasses
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

DTYPES = ("bf16", "fp16", "fp32")
SHARD_BYTES = 5 << 30
_RANDOM = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One export.

    Attributes:
        parameters: of the denoiser.
        checkpoint_bytes, written_bytes: of its weight files; of graph and weights.
        peak_bytes: most that the process held, libraries included.
        seconds: loading and exporting.
        equal, different: weights by whether their bits are the checkpoint's.
    """

    parameters: int
    checkpoint_bytes: int
    written_bytes: int
    peak_bytes: int
    seconds: float
    equal: int = 0
    different: int = 0


def main(
    config: Annotated[Path, typer.Argument(help="config.json of a denoiser.")] = Path(
        "tests/obsdiff/configs/flux1_dev.json"
    ),
    dtype: Annotated[str, typer.Option(help="Of checkpoint and graph: bf16, fp16 or fp32.")] = "bf16",
    pixels: Annotated[int, typer.Option(help="Side of the served image.")] = 1024,
    folder: Annotated[Path | None, typer.Option(help="Where checkpoint and graph lie for a while.")] = None,
    threads: Annotated[int, typer.Option(help="Of the host.")] = 2,
) -> None:
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype}: not one of {', '.join(DTYPES)}")
    console = Console(width=130, stderr=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="obsdiff-") as name:
        source, target = Path(name) / "checkpoint", Path(name) / "onnx"
        apart = multiprocessing.get_context("spawn")
        with console.status("writing a random checkpoint"), apart.Pool(1, maxtasksperchild=1) as pool:
            pool.apply(_write, (json.loads(config.read_text(encoding="utf-8")), source, dtype))
        with console.status("exporting"), apart.Pool(1, maxtasksperchild=1) as pool:
            run = pool.apply(_export, (source, target, dtype, pixels, threads))
        with console.status("comparing"):
            run = _compared(run, source, target)
    Console(width=130).print(_table(config.stem, dtype, run))


def _write(config: Mapping[str, object], folder: Path, dtype: str) -> None:
    """A sharded checkpoint; numbers repeat after 16 million, at another place in each tensor."""
    import diffusers
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file

    from obsdiff.delivery import DTYPES as TYPES

    folder.mkdir(parents=True)
    with init_empty_weights(include_buffers=False):
        denoiser = getattr(diffusers, str(config["_class_name"])).from_config(dict(config))
    denoiser.save_config(folder)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(_RANDOM, generator=generator).mul_(0.02).to(TYPES[dtype])
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = SHARD_BYTES
    for name, tensor in denoiser.state_dict().items():
        room -= tensor.numel() * numbers.element_size()
        if room < 0 and shards[-1]:
            shards.append({})
            room = SHARD_BYTES - tensor.numel() * numbers.element_size()
        shards[-1][name] = tensor
    places = {}
    for index, shard in enumerate(shards):
        file = f"diffusion_pytorch_model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        filled = {}
        for name, tensor in shard.items():
            start = int(torch.randint(_RANDOM, (), generator=generator))
            repeated = numbers.roll(-start).repeat(-(-tensor.numel() // _RANDOM))
            filled[name] = (
                repeated[: tensor.numel()].view(tensor.shape).clone() if tensor.is_meta else tensor.to(numbers.dtype)
            )
            places[name] = file
        save_file(filled, folder / file)
    index_file = folder / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")


def _export(source: Path, target: Path, dtype: str, pixels: int, threads: int) -> Run:
    import torch

    from obsdiff.checkpoint import stored_denoiser
    from obsdiff.costs import parameters
    from obsdiff.delivery import DTYPES as TYPES
    from obsdiff.display import quiet_libraries
    from obsdiff.facts import weight_bytes
    from obsdiff.families.table import family_of
    from obsdiff_export import onnx

    quiet_libraries()
    torch.set_num_threads(threads)
    started = time.perf_counter()
    denoiser = stored_denoiser(source)
    component = family_of(denoiser).component(denoiser, height=pixels, width=pixels, vae_scale=8)
    written = onnx.export(component, target, dtype=TYPES[dtype])
    return Run(
        parameters=parameters(denoiser),
        checkpoint_bytes=weight_bytes(source.parent, [source.name]),
        written_bytes=written.bytes,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        seconds=time.perf_counter() - started,
    )


def _compared(run: Run, source: Path, target: Path) -> Run:
    """Looks at every tensor of the checkpoint, in the graph under its own name or transposed as NAME::T."""
    import numpy as np
    import onnx_ir

    from obsdiff.inspection.stored import tensors

    written = onnx_ir.load(target / "model.onnx").graph.initializers
    equal = different = 0
    for path in sorted(source.glob("*.safetensors")):
        for tensor in tensors(path):
            assert tensor.bits is not None
            name = tensor.name if tensor.name in written else f"{tensor.name}::T"
            value = written[name].const_value if name in written else None
            found = None if value is None else value.numpy().view(tensor.bits.dtype)
            same = found is not None and np.array_equal(found.T if name != tensor.name else found, tensor.bits)
            equal, different = equal + same, different + (not same)
    return dataclasses.replace(run, equal=equal, different=different)


def _table(name: str, dtype: str, run: Run) -> Table:
    table = Table(title=f"{name} in {dtype}")
    for heading in (
        "parameters",
        "checkpoint",
        "written",
        "peak memory",
        "of the checkpoint",
        "seconds",
        "weights equal",
    ):
        table.add_column(heading, justify="right")
    table.add_row(
        f"{run.parameters / 1e9:.2f} G",
        f"{run.checkpoint_bytes / 1e9:.1f} GB",
        f"{run.written_bytes / 1e9:.1f} GB",
        f"{run.peak_bytes / 2**30:.2f} GiB",
        f"{run.peak_bytes / run.checkpoint_bytes:.2f}",
        f"{run.seconds:.0f}",
        f"{run.equal} of {run.equal + run.different}",
    )
    return table


if __name__ == "__main__":
    typer.run(main)
