"""How far a pruned denoiser's residual streams are from the dense one's, block by block, on the same inputs.

B       prompts in a batch
rows    of a denoiser call: B, or a multiple of it where guidance stacks negative and positive prompts
stream  a tensor that a block hands on: image tokens, text tokens, or both
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final

import torch
from torch import Tensor, nn

from obsdiff.groups import LinearSpec
from obsdiff_runtime.errors import CalibrationError

TOKENS: Final = 1024
"""Tokens of a stream that are compared, evenly spaced; all where there are no more. Bounds memory: the dense streams of
all blocks are held for one call."""


@dataclass
class Clock:
    """The sampler's step at hand; whoever follows the sampler moves it on."""

    step: int = 0


def block_modules(linears: Sequence[LinearSpec]) -> tuple[str, ...]:
    """Name of each block's module, in forward order: what its linears and the streams they write to lie in."""
    paths: dict[int, list[list[str]]] = defaultdict(list)
    for linear in linears:
        inside = [linear.name] if linear.writes is None else [linear.name, linear.writes.stream]
        paths[linear.block] += [name.split(".")[:-1] for name in inside]
    return tuple(".".join(_common(names)) for _, names in sorted(paths.items()))


def _common(paths: Sequence[Sequence[str]]) -> list[str]:
    return [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]


class BlockErrors:
    """Squared norms of h_pruned - h_dense and of h_dense after each block, per prompt and step, summed over calls and
    rows.

    A block's streams are kept apart, so that one with large values does not hide another.
    """

    def __init__(self, blocks: Sequence[str], prompts: int, steps: int, clock: Clock) -> None:
        self._blocks, self._clock = tuple(blocks), clock
        self._shape = (2, prompts, steps)  # difference and dense
        self._energies: dict[str, list[Tensor]] = {name: [] for name in blocks}
        self._dense: dict[str, list[Tensor]] = {}

    @contextmanager
    def watching(self, dense: nn.Module, pruned: nn.Module) -> Iterator[None]:
        """Until the block ends: each call of `dense` must be followed by one of `pruned` on the same inputs."""

        def keep(name: str) -> Any:
            return lambda _, __, output: self._dense.__setitem__(name, _streams(output))

        def compare(name: str) -> Any:
            return lambda _, __, output: self._add(name, _streams(output))

        with ExitStack() as stack:
            for name in self._blocks:
                for denoiser, hook in ((dense, keep(name)), (pruned, compare(name))):
                    stack.callback(denoiser.get_submodule(name).register_forward_hook(hook).remove)
            yield

    def _add(self, name: str, pruned: list[Tensor]) -> None:
        totals = self._energies[name]
        for stream, (before, after) in enumerate(zip(self._dense.pop(name), pruned, strict=True)):
            if stream == len(totals):
                totals.append(torch.zeros(self._shape, dtype=torch.float64))
            for total, value in zip(totals[stream], (after.double() - before.double(), before.double()), strict=True):
                energy = value.flatten(1).square().sum(1)  # (rows,)
                total[:, self._clock.step] += energy.view(-1, len(total)).sum(0).cpu()

    def curves(self, prompts: Sequence[str]) -> Tensor:
        """|h_pruned - h_dense|^2 / |h_dense|^2, mean over a block's streams, (blocks, B, steps).

        Raises:
            CalibrationError: a dense stream is exactly zero.
        """
        found = []
        for name, totals in self._energies.items():
            difference, dense = torch.stack(totals, 1)  # (streams, B, steps) each
            if not (dense > 0).all():
                _, row, step = (int(index) for index in torch.nonzero(dense == 0)[0])
                raise CalibrationError(
                    f"{name}, step {step + 1}, prompt {prompts[row]!r}: the dense block hands on exactly zero, so no"
                    " relative error exists; is the model trained?"
                )
            found.append((difference / dense).mean(0))
        return torch.stack(found)


def _streams(output: Any) -> list[Tensor]:
    """A copy of the tensors a block gives, (rows, tokens, width) each, with at most TOKENS tokens."""
    given = (output,) if isinstance(output, Tensor) else output
    return [_spaced(tensor.detach()) for tensor in given if isinstance(tensor, Tensor)]


def _spaced(stream: Tensor) -> Tensor:
    flat = stream.flatten(1, -2) if stream.ndim > 2 else stream.unsqueeze(1)  # (rows, tokens, width)
    tokens = flat.shape[1]
    if tokens <= TOKENS:
        return flat.clone()
    return flat[:, torch.linspace(0, tokens - 1, TOKENS, device=flat.device).round().long()]
