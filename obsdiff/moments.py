"""Moments of a tier of one block: what its linears read in the pruned model, what they compute in the dense one.

rows     of a denoiser call
x        a linear's input in the pruned stream, (tokens, in)
y        what it should compute: its output in the dense stream, (tokens, out), and what closes the streams' gap
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

from obsdiff import padding, pausing, pointwise, ranks
from obsdiff.core.gram import Gram, GramAccumulator, full_precision
from obsdiff.groups import ChunkGate, LinearSpec, ToldGate
from obsdiff.instead import instead
from obsdiff.methods import Target
from obsdiff.padding import Masks
from obsdiff.pausing import Arguments
from obsdiff.replays import Replay, within
from obsdiff.trajectories import Guidance
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
        parts = told.shape[1] if told.ndim == 4 else 1  # of the tokens, each with a gate of its own
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


class TierMoments:
    """Sums over the calls of a tier, one gram per distinct input.

    Args:
        linears: of one tier.
        device: of the sums.
        guidance: where it is, tokens of images count as the sampler combines them, too.
        share: what a combined token counts beside the two that it is made of.
    """

    def __init__(
        self,
        linears: Sequence[LinearSpec],
        device: torch.device,
        guidance: Guidance | None = None,
        share: float = 0.0,
    ) -> None:
        self._linears, self._guidance, self._share = linears, guidance if share else None, share
        self._leaders: dict[str, str] = {}
        for linear in linears:
            self._leaders.setdefault(linear.reads, linear.name)
        self._grams = {
            linear.reads: GramAccumulator(linear.in_features, device=device)
            for linear in linears
            if self._leaders[linear.reads] == linear.name
        }
        self._targets = {linear.name: _TargetSums(linear, device) for linear in linears}

    def add(self, dense: Glance, pruned: Glance, weight: float, *, paired: bool = True) -> None:
        """Counts one call.

        Args:
            dense: of the dense stream.
            pruned: of the pruned stream.
            weight: of each token.
            paired: whether the call's rows are those that `guidance` combines.

        Raises:
            CalibrationError: linears that should share an input do not, or a value is not finite (names the layer).
        """
        for linear in self._linears:
            name, leader = linear.name, self._leaders[linear.reads]
            if pruned.sources[name] != pruned.sources[leader]:
                raise CalibrationError(f"{name} and {leader} were taken to read the same input and do not")
            try:
                self._count(linear, dense, pruned, weight, paired)
            except CalibrationError as error:
                raise CalibrationError(f"{name}: {error}") from None

    def _count(self, linear: LinearSpec, dense: Glance, pruned: Glance, weight: float, paired: bool) -> None:
        name = linear.name
        x, y, pushed = _wide(pruned.inputs[name]), _wide(dense.outputs[name]), None
        if name in dense.bases:
            gate = _wide(torch.as_tensor(dense.gates.get(name, 1.0), device=y.device))
            pushed = gate * _wide(dense.bases[name] - pruned.bases[name])
        whole = x.ndim == 3  # with masked tokens left out, rows are no longer of one length
        if self._guidance is not None and paired and whole and linear.tokens != "text":
            mix = partial(self._guidance.spread, share=self._share)
            x, y, pushed = mix(x), mix(y), None if pushed is None else mix(pushed)
            weight *= 1 + self._share / 2
        rows = x.flatten(0, -2)  # (tokens, in)
        if self._leaders[linear.reads] == name:
            self._grams[linear.reads].add(rows, weight)
        self._targets[name].add(rows, y, weight)
        if pushed is not None:
            self._targets[name].add_gap(rows, y, pushed, gate, weight)

    def finish(self, repair: float) -> tuple[dict[str, Gram], dict[str, Target]]:
        """Grams by LinearSpec.reads, targets by linear, over the calls of all ranks.

        Args:
            repair: the share to make up for of what can be made up of a stream's error.
        """
        for gram in self._grams.values():
            ranks.add_up(gram.sums())
        for target in self._targets.values():
            ranks.add_up(target.sums())
        targets = {name: sums.target(repair) for name, sums in self._targets.items()}
        return {reads: sums.gram() for reads, sums in self._grams.items()}, targets


class _Products:
    """E[y x^T], E[y] and E[y^2] of some y."""

    def __init__(self, linear: LinearSpec, device: torch.device) -> None:
        self.cross = torch.zeros(linear.out_features, linear.in_features, dtype=torch.float64, device=device)
        self.sum = torch.zeros(linear.out_features, dtype=torch.float64, device=device)

    def add(self, x: Tensor, y: Tensor, weight: float) -> None:
        with full_precision():
            self.cross.add_(y.mT @ x, alpha=weight)
        self.sum.add_(y.sum(dim=0), alpha=weight)


class _TargetSums:
    """Moments of a linear's target: the dense output y, and what would close the gap of the residual streams.

    The residual stream in front of the linear is off by d, that of the dense model less that of the pruned one. With g
    the linear's gate, the output that makes up for it is y + d / g. Where g varies between calls, its
    least-squares weight is g^2, of which one gram for all channels can know the mean only: y + g d / E[g^2]. That adds
    u = g^2 d / E[g^2] to the stream, too much where g is large; a u comes closest to d where, channel by channel,
    a = E[u d] / E[u^2] = E[g^2 d^2] E[g^2] / E[g^4 d^2]. Of y + a g d / E[g^2], `repair` is the share that is taken.
    """

    def __init__(self, linear: LinearSpec, device: torch.device) -> None:
        self._linear, self._device = linear, device
        self._plain = _Products(linear, device)
        self._gap: _Products | None = None
        self._energies = torch.zeros(5, linear.out_features, dtype=torch.float64, device=device)
        self._weight = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor, y: Tensor, weight: float) -> None:
        """Counts x, (tokens, in), and y, (..., out) of as many tokens."""
        energy = _sum(y.square())
        if not bool(energy.isfinite().all()):
            raise CalibrationError("the dense model's output is not finite; are its weights?")
        self._plain.add(x, y.flatten(0, -2), weight)
        self._energies[0] += weight * energy
        self._weight += weight * len(x)

    def add_gap(self, x: Tensor, y: Tensor, pushed: Tensor, gate: Tensor, weight: float) -> None:
        """Counts g d, (rows, tokens, out) as y is, and the gate g beside it, at the tokens x, (tokens, in)."""
        if self._gap is None:
            self._gap = _Products(self._linear, self._device)
        energy, squares = pushed.square(), gate.square().expand_as(pushed)
        sums = [_sum(value) for value in (y * pushed, energy, squares, squares * energy)]
        if not bool(sums[1].isfinite().all()):
            raise CalibrationError("the residual stream it writes to is not finite; are the model's weights?")
        self._gap.add(x, pushed.flatten(0, -2), weight)
        self._energies[1:] += weight * torch.stack(sums)

    def sums(self) -> tuple[Tensor, ...]:
        """All there is, float64 and lent."""
        gap = () if self._gap is None else (self._gap.cross, self._gap.sum)
        return self._plain.cross, self._plain.sum, *gap, self._energies, self._weight

    def target(self, repair: float) -> Target:
        cross, mean, energy = self._plain.cross, self._plain.sum, self._energies[0]
        if self._gap is not None:
            share = repair * self._attainable()
            cross = cross + share[:, None] * self._gap.cross
            mean = mean + share * self._gap.sum
            energy = energy + 2 * share * self._energies[1] + share.square() * self._energies[2]
        return Target(cross=cross / self._weight, mean=mean / self._weight, energy=energy / self._weight)

    def _attainable(self) -> Tensor:
        """a / E[g^2] of each channel, (out,), float64; 0 where there is no gap or the gate is shut."""
        _, _, pushed, squares, steep = self._energies
        tiny = torch.finfo(torch.float64).tiny
        ideal = self._weight / squares.clamp_min(tiny)
        best = pushed / steep.clamp_min(tiny)
        return torch.minimum(best, ideal).masked_fill((squares == 0) | (steep == 0), 0)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _sum(value: Tensor) -> Tensor:
    """Over rows and tokens, (..., out) -> (out,), float64."""
    return value.sum(dim=tuple(range(value.ndim - 1))).double()


def spaced(value: Tensor) -> Tensor:
    """(rows, tokens, width) -> (rows, TOKENS at most, width), evenly spaced."""
    if value.ndim < 3 or value.shape[-2] <= TOKENS:
        return value
    places = torch.linspace(0, value.shape[-2] - 1, TOKENS, device=value.device).round().long()
    return value[..., places, :]
