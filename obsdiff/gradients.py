"""What errors of each linear's output cost the denoiser's velocity: gradients, through the dense model.

A recorded call is run forwards and, for a random direction of its velocity, backwards. A block's activations live only
while it is being differentiated: forwards its inputs alone are kept, and it is run again on the way back.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from obsdiff import glances, offloading, pausing, pointwise, ranks
from obsdiff.core.metric import GradientMoments, Metric
from obsdiff.groups import LinearSpec
from obsdiff.parking import STAYING, Lot
from obsdiff.residuals import block_modules
from obsdiff.results import Journal, PackageResult
from obsdiff.sampling import velocity_of
from obsdiff.sensitivities import spaced
from obsdiff.trajectories import Call
from obsdiff_runtime.errors import CalibrationError
from obsdiff_runtime.progress import Progress, silent

SHARE: Final = 5
"""One of so many recorded calls is differentiated. One of three gains 3 % at 2:4; half of the steps alone lose 10 %."""

COST: Final = 3
"""Denoiser calls that one of them comes to: forwards, each block again, and backwards."""


def count(calls: int) -> int:
    """How many of so many recorded calls are differentiated."""
    return -(-calls // SHARE)


def measure(
    denoiser: nn.Module,
    linears: Sequence[LinearSpec],
    calls: Sequence[Call],
    *,
    weights: Sequence[float],
    lot: Lot = STAYING,
    journal: Journal | None = None,
    progress: Progress = silent,
) -> dict[str, Metric]:
    """The metric of each linear's output.

    Args:
        denoiser: dense; not changed.
        linears: all of the denoiser's.
        calls: recorded, those of this rank; see trajectories.
        weights: of each call's tokens.
        lot: takes what blocks are called with until they are run again.
        journal: keeps what was measured, so that a run that goes on prunes as it began.
        progress: told call by call.

    Returns:
        by name; linears that the velocity does not depend on are missing.

    Raises:
        CalibrationError: a gradient is not finite; names the layer.
    """
    known = journal.read("gradients") if journal is not None else None
    if known is None:
        known = PackageResult(weights=_measured(denoiser, linears, calls, weights, lot, progress))
        if journal is not None:
            journal.write("gradients", known)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in known.weights.items():
        name, _, part = key.rpartition(".")
        found.setdefault(name, {})[part] = tensor
    return {name: Metric.of_tensors(tensors) for name, tensors in found.items()}


def _measured(
    denoiser: nn.Module,
    linears: Sequence[LinearSpec],
    calls: Sequence[Call],
    weights: Sequence[float],
    lot: Lot,
    progress: Progress,
) -> dict[str, Tensor]:
    """The tensors of all metrics, by linear and part."""
    sums = {
        linear.name: GradientMoments(linear.out_features, denoiser.get_parameter(f"{linear.name}.weight").device)
        for linear in linears
    }
    blocks = [denoiser.get_submodule(name) for name in block_modules(linears)]
    chosen = spaced(calls, count(ranks.total(len(calls))))
    with _frozen(denoiser), _rerun(blocks, lot):
        for done, index in enumerate(chosen):
            progress("differentiate", done, len(chosen), calls[index].prompts)
            with _watched(denoiser, sums, weights[index]):
                _backwards(denoiser, calls[index])
        progress("differentiate", len(chosen), len(chosen))
    found: dict[str, Tensor] = {}
    for name, each in sums.items():
        ranks.add_up(each.sums())
        metric = each.metric()
        if metric is not None:
            found |= {f"{name}.{part}": tensor for part, tensor in metric.tensors().items()}
    return found


def _backwards(denoiser: nn.Module, call: Call) -> None:
    """Differentiates one random direction of a call's velocity."""

    def followed(value: Tensor) -> Tensor:
        return value.detach().clone().requires_grad_() if value.is_floating_point() else value

    args, kwargs = tree_map_only(Tensor, followed, call.arguments)
    with torch.enable_grad():
        velocity = velocity_of(denoiser, denoiser(*args, **kwargs), kwargs)
        seed = zlib.crc32(f"{call.prompts}, step {call.step}".encode())
        direction = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(seed))
        torch.autograd.backward(velocity, direction.to(velocity))


@contextmanager
def _frozen(denoiser: nn.Module) -> Iterator[None]:
    """Until the end no gradient is taken by the weights."""
    free = [weight for weight in denoiser.parameters() if weight.requires_grad]
    try:
        for weight in free:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in free:
            weight.requires_grad_()


@contextmanager
def _watched(denoiser: nn.Module, sums: dict[str, GradientMoments], weight: float) -> Iterator[None]:
    """Until the end, gradients of the linears' outputs are summed up."""

    def see(name: str, linear: nn.Module, _: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(add, name, linear))  # type: ignore[no-untyped-call]

    def add(name: str, linear: nn.Module, gradient: Tensor) -> None:
        try:
            sums[name].add(glances.spaced(pointwise.tokens(linear, gradient)).flatten(0, -2), weight)
        except CalibrationError as error:
            raise CalibrationError(
                f"{name}: {error}; prune in --dtype bf16 or fp32, or without gradients (--set method_options.metric=0)"
            ) from None

    with ExitStack() as stack:
        for name in sums:
            stack.callback(denoiser.get_submodule(name).register_forward_hook(partial(see, name)).remove)
        yield


@contextmanager
def _rerun(blocks: Sequence[nn.Module], lot: Lot) -> Iterator[None]:
    """Until the end, these blocks keep no activations: each is run again when its gradient is taken."""

    def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        leaves, layout = tree_flatten((args, kwargs))
        told: list[TreeSpec] = []
        return tree_unflatten(list(_Rerun.apply(block, lot, layout, told, *leaves)), told[0])  # type: ignore[no-untyped-call]

    try:
        for block in blocks:
            block.forward = partial(run, block)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


class _Rerun(torch.autograd.Function):
    """A block's call. Unlike torch's own checkpoints it has the block's weights on the device all the way back."""

    @staticmethod
    def forward(
        ctx: Any, block: nn.Module, lot: Lot, layout: TreeSpec, told: list[TreeSpec], *leaves: Any
    ) -> tuple[Any, ...]:
        ctx.block, ctx.layout, ctx.leaves = block, layout, lot.keep(list(leaves))
        with offloading.on_device(block):
            outputs, given = tree_flatten(pausing.run(block, tree_unflatten(leaves, layout)))
        told.append(given)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[4:]
        leaves = [
            leaf.detach().requires_grad_(need) if isinstance(leaf, Tensor) else leaf
            for leaf, need in zip(ctx.leaves.tree(), needed, strict=True)
        ]
        ctx.leaves.drop()
        with torch.enable_grad(), offloading.on_device(ctx.block):
            outputs, _ = tree_flatten(pausing.run(ctx.block, tree_unflatten(leaves, ctx.layout)))
            reached = [
                (output, gradient)
                for output, gradient in zip(outputs, gradients, strict=True)
                if gradient is not None and isinstance(output, Tensor) and output.requires_grad
            ]
            if reached:
                torch.autograd.backward([output for output, _ in reached], [gradient for _, gradient in reached])
        found = [leaf.grad if isinstance(leaf, Tensor) and leaf.requires_grad else None for leaf in leaves]
        return (None, None, None, None, *found)
