"""What a denoiser costs: parameters, and multiply-accumulates (MACs) of one forward pass.

MACs are those of every linear and convolution at a batch of one, one for each weight and each bias at each position.
The attention product, norms and activations are not counted. Counted so at 1024 x 1024 pixels and 77 text tokens, every
printed digit of the paper's "TFLOPs" comes out for SD3, SD3.5 and SDXL; for SDXL they print twice the MACs.

    positions    tokens of a linear, output pixels of a convolution
"""

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from obsdiff import pausing

COUNTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def parameters(denoiser: nn.Module) -> int:
    """How many parameters there are; a shared one counts once."""
    return sum(parameter.numel() for parameter in denoiser.parameters())


def weight_bytes(denoiser: nn.Module) -> int:
    """What they take in memory."""
    return sum(parameter.numel() * parameter.element_size() for parameter in denoiser.parameters())


def storage(tensor: Tensor) -> int:
    """Which memory it has, on the meta device too: views of one tensor have the same, while any is kept."""
    return int(tensor.untyped_storage()._cdata)


def positions(denoiser: nn.Module, inputs: Mapping[str, Any]) -> dict[str, int]:
    """How many positions each linear and convolution runs over in one call.

    The call is made on the meta device, on shapes alone, whatever device the weights are on.

    Args:
        denoiser: in any dtype, on any device, shrunk or not.
        inputs: keyword arguments of its forward, batch of one; tensors on any device, their values are not looked at:
            a mask of integers is taken to show everything.

    Returns:
        module name -> positions, summed over calls; modules that were not called are absent.
    """
    state = {name: _shape_of(tensor) for name, tensor in (*denoiser.named_parameters(), *denoiser.named_buffers())}
    with counting(denoiser) as found, _on_shapes(denoiser, inputs) as shapes:
        torch.func.functional_call(denoiser, state, (), shapes)
    return found


def waiting_bytes(denoiser: nn.Module, blocks: Sequence[nn.Module], inputs: Mapping[str, Any]) -> int:
    """What a call holds that waits at a block, where it is most, beside what it was told; see pausing.

    Args:
        denoiser: on the meta device.
        blocks: of it.
        inputs: as for `positions`.
    """
    most = 0
    with pausing.gated(blocks), _on_shapes(denoiser, inputs) as shapes:
        given = [each for each in tree_leaves(shapes) if isinstance(each, Tensor)]
        told = {storage(each) for each in (*given, *denoiser.parameters(), *denoiser.buffers())}
        waiting = pausing.PausedPass(denoiser, ((), shapes))
        while waiting.block is not None:
            held = {storage(each): each.untyped_storage().nbytes() for each in waiting.tensors()}
            most = max(most, sum(size for place, size in held.items() if place not in told))
            waiting.resume(pausing.run(waiting.block, waiting.arguments))
    return most


@contextmanager
def _on_shapes(denoiser: nn.Module, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Until the end calls are made on shapes alone; gives the inputs as such."""
    with _forgotten(denoiser), torch.no_grad(), torch.device("meta"), _Shown():
        yield tree_map_only(Tensor, _shape_of, dict(inputs))


@contextmanager
def counting(denoiser: nn.Module) -> Iterator[dict[str, int]]:
    """What `positions` gives, of the calls that are made until the block ends."""
    found: dict[str, int] = {}

    def count(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        channels = x.shape[-1] if isinstance(module, nn.Linear) else y.shape[1]
        tensor = x if isinstance(module, nn.Linear) else y
        found[name] = found.get(name, 0) + tensor.numel() // channels

    hooks = [
        module.register_forward_hook(lambda m, args, output, n=name: count(n, m, args[0], output))
        for name, module in denoiser.named_modules()
        if isinstance(module, COUNTED)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def macs(denoiser: nn.Module, counts: Mapping[str, int]) -> int:
    """Multiply-accumulates of one call; `counts` are the denoiser's `positions`."""
    return sum(number * _own_parameters(denoiser.get_submodule(name)) for name, number in counts.items())


@functools.cache
def matmul_speed(device: torch.device | str = "cpu", *, size: int = 1024, seconds: float = 0.2) -> float:
    """Floating-point operations per second of a float32 matrix product on a device, measured once in a process."""
    matrix = torch.ones(size, size, device=device)

    def multiply() -> None:
        torch.mm(matrix, matrix)
        if matrix.is_cuda:
            torch.cuda.synchronize()

    multiply()
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        multiply()
        products += 1
    return products * 2 * size**3 / (time.perf_counter() - start)


@contextmanager
def _forgotten(denoiser: nn.Module) -> Iterator[None]:
    """What modules keep beside their tensors is as before in the end: Z-Image keeps the waves of its places."""
    things = [thing for module in denoiser.modules() for thing in vars(module).values() if hasattr(thing, "__dict__")]
    before = [(thing, dict(vars(thing))) for thing in things if not isinstance(thing, type)]
    try:
        yield
    finally:
        for thing, values in before:
            vars(thing).clear()
            vars(thing).update(values)


class _Shown(TorchFunctionMode):
    """Sums of integers on the meta device have values, those of ones: a denoiser may ask how long a text is."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is Tensor.sum and args[0].is_meta and args[0].dtype == torch.int64:
            return torch.ones(args[0].shape, dtype=torch.int64, device="cpu").sum(*args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _own_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _shape_of(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty_like(tensor, device="meta", dtype=dtype)
