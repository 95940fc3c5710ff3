"""Networks and inputs in the dtype of a graph."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from obsdiff_export.stored import StoredParameter

_Leaves = dict[str, Tensor | None]

FLOAT32_INPUTS: Final = frozenset(
    {"timestep", "time_ids", "resolution", "aspect_ratio", "image_meta_size", "reference_places", "frame_times"}
)
"""Inputs that stay float32 in every graph: bfloat16 knows 996 and 1000, but no timestep between them."""


@contextmanager
def cast_to(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The module's floating parameters and buffers are `dtype` inside, and the very ones of before outside.

    Those that lie in files stay there: who reads them says in which dtype. Nothing is copied but the casts, tied
    weights stay tied, and whoever shares the submodules sees the same.
    """
    with _replaced(module, lambda leaf: _cast(leaf, dtype)):
        yield


@contextmanager
def emptied(module: nn.Module, dtype: torch.dtype, mode: FakeTensorMode) -> Iterator[None]:
    """Inside, the module's parameters are shapes without values, of `mode`; buffers are as `cast_to` makes them."""

    def empty(leaf: Tensor) -> Tensor:
        if not isinstance(leaf, nn.Parameter):
            return _cast(leaf, dtype)
        with mode:
            shape = torch.empty(leaf.shape, dtype=dtype if leaf.is_floating_point() else leaf.dtype)
            return nn.Parameter(shape, requires_grad=False)

    with _replaced(module, empty):
        yield


def inputs_in(dtype: torch.dtype, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating inputs as a graph of this dtype takes them."""
    return {
        name: tensor.to(torch.float32 if name in FLOAT32_INPUTS else dtype) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }


@contextmanager
def _replaced(module: nn.Module, by: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, every parameter and buffer is what `by` makes of it, once each; outside, it is the one of before."""
    made: dict[int, Tensor] = {}
    before: list[tuple[_Leaves, str, Tensor]] = []
    try:
        for part in module.modules():
            for leaves in cast("tuple[_Leaves, _Leaves]", (part._parameters, part._buffers)):
                for name, leaf in leaves.items():
                    if leaf is None:
                        continue
                    before.append((leaves, name, leaf))
                    if id(leaf) not in made:
                        made[id(leaf)] = by(leaf)
                    leaves[name] = made[id(leaf)]
        yield
    finally:
        for leaves, name, leaf in before:
            leaves[name] = leaf


def _cast(leaf: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(leaf, StoredParameter) or not leaf.is_floating_point() or leaf.dtype == dtype:
        return leaf
    moved = leaf.detach().to(dtype)
    return nn.Parameter(moved, requires_grad=False) if isinstance(leaf, nn.Parameter) else moved
