"""What goes into the linears, and comes out, over recorded calls: how far it reaches, and what clipping it costs.

Linears that read the same tensor get one scale. Every token of every call counts, but padding that is masked out, in
two rounds: the first finds the largest magnitudes, the second what rounding by each candidate scale loses.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from obsdiff import padding
from obsdiff.core import scales
from obsdiff.groups import LinearSpec
from obsdiff.padding import Masks
from obsdiff.trajectories import Call
from obsdiff_export.formats import Format, stored_scale
from obsdiff_runtime.errors import CalibrationError
from obsdiff_runtime.progress import Progress, silent

Rule = Literal["error", "largest", "percentile"]
"""How far codes reach: to where the error is least, to the largest magnitude, or to all but 1 in 10,000."""

PERCENTILE: Final = 0.9999
_BINS: Final = 4096


@dataclass(kw_only=True)
class Stream:
    """What was seen of one tensor that is to be rounded.

    Attributes:
        name: of a linear that reads it, or writes it, for messages.
        importance: (k,), of each channel: the energy of the weights that read it, or ones.
        largest: magnitude.
        moment: (k,), sum of squares over tokens.
        tokens: seen in the first round.
        candidates: scales to choose from, once the first round is over.
        errors: by candidate.
        counts: histogram of magnitudes between 0 and the largest.
    """

    name: str
    importance: Tensor
    largest: float = 0.0
    moment: Tensor = field(default_factory=lambda: torch.zeros(()))
    tokens: int = 0
    candidates: Tensor = field(default_factory=lambda: torch.zeros(0))
    errors: Tensor = field(default_factory=lambda: torch.zeros(0))
    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS))

    def measure(self, values: Tensor, where: str) -> None:
        """First round; values is (tokens, k)."""
        top = float(values.abs().max()) if values.numel() else 0.0
        if not top < float("inf"):
            raise CalibrationError(f"{self.name}: {where}: a value that is to be rounded is not finite")
        self.largest = max(self.largest, top)
        self.moment = self.moment + values.double().square().sum(0).cpu()
        self.tokens += len(values)

    def try_scales(self, values: Tensor, format: Format) -> None:
        """Second round; values is (tokens, k)."""
        found = scales.errors(values, self.importance, self.candidates.to(values.device), format.rounded)
        self.errors = self.errors + found if self.errors.numel() else found
        self.counts = self.counts + torch.histc(values.abs().float(), _BINS, 0.0, self.largest or 1.0).cpu()

    def scale(self, rule: Rule, format: Format, dtype: torch.dtype) -> Tensor:
        """The scale, () float32, by a rule."""
        if rule == "error":
            return self.candidates[int(self.errors.argmin())]
        reach = self.largest
        if rule == "percentile":
            inside = self.counts.double().cumsum(0) / self.counts.sum()
            reach *= (int(torch.searchsorted(inside, PERCENTILE)) + 1) / _BINS
        return stored_scale(torch.tensor(reach / format.largest), dtype)

    def loss(self, scale: Tensor) -> float:
        """Share of the weighted energy that rounding by the nearest candidate loses."""
        place = int((self.candidates - scale).abs().argmin())
        whole = float((self.moment.double() * self.importance.double().cpu()).sum())
        return float(self.errors[place]) / whole if whole else 0.0


@dataclass(frozen=True, kw_only=True)
class Streams:
    """Inputs by `LinearSpec.reads`, outputs by the linear's name; no outputs where none are to be rounded."""

    inputs: Mapping[str, Stream]
    outputs: Mapping[str, Stream]


@torch.no_grad()
def observe(
    denoiser: nn.Module,
    linears: Sequence[LinearSpec],
    calls: Sequence[Call],
    *,
    format: Format,
    dtype: torch.dtype,
    outputs: bool = False,
    progress: Progress = silent,
) -> Streams:
    """Runs the calls twice and watches the linears.

    Args:
        denoiser: as pruned, in float.
        linears: those to be quantised.
        calls: from `trajectories.record`.
        format: of the codes.
        dtype: of the graph, in which scales are stored.
        outputs: watch what the linears give, too.
        progress: told after every call.

    Raises:
        CalibrationError: a value is not finite, or no token reached a linear (names it).
    """
    found = _streams(denoiser, linears, outputs)
    every = [*found.inputs.values(), *found.outputs.values()]
    where = ""
    masks: Masks = {}

    def counted(linear: LinearSpec, values: Tensor) -> Tensor:
        mask = masks.get(linear.tokens)
        return values.flatten(0, -2) if mask is None else padding.unpadded(values, mask)

    def run(take: Callable[[Stream, Tensor], None], before: int) -> None:
        nonlocal where, masks
        with _watched(denoiser, linears, found, counted, take):
            for index, call in enumerate(calls):
                where, masks = f"step {call.step + 1}, {call.prompts}", call.masks
                args, kwargs = call.arguments
                denoiser(*args, **kwargs)
                progress("find ranges", before + index + 1, 2 * len(calls))

    run(lambda stream, values: stream.measure(values, where), 0)
    for stream in every:
        if not stream.tokens:
            raise CalibrationError(f"{stream.name}: no token reached this layer in {len(calls)} calls")
        stream.candidates = scales.candidates(
            torch.tensor(stream.largest), format.largest, lambda scale: stored_scale(scale, dtype)
        )
    run(lambda stream, values: stream.try_scales(values, format), len(calls))
    return found


def _streams(denoiser: nn.Module, linears: Sequence[LinearSpec], outputs: bool) -> Streams:
    inputs: dict[str, Stream] = {}
    written: dict[str, Stream] = {}
    for linear in linears:
        weight: Any = denoiser.get_submodule(linear.name).weight
        energy = weight.data.double().square().sum(0)  # (k,)
        if linear.reads in inputs:
            inputs[linear.reads].importance += energy
        else:
            inputs[linear.reads] = Stream(name=linear.name, importance=energy)
        if outputs:
            written[linear.name] = Stream(name=f"{linear.name}, output", importance=weight.data.new_ones(len(weight)))
    return Streams(inputs=inputs, outputs=written)


@contextmanager
def _watched(
    denoiser: nn.Module,
    linears: Sequence[LinearSpec],
    streams: Streams,
    counted: Callable[[LinearSpec, Tensor], Tensor],
    take: Callable[[Stream, Tensor], None],
) -> Iterator[None]:
    """Until the end, `take` is told what the linears read and give, (tokens, k): the tokens that are `counted`."""

    def read(linear: LinearSpec, source: Stream) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: take(source, counted(linear, args[0]))

    def write(linear: LinearSpec, sink: Stream) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda _, __, output: take(sink, counted(linear, output))

    leaders: set[str] = set()
    with ExitStack() as stack:
        for linear in linears:
            module = denoiser.get_submodule(linear.name)
            if linear.reads not in leaders:
                leaders.add(linear.reads)
                hook = read(linear, streams.inputs[linear.reads])
                stack.callback(module.register_forward_pre_hook(hook).remove)
            if linear.name in streams.outputs:
                stack.callback(module.register_forward_hook(write(linear, streams.outputs[linear.name])).remove)
        yield
