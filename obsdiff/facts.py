"""What can be read off this machine and off a model: the environment, sizes, how many tokens a text has."""

import datetime
import math
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from torch import nn

from obsdiff import costs
from obsdiff.families import Family, references
from obsdiff.measurements import Counts, Environment, NotMeasured
from obsdiff.recipe import Sampling
from obsdiff.residuals import block_modules
from obsdiff_export.stored import values
from obsdiff_runtime.timing import machine
from obsdiff_runtime.vitals import usable_cores

PACKAGES: Final = (
    *("obsdiff", "torch", "diffusers", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu"),
    *("tensorrt", "tensorrt-rtx", "polygraphy"),
)


def environment(threads: int) -> Environment:
    """This machine, now; `threads` are those of the measured sessions."""
    here = machine()
    return Environment(
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        python=platform.python_version(),
        platform=here.system,
        cpu=here.cpu,
        cores=usable_cores(),
        threads=threads,
        memory_bytes=psutil.virtual_memory().total,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        packages={name: found for name in PACKAGES if (found := _version(name)) is not None},
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def positions(
    denoiser: nn.Module, family: Family, sampling: Sampling, pipeline_class: str, *, text_tokens: int, vae_scale: int
) -> dict[str, int]:
    """costs.positions of one denoiser call on one image of the sampled size, told a picture where there are some.

    Of a denoiser that no family describes they are an estimate: all linears of its blocks run over the image's tokens,
    or over those of all frames.
    """
    if not family.described:
        config: Any = denoiser.config
        tokens = family.tokens(
            config, height=sampling.height, width=sampling.width, text_tokens=text_tokens, vae_scale=vae_scale
        )
        *frames, _, _ = sampling.latents(vae_scale)
        return {linear.name: math.prod(frames) * tokens[linear.tokens] for linear in family.linears(denoiser)}
    return costs.positions(denoiser, _arguments(denoiser, family, sampling, pipeline_class, text_tokens, vae_scale))


def waiting_bytes(
    denoiser: nn.Module, family: Family, sampling: Sampling, pipeline_class: str, *, text_tokens: int, vae_scale: int
) -> int | None:
    """costs.waiting_bytes of such a call, between the blocks of the family's linears.

    None where no family describes the denoiser.
    """
    if not family.described:
        return None
    blocks = [denoiser.get_submodule(name) for name in block_modules(family.linears(denoiser))]
    told = _arguments(denoiser, family, sampling, pipeline_class, text_tokens, vae_scale)
    return costs.waiting_bytes(denoiser, blocks, told)


def _arguments(
    denoiser: nn.Module, family: Family, sampling: Sampling, pipeline_class: str, text_tokens: int, vae_scale: int
) -> dict[str, Any]:
    """Of a call on one image of the sampled size."""
    inputs = family.example(
        denoiser,
        batch=1,
        size=sampling.latents(vae_scale),
        text_tokens=text_tokens,
        pixels=(sampling.height, sampling.width),
    )
    if sampling.references and references.of(pipeline_class) is not None:
        config: Any = denoiser.config
        tokens = family.tokens(config, height=sampling.height, width=sampling.width, text_tokens=0, vae_scale=vae_scale)
        inputs |= references.example(denoiser, pipeline_class, batch=1, tokens=tokens["image"])
    return family.arguments(inputs)


def counts(denoiser: nn.Module, macs: int, bytes_on_disk: int | NotMeasured) -> Counts:
    """Size of a denoiser."""
    return Counts(
        parameters=costs.parameters(denoiser),
        nonzero=sum(int(torch.count_nonzero(values(parameter))) for parameter in denoiser.parameters()),
        macs=macs,
        bytes_on_disk=bytes_on_disk,
    )


def weight_bytes(folder: Path, components: Iterable[str]) -> int:
    """Bytes of the safetensors files of these components of a pipeline's folder."""
    return sum(path.stat().st_size for name in components for path in (folder / name).glob("*.safetensors"))
