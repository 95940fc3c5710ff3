"""Whether what a family says of a denoiser is so: a small random one is run, and everything is compared with it.

The author of a family runs `problems` on it; docs/add-a-family.md shows how.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from obsdiff import costs, padding
from obsdiff.families import Family
from obsdiff.groups import Group
from obsdiff.sampling import velocity_of
from obsdiff.shrinking import columns, shrink
from obsdiff_export import parity
from obsdiff_export.component import Component
from obsdiff_export.onnx import export
from obsdiff_runtime.errors import ExportError, first_line

VAE_SCALE: Final = 8
TOLERANCE: Final = 1e-5
"""Relative; float32 sums over fewer terms in another order."""

_PIXELS: Final = 64


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A family, a denoiser of it, its component, and arguments of its forward: of the component's first example."""

    family: Family
    denoiser: nn.Module
    component: Component
    arguments: Mapping[str, Any]

    def run(self, denoiser: nn.Module) -> Tensor:
        with torch.no_grad():
            return velocity_of(denoiser, denoiser(**self.arguments, return_dict=False), self.arguments)

    def names(self) -> list[str]:
        return [linear.name for linear in self.family.linears(self.denoiser)]


def problems(family: Family, denoiser: nn.Module, *, onnx: bool = True) -> list[str]:
    """What the family says and the denoiser does not do; empty where all is right.

    Args:
        family: the module that describes the denoiser.
        denoiser: small, with random weights, in float32 and eval mode; two blocks of each kind are enough. It is as
            before afterwards.
        onnx: also export it and compare the graph with torch, which takes most of the time.

    Raises:
        ModelError: the family refuses the denoiser.
        MissingPackageError: onnxruntime is not installed, and `onnx` is true.
    """
    component = family.component(denoiser, height=_PIXELS, width=_PIXELS, vae_scale=VAE_SCALE)
    case = _Case(
        family=family,
        denoiser=denoiser,
        component=component,
        arguments=family.arguments(component.inputs),
    )
    facts: list[Callable[[_Case], Iterator[str]]] = [*FACTS, *([_parity] if onnx else [])]
    return [problem for fact in facts for problem in fact(case)]


def _readers(case: _Case) -> Iterator[str]:
    """Linears have a key in common exactly when they read the very same tensor."""
    seen: dict[str, int] = {}
    with _inputs(case.denoiser, case.names()) as found:
        case.run(case.denoiser)
        keys: dict[str, str] = {}
        for linear in case.family.linears(case.denoiser):
            if linear.name not in found:
                yield f"{linear.name}: a call of the denoiser does not run it"
                continue
            tensor = id(found[linear.name])
            if seen.setdefault(linear.reads, tensor) != tensor:
                yield f"{linear.name}: reads another tensor than the others whose `reads` is {linear.reads}"
            elif keys.setdefault(str(tensor), linear.reads) != linear.reads:
                yield f"{linear.name}: reads the tensor of {keys[str(tensor)]}, but its `reads` is {linear.reads}"


def _tokens(case: _Case) -> Iterator[str]:
    """Each linear runs over as many tokens as `tokens` says of its sequence, and `plan` counts."""
    latents = _latents(case)
    height, width = (side * VAE_SCALE for side in case.component.inputs[latents].shape[-2:])
    text = {
        case.component.inputs[name].shape[axis]
        for name, axes in case.component.dynamic_axes.items()
        for axis, symbol in axes.items()
        if symbol == "text_tokens"
    }
    config: Any = case.denoiser.config
    said = case.family.tokens(config, height=height, width=width, text_tokens=max(text, default=0), vae_scale=VAE_SCALE)
    counted = costs.positions(case.denoiser, case.arguments)
    rows = case.component.inputs[latents].shape[0]
    for linear in case.family.linears(case.denoiser):
        if counted.get(linear.name) != rows * said[linear.tokens]:
            yield (
                f"{linear.name}: runs over {counted.get(linear.name, 0) // rows} tokens, but `tokens` says "
                f"{said[linear.tokens]} of {linear.tokens}"
            )


def _padding(case: _Case) -> Iterator[str]:
    """What linears give at tokens that are masked out makes no difference."""
    family = case.family
    if family.text_mask is not None and family.text_mask not in case.arguments:
        yield f"text_mask: {family.text_mask} is no argument of the denoiser"
    masks = padding.masks(family, case.denoiser, case.arguments)
    if all(bool(mask.all()) for mask in masks.values()):
        return
    calm = case.run(case.denoiser)
    for linear in family.linears(case.denoiser):
        mask = masks.get(linear.tokens)
        if mask is None:
            continue

        def disturb(_: nn.Module, __: tuple[Any, ...], output: Tensor, mask: Tensor = mask) -> Tensor:
            return torch.where(mask[..., None], output, output + 1)

        handle = case.denoiser.get_submodule(linear.name).register_forward_hook(disturb)
        disturbed = case.run(case.denoiser)
        handle.remove()
        if not torch.equal(calm, disturbed):
            yield f"{linear.name}: the denoiser looks at tokens that {family.text_mask} masks out"


