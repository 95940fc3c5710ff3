"""Reads units and linears off diffusers' `Attention` and `FeedForward`: what the families have in common.

Sizes always come from the modules, so that everything here holds on the meta device and on shrunk models.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from torch import nn

from obsdiff import pointwise
from obsdiff.groups import Consumer, Group, LinearSpec, Producer, Size, ToldGate, Write
from obsdiff_runtime.errors import ModelError

T = TypeVar("T")


def linear(
    denoiser: nn.Module, name: str, *, block: int, tier: int, reads: str, tokens: str, writes: Write | None = None
) -> LinearSpec:
    """The prunable linear of that name, or the convolution of one pixel, which is one.

    Raises:
        ModelError: the module is no plain torch linear, as after adding LoRA adapters or quantising.
    """
    module = denoiser.get_submodule(name)
    if type(module) is not nn.Linear and not pointwise.is_pointwise(module):
        raise ModelError(
            f"{name} is a {type(module).__name__}, not a plain linear; "
            "merge adapters (pipeline.fuse_lora(), then unload_lora_weights()) and load the model without quantisation"
        )
    width, height = pointwise.widths(module)
    return LinearSpec(
        name=name,
        block=block,
        tier=tier,
        reads=reads,
        in_features=width,
        out_features=height,
        tokens=tokens,
        writes=writes,
    )


Inputs = Iterable[tuple[int, str, str, tuple[str, ...]]]
"""Per distinct input tensor of a block: tier, key, sequence, and the linears that read it."""


def of_blocks(
    denoiser: nn.Module,
    blocks: Iterable[tuple[int, str, Inputs]],
    writes: Callable[[str, str], Write | None],
    *,
    common: tuple[str, ...] = (),
) -> tuple[LinearSpec, ...]:
    """The linears of all blocks.

    Args:
        denoiser: any.
        blocks: in forward order: index, name, and what the block reads, by names inside of it.
        writes: told a block's name and a linear's name in it, where that linear writes; see `LinearSpec.writes`.
        common: keys of tensors that are the same in all blocks.
    """
    return tuple(
        linear(
            denoiser,
            f"{prefix}.{name}",
            block=block,
            tier=tier,
            reads=reads if reads in common else f"{prefix}.{reads}",
            tokens=tokens,
            writes=writes(prefix, name),
        )
        for block, prefix, inputs in blocks
        for tier, reads, tokens, names in inputs
        for name in names
    )


def adaln_single(
    told: str, *, out: str, streams: tuple[str, str] = ("attn2", "norm2")
) -> Callable[[str, str], Write | None]:
    """`writes` of blocks that are told shift, scale, gate of self-attention and feed-forward, and add to their table.

    Args:
        told: argument of the block that has these six rows; see `ToldGate.told`.
        out: linear out of the feed-forward's neurons.
        streams: what is given the stream that cross-attention writes to, without a gate, and the feed-forward.
    """

    def writes(prefix: str, linear: str) -> Write | None:
        if linear == "attn1.to_out.0":
            return Write(stream=f"{prefix}.norm1", gate=gate(prefix, 2))
        if linear == "attn2.to_out.0":
            return Write(stream=f"{prefix}.{streams[0]}")
        return Write(stream=f"{prefix}.{streams[1]}", gate=gate(prefix, 5)) if linear == out else None

    def gate(prefix: str, row: int) -> ToldGate:
        return ToldGate(block=prefix, told=told, row=row, table="scale_shift_table")

    return writes


def in_stages(denoiser: nn.Module, stages: Mapping[str, T]) -> Iterator[tuple[str, T]]:
    """The names of the blocks of each of these lists, one list after the other, and what is told of their list."""
    for stage, told in stages.items():
        for child, _ in denoiser.get_submodule(stage).named_children():
            yield f"{stage}.{child}", told


def present(module: nn.Module, *names: str) -> tuple[str, ...]:
    """Those of the names that are submodules; diffusers sets absent projections to None."""
    return tuple(name for name in names if getattr(module, name, None) is not None)


def size(module: nn.Module, name: str) -> int:
    """An attribute that is a size, such as `in_features`."""
    return int(getattr(module, name))


def heads(
    denoiser: nn.Module, name: str, *, block: int, consumers: tuple[Consumer, ...] = (), sizes: tuple[Size, ...] = ()
) -> Group:
    """The heads of the attention module of that name.

    All projections into the heads lose rows; `to_out.0` and, where the second stream goes on, `to_add_out` lose
    columns. Norms of queries and keys are per channel of a head and stay as they are. Where several heads of queries
    read the same keys and values, a unit is all of these.

    Args:
        denoiser: any.
        name: of the attention module.
        block: index of its block.
        consumers: what reads the heads, where it is no projection of the module's own.
        sizes: numbers outside of the module that follow.

    Raises:
        ModelError: the projections are fused, or the attention has weights beside them (an IP-Adapter's).
    """
    attention = denoiser.get_submodule(name)
    require_unfused(attention, name)
    if any(True for _ in getattr(attention.processor, "parameters", tuple)()):
        raise ModelError(f"{name}: its processor has weights of its own; call unload_ip_adapter() before pruning")
    queries = size(attention.get_submodule("to_q"), "out_features")
    shared = queries // size(attention.get_submodule("to_k"), "out_features")
    units = size(attention, "heads") // shared
    producers = present(attention, "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    outputs = ("to_out.0", *present(attention, "to_add_out"))
    width = queries // units
    own = {"heads": shared, "sliceable_head_dim": shared, "inner_dim": width, "inner_kv_dim": width // shared}
    followers = [
        Size(module=name, attribute=attribute, factor=factor)
        for attribute, factor in own.items()
        if hasattr(attention, attribute)
    ]
    return Group(
        name=f"{name}.heads",
        kind="heads",
        block=block,
        units=units,
        width=width,
        producers=tuple(
            Producer(
                name=f"{name}.{producer}",
                free=shared == 1 and producer in ("to_v", "add_v_proj"),
                shared=1 if producer in ("to_q", "add_q_proj") else shared,
            )
            for producer in producers
        ),
        consumers=consumers or tuple(Consumer(name=f"{name}.{output}") for output in outputs),
        sizes=(*followers, *sizes),
    )


def require_unfused(attention: nn.Module, name: str) -> None:
    """Raises ModelError where the attention computes queries, keys and values by another linear than those."""
    if getattr(attention, "fused_projections", False):
        raise ModelError(f"{name}: its projections are fused; call unfuse_qkv_projections() before pruning")


def neurons(denoiser: nn.Module, name: str, *, block: int) -> Group:
    """The neurons of the feed-forward module of that name; a gated one (GEGLU, SwiGLU) holds each of them twice."""
    into, out = f"{name}.net.0.proj", f"{name}.net.2"
    units = size(denoiser.get_submodule(out), "in_features")
    parts = size(denoiser.get_submodule(into), "out_features") // units
    return neurons_between(name, (Producer(name=into, parts=parts),), Consumer(name=out), units=units, block=block)


def neurons_between(
    name: str, into: tuple[Producer, ...], out: Consumer, *, units: int, block: int, sizes: tuple[Size, ...] = ()
) -> Group:
    """The neurons between linears.

    Args:
        name: of what they are part of.
        into: give them.
        out: reads them.
        units: how many there are.
        block: index of their block.
        sizes: numbers in modules that follow.
    """
    return Group(
        name=f"{name}.neurons",
        kind="ffn",
        block=block,
        units=units,
        width=1,
        producers=into,
        consumers=(out,),
        sizes=sizes,
    )
