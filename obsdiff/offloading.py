"""A model larger than the GPU: its blocks lie in the host's memory and visit the GPU one at a time.

What is not in a block (embeddings, the last projection) stays on the GPU; text encoders go there for encoding and leave
again; the VAE stays away, for pruning decodes nothing. A denoiser placed like this runs as it is called: diffusers
takes a pipeline's device to be the GPU as soon as one of its weights is there.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff.families import Family
from obsdiff.residuals import block_modules

_PLACE: Final = "_obsdiff_gpu"
_LENT: Final = "_obsdiff_lent"


def place(pipeline: DiffusionPipeline, family: Family, device: torch.device) -> None:
    """Lets a pipeline in the host's memory compute on a GPU that need not hold its denoiser. Changes it.

    Args:
        pipeline: its text encoders and VAE stay where they are; see `borrowed`.
        family: of its denoiser.
        device: where to compute.
    """
    denoiser: nn.Module = getattr(pipeline, family.denoiser)
    blocks = [denoiser.get_submodule(name) for name in block_modules(family.linears(denoiser))]
    apart = {id(tensor) for block in blocks for tensor in _tensors(block)}
    for tensor in _tensors(denoiser):
        if id(tensor) not in apart:
            tensor.data = tensor.data.to(device)
    for block in blocks:
        block.__dict__[_PLACE] = device
        block.register_forward_pre_hook(lambda block, _: _lend(block))
        block.register_forward_hook(lambda block, *_: _take_back(block))


@contextmanager
def on_device(block: nn.Module) -> Iterator[None]:
    """Keeps a block on the GPU until the end; what is changed of its weights is then changed in the host's memory.

    Of a block that was not placed by `place` it is there anyway.
    """
    with lent(block) as host:
        try:
            yield
        finally:
            for tensor, weights in zip(_tensors(block), host, strict=False):
                weights.copy_(tensor.data)


@contextmanager
def lent(block: nn.Module) -> Iterator[list[Tensor]]:
    """The same, for a block that is only read: its weights in the host's memory, none where it is there anyway."""
    device = block.__dict__.pop(_PLACE, None)
    if device is None:
        yield []
        return
    host = [tensor.data for tensor in _tensors(block)]
    for tensor in _tensors(block):
        tensor.data = tensor.data.to(device, non_blocking=True)
    try:
        yield host
    finally:
        for tensor, weights in zip(_tensors(block), host, strict=True):
            tensor.data = weights
        block.__dict__[_PLACE] = device


def is_away(block: nn.Module) -> bool:
    """Whether it lies in the host's memory now, placed by `place`."""
    return _PLACE in block.__dict__


@contextmanager
def borrowed(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Brings modules that are elsewhere to a device, and afterwards back."""
    moved = {module: next(chain(module.parameters(), module.buffers())).device for module in modules}
    moved = {module: home for module, home in moved.items() if home != device}
    try:
        for module in moved:
            module.to(device)
        yield
    finally:
        for module, home in moved.items():
            module.to(home)


def encoders(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """Of its prompts."""
    parts: Mapping[str, Any] = pipeline.components
    return [part for name, part in parts.items() if "encoder" in name and isinstance(part, nn.Module)]


def _lend(block: nn.Module) -> None:
    device = block.__dict__.get(_PLACE)
    if device is None or "forward" in block.__dict__:  # a pass that will wait at the door; see pausing
        return
    block.__dict__[_LENT] = [tensor.data for tensor in _tensors(block)]
    for tensor in _tensors(block):
        tensor.data = tensor.data.to(device, non_blocking=True)


def _take_back(block: nn.Module) -> None:
    for tensor, weights in zip(_tensors(block), block.__dict__.pop(_LENT, ()), strict=False):
        tensor.data = weights


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