def _tiers(case: _Case) -> Iterator[str]:
    """Linears of a tier do not read one another's outputs."""
    tiers: dict[tuple[int, int], list[str]] = {}
    for linear in case.family.linears(case.denoiser):
        tiers.setdefault((linear.block, linear.tier), []).append(linear.name)
    with _inputs(case.denoiser, case.names()) as calm:
        case.run(case.denoiser)
    for (block, tier), names in tiers.items():
        handles = [
            case.denoiser.get_submodule(name).register_forward_hook(lambda _, __, output: output + 1) for name in names
        ]
        with _inputs(case.denoiser, names) as disturbed:
            case.run(case.denoiser)
        for handle in handles:
            handle.remove()
        for name in names:
            if name in calm and not torch.equal(calm[name], disturbed[name]):
                yield f"{name}: reads what another linear of its tier gives (block {block}, tier {tier})"


def _blocks(case: _Case) -> Iterator[str]:
    """Blocks are numbered from zero in the order in which they run."""
    blocks = {linear.name: linear.block for linear in case.family.linears(case.denoiser)}
    with _inputs(case.denoiser, list(blocks)) as found:
        case.run(case.denoiser)
    order = [blocks[name] for name in found]
    if order != sorted(order) or set(order) != set(range(max(order) + 1)):
        yield f"blocks: run in the order {list(dict.fromkeys(order))}"


def _groups(case: _Case) -> Iterator[str]:
    """A group's producers and consumers have exactly its units, and the units of a consumer lie side by side."""
    linears = {linear.name: linear for linear in case.family.linears(case.denoiser)}
    given: dict[str, list[int]] = {}
    read: dict[str, list[int]] = {}
    for group in case.family.groups(case.denoiser):
        size = group.units * group.width
        for producer in group.producers:
            rows = range(producer.start, producer.start + producer.parts * group.units * group.height(producer))
            given.setdefault(producer.name, []).extend(rows)
        for consumer in group.consumers:
            read.setdefault(consumer.name, []).extend(range(consumer.start, consumer.start + size))
    for name, places in given.items():
        found = len(case.denoiser.get_parameter(f"{name}.weight"))
        if sorted(places) != list(range(found)):
            yield f"groups: {name} gives {found} rows, not those {len(places)} that groups name"
    for name, places in read.items():
        if name not in linears:
            yield f"groups: {name} is none of the linears"
        elif sorted(places) != list(range(linears[name].in_features)):
            yield f"groups: of the {linears[name].in_features} columns of {name}, groups cover {len(set(places))}"


def _shrunk(case: _Case) -> Iterator[str]:
    """Cut, the denoiser computes what it does masked; on the meta device the same is left."""
    groups = case.family.groups(case.denoiser)
    keep = {group.name: _some(group, index) for index, group in enumerate(groups)}
    masked, cut = copy.deepcopy(case.denoiser), copy.deepcopy(case.denoiser)
    empty = copy.deepcopy(case.denoiser).to("meta")
    for group in groups:
        gone = sorted(set(range(group.units)) - set(keep[group.name]))
        for consumer in group.consumers:
            masked.get_parameter(f"{consumer.name}.weight").data[:, columns(group, gone, consumer.start)] = 0
    for model in (cut, empty):
        shrink(model, case.family, keep)
    for name, parameter in cut.named_parameters():
        if empty.get_parameter(name).shape != parameter.shape:
            yield f"{name}: is {tuple(empty.get_parameter(name).shape)} when cut on the meta device"
    left = {group.name: group.units for group in case.family.groups(cut)}
    yield from (
        f"{name}: {left.get(name)} units are left, not {len(units)}"
        for name, units in keep.items()
        if left.get(name) != len(units)
    )
    try:
        found = case.run(cut)
    except (RuntimeError, ValueError) as error:
        yield f"cut, the denoiser does not run: {first_line(error)}"
        return
    wanted = case.run(masked)
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    if not difference <= TOLERANCE:
        yield f"cut, the denoiser differs from the masked one by {difference:.2g}; allowed is {TOLERANCE:g}"


def _component(case: _Case) -> Iterator[str]:
    """The component gives latents as they came in, and its weights are the denoiser's own, by name."""
    own = dict(case.denoiser.named_parameters())
    yield from (
        f"component: {name} is no parameter of the denoiser, under that name"
        for name, parameter in case.component.module.named_parameters()
        if own.get(name) is not parameter
    )
    latents = _latents(case)
    for inputs in (case.component.inputs, *case.component.more_inputs):
        with torch.no_grad():
            found = case.component.module(**inputs)
        if found.shape != inputs[latents].shape:
            yield f"component: makes {tuple(found.shape)} of latents {tuple(inputs[latents].shape)}"


def _parity(case: _Case) -> Iterator[str]:
    """The graph computes what torch does, at every example's size."""
    with tempfile.TemporaryDirectory(prefix="obsdiff-") as folder:
        try:
            parity.compare(case.component, export(case.component, Path(folder), dtype=torch.float32))
        except ExportError as error:
            yield str(error)


FACTS: Final[Sequence[Callable[[_Case], Iterator[str]]]] = (
    *(_readers, _tokens, _padding, _tiers, _blocks),
    *(_groups, _shrunk, _component),
)


def _latents(case: _Case) -> str:
    """The component's input for latents: the only one that has sides."""
    return next(name for name, tensor in case.component.inputs.items() if tensor.ndim >= 4)


def _some(group: Group, index: int) -> list[int]:
    """A share of the units that differs from group to group: at least one, in order."""
    return list(range(index % 2, group.units, 2 + index % 3)) or [0]


@contextmanager
def _inputs(denoiser: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What those linears read, in the order in which they run, until the block ends."""
    found: dict[str, Tensor] = {}
    handles = [
        denoiser.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: found.__setitem__(name, inputs[0])
        )
        for name in names
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
