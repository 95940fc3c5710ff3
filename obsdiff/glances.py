"""What is seen of one run of a block: inputs or outputs of linears, the streams they write to, their gates.

rows     of a denoiser call
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from obsdiff import padding, pausing, pointwise
from obsdiff.groups import ChunkGate, LinearSpec, ToldGate
from obsdiff.instead import instead
from obsdiff.padding import Masks
from obsdiff.pausing import Arguments
from obsdiff.replays import Replay, within
from obsdiff_runtime.errors import CalibrationError

TOKENS: Final = 256
"""Tokens of a row that count, evenly spaced; all where there are no more, and of text all that a mask shows."""


Wanted = Literal["inputs", "outputs", "result"]


class _Seen(Exception):  # noqa: N818
    """Everything that was asked for has been computed; the rest of the block need not run."""


@dataclass(frozen=True, kw_only=True)
class Glance:
    """What was seen of one run of a block, by linear, at the tokens that count.

    Of linears whose sequence is masked, rows and tokens are one: (rows * tokens in the mask, width) each.

    Attributes:
        inputs: (rows, tokens, in), where these were wanted.
        outputs: (rows, tokens, out), where these were.
        bases: where the linear writes to a residual stream, that stream before it, (rows, tokens, out).
        gates: where there is a base, (rows, 1 or tokens, out), or the number 1.
        sources: address and shape of the input, the same for linears that read the very same tensor.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    bases: Mapping[str, Tensor]
    gates: Mapping[str, Tensor | float]
    sources: Mapping[str, tuple[int, torch.Size]]


def glance(
    block: nn.Module,
    name: str,
    linears: Sequence[LinearSpec],
    arguments: Arguments,
    *,
    want: Wanted,
    streams: bool,
    masks: Masks = MappingProxyType({}),
    idle: Sequence[LinearSpec] = (),
    replay: Replay | None = None,
) -> tuple[Glance, Any]:
    """Runs a block until everything asked for has been computed.

    Args:
        block: gated or not.
        name: of the block in the denoiser.
        linears: of one tier of this block.
        arguments: of the call.
        want: the linears' inputs, for which they are not computed; or their outputs; or those and the block's result.
        streams: whether residual streams are wanted too.
        masks: of the denoiser's call.
        idle: linears on which nothing that is wanted depends; they are not computed either.
        replay: of parts that ran before on these arguments.

    Returns:
        what was seen, and what the block gave, None where it was not run to its end.

    Raises:
        CalibrationError: something was not reached.
    """
    replay = replay or Replay({}, {})
    idle = (*idle, *(linears if want == "inputs" else ()))
    look = _Look(block, name, linears, idle, want=want, streams=streams, masks=masks, replay=replay)
    result: Any = None
    with look.hooked(), suppress(_Seen):
        result = pausing.run(block, arguments)
    return look.glance(), result


