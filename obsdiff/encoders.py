"""Text encoders that lie in their files: what is in no block is there, and a block comes when it runs, and goes.

A T5-XXL takes 19 GB in float32, and is run before anything is pruned and not again until pictures are compared.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import diffusers
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from obsdiff import costs
from obsdiff_export.stored import StoredParameter, values

LEAST: Final = 2**30
"""Bytes in float32 of the smallest that are left in their files: others are read again and again for little."""

_AWAY: Final = "_obsdiff_file"
_SETTLED: Final = "_obsdiff_settled"
_READ: Final = "text_encoder"
"""What names of these begin with in a pipeline."""

log = logging.getLogger(__name__)


def reads(name: str) -> bool:
    """Whether a component of that name reads prompts."""
    return name.startswith(_READ)


def is_large(encoder: nn.Module) -> bool:
    """Whether it is worth the reading to leave it in its files."""
    return 4 * costs.parameters(encoder) >= LEAST


def settle(encoder: nn.Module) -> None:
    """Lets an encoder whose parameters are stored ones compute, in float32. Changes it."""
    blocks = list(_blocks(encoder))
    inside = {id(part) for block in blocks for part in block.modules()}
    _fill([part for part in encoder.modules() if id(part) not in inside])
    for block in blocks:
        block.__dict__[_SETTLED] = True
        block.register_forward_pre_hook(lambda block, _: _come(block))
        block.register_forward_hook(lambda block, *_: _go(block), always_call=True)


def is_settled(module: nn.Module) -> bool:
    """Whether it is an encoder that computes all the same, or a view of one."""
    return any(_SETTLED in part.__dict__ for part in module.modules())


def bytes_beside(configs: Mapping[str, Mapping[str, Any]], without: Collection[str], *, settled: bool) -> int:
    """Of a pipeline's networks, in float32, those that are there while its denoisers are pruned.

    Args:
        configs: of its components by name, and "model_index".
        without: components that do not count, its denoisers.
        settled: its text encoders lie in their files, and one block of the largest is there.
    """
    total = 0
    for name, entry in configs.get("model_index", {}).items():
        if name in without or name not in configs or not isinstance(entry, list):
            continue
        network = _empty(name, str(entry[0]), str(entry[1]), configs[name])
        if network is not None:
            rests = settled and reads(name) and is_large(network)
            total += _settled_bytes(network) if rests else costs.weight_bytes(network)
    return total


def _empty(name: str, library: str, kind: str, config: Mapping[str, Any]) -> nn.Module | None:
    """A network on the meta device; None where it is none, or its configuration does not make one."""
    made: Any = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), kind, None)
    if made is None or not issubclass(made, nn.Module):
        return None
    try:
        with torch.device("meta"):
            if library == "diffusers":
                return made.from_config(dict(config))  # type: ignore[no-any-return]
            return made(made.config_class.from_dict(dict(config)))  # type: ignore[no-any-return]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, StrictDataclassError) as error:
        log.warning("what the %s takes is not known: %s", name, error)
        return None


def _settled_bytes(encoder: nn.Module) -> int:
    blocks = [costs.weight_bytes(block) for block in _blocks(encoder)]
    return costs.weight_bytes(encoder) - sum(blocks) + max(blocks, default=0)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Those of the outermost lists."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)


def _fill(parts: list[nn.Module]) -> None:
    """Parameters that are the same stay the same."""
    made: dict[int, nn.Parameter] = {}
    for part in parts:
        for leaf, parameter in part._parameters.items():
            if isinstance(parameter, StoredParameter):
                if id(parameter) not in made:
                    made[id(parameter)] = _real(parameter)
                part._parameters[leaf] = made[id(parameter)]


def _come(block: nn.Module) -> None:
    away = []
    for part in block.modules():
        for leaf, parameter in part._parameters.items():
            if isinstance(parameter, StoredParameter):
                away.append((part._parameters, leaf, parameter))
                part._parameters[leaf] = _real(parameter)
    block.__dict__[_AWAY] = away


def _go(block: nn.Module) -> None:
    for leaves, leaf, parameter in block.__dict__.pop(_AWAY, ()):
        leaves[leaf] = parameter


def _real(parameter: StoredParameter) -> nn.Parameter:
    found = values(parameter)
    return nn.Parameter(found.float() if found.is_floating_point() else found, requires_grad=False)
