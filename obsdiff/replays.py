"""Parts of a block that need not run again: its attention, while the feed-forward behind it is being pruned.

A block is run once for every tier, on the same arguments. A part of it (a child module) that has returned before
anything ran that will still change gives the same ever after; so that is kept, and given again.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from obsdiff.groups import LinearSpec
from obsdiff.instead import instead

Results = dict[str, list[Any]]
"""What each part gave in runs of its block on the same arguments, call by call."""


class Part:
    """A child module of a block, and all that lies inside of it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.inside = module, frozenset(module.modules()) - {module}

    def holds(self, modules: Collection[nn.Module]) -> bool:
        """Whether one of these is it, or lies in it."""
        return self.module in modules or not self.inside.isdisjoint(modules)


def parts(block: nn.Module, name: str, linears: Sequence[LinearSpec]) -> dict[str, Part]:
    """The parts of a block that hold some of its linears, by name."""
    found = {part for linear in linears if (part := part_of(name, linear)) is not None}
    return {part: Part(block.get_submodule(part)) for part in sorted(found)}


def part_of(block: str, linear: LinearSpec) -> str | None:
    """Name of the block's child that a linear of it lies in; None where it is a child itself."""
    child, _, inside = linear.name.removeprefix(f"{block}.").partition(".")
    return child if inside else None


def within(block: nn.Module, name: str, path: str) -> nn.Module:
    """A module of the denoiser that is the block of that name, or lies in it, in this block or copy of it."""
    return block if path == name else block.get_submodule(path.removeprefix(f"{name}."))


class Replay:
    """One run of a block in which its parts give what they gave before.

    Args:
        parts: see `parts`.
        results: of earlier runs; what this one adds is put there.
        unsettled: modules of the block that later runs will find changed, or will look into.
    """

    def __init__(self, parts: Mapping[str, Part], results: Results, unsettled: Collection[nn.Module] = ()) -> None:
        self._results, self._unsettled, self._adds = results, set(unsettled), True
        self._parts = {name: part for name, part in parts.items() if not part.holds(self._unsettled)}
        self._running = False

    @property
    def keeping(self) -> bool:
        """Whether a part is running whose result will be kept."""
        return self._adds and self._running

    @contextmanager
    def on(self, watched: Collection[nn.Module] = (), returned: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Until the end, parts are answered from the results, but for those inside which a module is watched.

        `returned` is called when a part has run all the same.
        """
        with ExitStack() as stack:
            for module in self._unsettled:
                stack.callback(module.register_forward_pre_hook(self._unsettle).remove)
            for name, part in self._parts.items():
                if part.inside.isdisjoint(watched):
                    known = iter(self._results.get(name, [])[:])
                    answer = partial(self._answer, part.module.forward, known, name, returned)
                    stack.enter_context(instead(part.module, "forward", answer))
            yield

    def _answer(
        self,
        run: Callable[..., Any],
        known: Iterator[Any],
        name: str,
        returned: Callable[[], None],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        for result in known:
            return result
        self._running = True
        result = run(*args, **kwargs)
        self._running = False
        if self._adds:
            self._results.setdefault(name, []).append(result)
        returned()
        return result

    def _unsettle(self, *_: Any) -> None:
        self._adds = False