class _Look:
    """Hooks on one run of a block."""

    def __init__(
        self,
        block: nn.Module,
        name: str,
        linears: Sequence[LinearSpec],
        idle: Sequence[LinearSpec],
        *,
        want: Wanted,
        streams: bool,
        masks: Masks,
        replay: Replay,
    ) -> None:
        self._block, self._name, self._linears, self._idle = block, name, linears, idle
        self._want, self._replay = want, replay
        self._writes = {linear.name: linear.writes for linear in linears if streams and linear.writes is not None}
        self._masks = {linear.name: masks[linear.tokens] for linear in linears if linear.tokens in masks}
        self._joint = {linear.name for linear in linears if linear.tokens == "joint"}
        for name in self._masks.keys() & self._joint:
            self._masks[name] = spaced(self._masks[name][..., None])[..., 0]
        self._values: dict[str, Tensor] = {}
        self._bases: dict[str, Tensor] = {}
        self._gates: dict[str, Tensor | float] = {}
        self._seconds: dict[str, Tensor] = {}
        self._sources: dict[str, tuple[int, torch.Size]] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        streams = {name: self._module(write.stream) for name, write in self._writes.items()}
        gates = {
            name: self._module(_gate_module(write.gate))
            for name, write in self._writes.items()
            if write.gate is not None
        }
        watched = {*streams.values(), *gates.values()} - {self._block}
        with self._replay.on(watched, self._stop), ExitStack() as stack:
            for linear in self._linears:
                module = self._module(linear.name)
                if self._want == "inputs":
                    stack.callback(module.register_forward_pre_hook(partial(self._see_input, linear.name)).remove)
                else:
                    stack.callback(module.register_forward_hook(partial(self._see_output, linear.name)).remove)
            for module in {self._module(linear.name) for linear in self._idle}:
                stack.enter_context(instead(module, "forward", partial(pointwise.nothing, module)))
            for name, stream in streams.items():
                see: Any = partial(self._see_stream, name)
                stack.callback(stream.register_forward_pre_hook(see, with_kwargs=True).remove)
            for name, module in gates.items():
                gate = self._writes[name].gate
                if isinstance(gate, ToldGate):
                    see = partial(self._see_told_gate, name, gate)
                    stack.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
                elif isinstance(gate, ChunkGate):
                    see = partial(self._see_chunk_gate, name, gate)
                    stack.callback(module.register_forward_hook(see).remove)
                    told = partial(self._see_halves, name, gate.told)
                    stack.callback(self._block.register_forward_pre_hook(told, with_kwargs=True).remove)
                elif gate is not None:
                    see = partial(self._see_gate, name, gate[1])
                    stack.callback(module.register_forward_hook(see).remove)
            yield

    def glance(self) -> Glance:
        missed = [each.name for each in self._linears if each.name not in self._values]
        if missed:
            raise CalibrationError(f"{missed[0]}: no token reached this layer; leave it out with --exclude")
        inputs, outputs = (self._values, {}) if self._want == "inputs" else ({}, self._values)
        return Glance(inputs=inputs, outputs=outputs, bases=self._bases, gates=self._gates, sources=self._sources)

    def _module(self, name: str) -> nn.Module:
        return within(self._block, self._name, name)

    def _see_input(self, name: str, linear: nn.Module, args: tuple[Any, ...]) -> None:
        self._values[name] = self._counted(name, pointwise.tokens(linear, args[0]))
        self._sources[name] = args[0].data_ptr(), args[0].shape
        self._stop()

    def _see_output(self, name: str, linear: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
        self._values[name] = self._counted(name, pointwise.tokens(linear, output))
        self._stop()

    def _stop(self) -> None:
        """Ends the run where nothing more is wanted of it; a part whose result will be kept runs to its end."""
        if len(self._values) == len(self._linears) and self._want != "result" and not self._replay.keeping:
            raise _Seen

    def _see_stream(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._bases[name] = self._counted(name, args[0] if args else next(iter(kwargs.values())))

    def _see_gate(self, name: str, place: int, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._gates[name] = self._spread(name, output[place])

    def _see_chunk_gate(self, name: str, gate: ChunkGate, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        found, second = output.chunk(gate.chunks, dim=-1)[gate.chunk], self._seconds.get(name)
        if second is None:
            self._gates[name] = self._spread(name, found)
        else:
            one, other = (half.unsqueeze(1) for half in found.chunk(2))
            self._gates[name] = self._counted(name, torch.where(second[..., None], other, one))

    def _see_halves(
        self, name: str, told: str | None, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        halves = None if told is None else _given(block, args, kwargs).get(told)
        if halves is not None:
            self._seconds[name] = halves != 0

    def _see_told_gate(
        self, name: str, gate: ToldGate, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = _given(block, args, kwargs)
        out, told = pointwise.widths(self._module(name))[1], given[gate.told]
        parted = told.ndim == 4 or (told.ndim == 3 and told.shape[2] != out)
        parts = told.shape[1] if parted else 1  # of the tokens, each with a gate of its own
        told = told.reshape(len(told), parts, -1, out)
        if gate.table is not None:
            told = block.get_parameter(gate.table) + told
        found = told[:, :, gate.row]  # (rows, parts, out)
        if parts == 1:
            self._gates[name] = self._spread(name, found[:, 0])
        else:
            tokens = (args[0] if args else next(iter(kwargs.values()))).shape[1]
            self._gates[name] = self._counted(name, found.repeat_interleave(tokens // parts, dim=1))

    def _counted(self, name: str, value: Tensor) -> Tensor:
        """Of (rows, tokens, width) the tokens that count."""
        if name not in self._masks or name in self._joint:
            value = spaced(value)
        if name not in self._masks:
            return value
        try:
            return padding.unpadded(value, self._masks[name])
        except CalibrationError as error:
            raise CalibrationError(f"{name}: {error}") from None

    def _spread(self, name: str, gate: Tensor) -> Tensor:
        """A gate (rows, out) beside the tokens that count."""
        if name not in self._masks:
            return gate.unsqueeze(1)
        return gate[self._masks[name].to(gate.device).nonzero()[:, 0]]


def _gate_module(gate: tuple[str, int] | ToldGate | ChunkGate) -> str:
    """Name of the module at whose call the gate is seen."""
    if isinstance(gate, ToldGate):
        return gate.block
    return gate.module if isinstance(gate, ChunkGate) else gate[0]


def _given(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a block's call, by name."""
    return inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments


def spaced(value: Tensor) -> Tensor:
    """(rows, tokens, width) -> (rows, TOKENS at most, width), evenly spaced."""
    if value.ndim < 3 or value.shape[-2] <= TOKENS:
        return value
    places = torch.linspace(0, value.shape[-2] - 1, TOKENS, device=value.device).round().long()
    return value[..., places, :]
