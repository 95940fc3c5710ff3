"""Forward passes that wait at the door of every block.

A call of the denoiser runs in a greenlet. Where it would enter a block it stops and hands out the block's arguments;
given a result, it goes on to the next. What a pass needs later (skip connections, embeddings) stays in its own frames,
so that any architecture can be streamed block by block without being taken apart, and nothing is computed twice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import CO_OPTIMIZED
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from obsdiff_runtime.errors import ModelError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class PausedPass:
    """One call of a denoiser whose blocks are `gated`, waiting at a block.

    Attributes:
        block: the module it waits at; None once the call is over.
        arguments: what the block would be called with.
        output: what the call returned; None before.
        results: what parts of the block gave, until it goes on; see replays.
    """

    def __init__(self, denoiser: nn.Module, arguments: Arguments) -> None:
        self.output: Any = None
        self.results: dict[str, list[Any]] = {}
        args, kwargs = arguments
        self._greenlet = greenlet(lambda: denoiser(*args, **kwargs))
        self._take(self._greenlet.switch())

    def resume(self, output: Any) -> None:
        """Goes on to the next block, with the result of the one it waited at."""
        self.results.clear()
        self._take(self._greenlet.switch(output))

    def tensors(self) -> list[Tensor]:
        """What it goes on with, as far as its frames show, and its results; of some the same memory."""
        found = [self.arguments, self.results]
        frame = self._greenlet.gr_frame
        while frame is not None:
            shown = frame.f_locals
            found.extend(shown.values())
            if isinstance(shown, dict) and frame.f_code.co_flags & CO_OPTIMIZED:
                shown.clear()  # of a function it is a copy, before Python 3.13, which would outlive what it shows
            frame = frame.f_back
        return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]

    def _take(self, handed: Any) -> None:
        self.block: nn.Module | None = None
        self.arguments: Arguments = ((), {})
        if self._greenlet.dead:
            self.output = handed
        else:
            self.block, self.arguments = handed


@contextmanager
def gated(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Until the end, these blocks are not run by the passes that reach them; see `PausedPass`."""
    try:
        for block in blocks:
            block.forward = _gate(block)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def run(block: nn.Module, arguments: Arguments) -> Any:
    """Runs a block, gated or not."""
    args, kwargs = arguments
    gate = block.__dict__.pop("forward", None)
    try:
        return block(*args, **kwargs)
    finally:
        if gate is not None:
            block.forward = gate


def check_at(passes: Sequence[PausedPass], block: nn.Module, name: str) -> None:
    """Raises ModelError where a pass does not wait at this block: it runs them in another order, or some twice."""
    if any(waiting.block is not block for waiting in passes):
        raise disordered(name)


def next_block(waiting: PausedPass, ahead: Mapping[int, nn.Module], names: Sequence[str]) -> int:
    """Key of the block that a pass goes on with, in the denoiser's own order; leaves the others in `ahead` as they are.

    Raises:
        ModelError: it goes on with none of those ahead.
    """
    found = [key for key, block in ahead.items() if block is waiting.block]
    if not found:
        raise disordered(names[min(ahead)])
    return found[0]


def check_over(passes: Sequence[PausedPass], name: str) -> None:
    """Raises ModelError where a pass still waits behind `name`, the last block."""
    if any(waiting.block is not None for waiting in passes):
        raise disordered(name)


def disordered(name: str) -> ModelError:
    """What to raise where a pass does not come to a block, or to it more than once."""
    return ModelError(
        f"{name}: the denoiser does not run its blocks once each, one after the other, so they cannot be streamed; "
        "use --method obsdiff"
    )


def _gate(block: nn.Module) -> Callable[..., Any]:
    def enter(*args: Any, **kwargs: Any) -> Any:
        parent = getcurrent().parent
        if parent is None:
            return run(block, (args, kwargs))
        return parent.switch((block, (args, kwargs)))

    return enter
