"""Any transformer that no other family describes: what can be pruned without knowing how it is put together.

Its blocks are the children of the module lists that hang on the denoiser. Their linears can lose single weights, N:M or
unstructured; each has a gram of its own, since nobody says which of them read the same tensor. Left alone are linears
whose name says that they read the timestep: those in norms, modulations and embeddings. Where the denoiser takes a mask
of its text, keys and values of a cross-attention are taken to read that text, and padding does not count in them; where
text and image are one sequence, it does. Which rows and columns would make up a head, how the denoiser is called and
what the runtime would have to know is not said here, so units are not removed and nothing is exported;
docs/add-a-family.md says how to describe it.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff.families import HELP, layers, parts
from obsdiff.groups import Group, LinearSpec
from obsdiff_export.component import Component
from obsdiff_runtime.errors import ModelError

name: str = "generic"
denoiser: str = "transformer"
classes: tuple[str, ...] = ()
pipeline: str = ""
protect: tuple[int, int] = (1, 1)
vae_scale: int = parts.VAE_SCALE
negatives: bool = False
negative_first: bool = True
described: bool = False
text_mask: str | None = "encoder_attention_mask"

_TIMED: Final = re.compile(r"norm|embed|time|mod(ulation)?$", flags=re.IGNORECASE)
"""In a part of a name: the linear reads the timestep, one row for an image."""

_PROJECTIONS: Final = frozenset({"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"})
_TEXT: Final = frozenset({"to_k", "to_v"})
"""Of a cross-attention: they read the text."""


def linears(denoiser: nn.Module) -> tuple[LinearSpec, ...]:
    """See `Family.linears`. Every linear is a tier of its own, but those into one attention's heads.

    Raises:
        ModelError: there is none.
    """
    found: list[LinearSpec] = []
    masked = text_mask in inspect.signature(denoiser.forward).parameters
    for block, prefix in enumerate(_blocks(denoiser)):
        tiers: dict[str, int] = {}
        for linear in _linears_of(denoiser.get_submodule(prefix)):
            parent, _, leaf = linear.rpartition(".")
            tier = tiers.setdefault(parent if leaf in _PROJECTIONS else linear, len(tiers))
            name = f"{prefix}.{linear}"
            tokens = "text" if masked and leaf in _TEXT and _crosses(denoiser, f"{prefix}.{parent}") else "image"
            found.append(layers.linear(denoiser, name, block=block, tier=tier, reads=name, tokens=tokens))
    if not found:
        raise ModelError(
            f"no family describes a {type(denoiser).__name__}, and it has no lists of blocks whose linears could be "
            f"pruned all the same; {HELP}"
        )
    return tuple(found)


def groups(denoiser: nn.Module) -> tuple[Group, ...]:
    """See `Family.groups`: none."""
    return ()


def tokens(
    config: Mapping[str, Any], *, height: int, width: int, text_tokens: int, vae_scale: int = 8
) -> dict[str, int]:
    """See `Family.tokens`: "image", one token per patch, as an estimate for every linear, "text" too."""
    patch = config.get("patch_size") or 1
    side = vae_scale * int(patch if isinstance(patch, int) else patch[-1])
    patches = max(1, height // side) * max(1, width // side)
    return {"image": patches, "text": patches}


def text_tokens(configs: Mapping[str, Mapping[str, Any]], max_sequence_length: int | None) -> int:
    """See `Family.text_tokens`."""
    return max_sequence_length or 0


def latent_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """See `Family.latent_size`."""
    return parts.sample_size(config)


def encode(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    negative: Sequence[str],
    *,
    max_sequence_length: int | None = None,
) -> dict[str, Tensor]:
    """See `Family.encode`: nothing, the pipeline reads prompts in its call, which has arguments of its own for them.

    Raises:
        ModelError: it does not draw a picture of a prompt.
    """
    arguments = inspect.signature(type(pipeline).__call__).parameters
    lacking = [name for name in ("prompt", "height", "width", "guidance_scale") if name not in arguments]
    if lacking:
        raise ModelError(
            f"{type(pipeline).__name__} has no {lacking[0]}, and of a denoiser that no family describes only pipelines "
            f"that draw a picture or a film of a prompt are known; {HELP}"
        )
    return {}


def example(
    denoiser: nn.Module, *, batch: int, size: tuple[int, ...], text_tokens: int, pixels: tuple[int, int]
) -> dict[str, Tensor]:
    """See `Family.example`; raises ModelError."""
    _refuse(denoiser)


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """See `Family.arguments`."""
    return dict(inputs)


def component(denoiser: nn.Module, *, height: int, width: int, vae_scale: int = 8) -> Component:
    """See `Family.component`; raises ModelError."""
    _refuse(denoiser)


def _refuse(denoiser: nn.Module) -> NoReturn:
    raise ModelError(f"how {type(denoiser).__name__} is called is not known, as no family describes it; {HELP}")


def _blocks(denoiser: nn.Module) -> Iterator[str]:
    """Names of the blocks in which something can be pruned."""
    for stage, modules in denoiser.named_children():
        if isinstance(modules, nn.ModuleList):
            yield from (f"{stage}.{child}" for child, module in modules.named_children() if any(_linears_of(module)))


def _crosses(denoiser: nn.Module, attention: str) -> bool:
    return bool(getattr(denoiser.get_submodule(attention), "is_cross_attention", False))


def _linears_of(block: nn.Module) -> Iterator[str]:
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and not any(_TIMED.search(part) for part in name.split(".")):
            yield name
