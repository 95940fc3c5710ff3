"""SD3-medium with random weights, dense, 2:4 and shrunk: real shapes, no download.

Times do not depend on the values of weights; nothing here says anything of quality.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from gpu.rows import Options
from obsdiff.families import sd3
from obsdiff.shrinking import shrink
from obsdiff_export import semi_structured
from obsdiff_export.linears import Shape
from obsdiff_export.measuring import FEWEST
from obsdiff_export.semi_structured import Algorithms, Compress
from obsdiff_runtime.errors import CompatibilityError

CONFIG = Path(__file__).resolve().parents[2] / "tests/obsdiff/configs/sd3_medium.json"
TINY = {
    "sample_size": 16,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 16,
}
ALIGN = 64
SHARES = (0.25, 0.15, 0.20, 0.30)
ROWS = 2
TEXT_TOKENS = 333


@dataclass(frozen=True)
class Variant:
    """A pruned model: what it is called, and how it is made of the dense one."""

    name: str
    make: Callable[[nn.Module], nn.Module]


def dense(options: Options, layers: int | None = None) -> nn.Module:
    """SD3-medium in bfloat16 (float32 on a CPU), in eval mode; `layers` blocks, or all."""
    config = {**json.loads(CONFIG.read_text(encoding="utf-8")), **(TINY if options.tiny else {})}
    if layers is not None:
        config["num_layers"] = layers
    torch.manual_seed(0)
    with torch.device(options.device):
        model: nn.Module = SD3Transformer2DModel.from_config(config)
    return model.to(torch.bfloat16 if options.device == "cuda" else torch.float32).eval().requires_grad_(False)


def variants(options: Options, compress: Compress, algorithms: Algorithms | None) -> list[Variant]:
    """In the order in which they are tried."""
    shares = SHARES[:1] if options.quick or options.tiny else SHARES
    align = 8 if options.tiny else ALIGN
    found = [Variant("2:4", lambda model: two_of_four(model, inputs(model, options), compress, algorithms))]
    if options.device == "cuda":
        found.append(Variant("2:4 where faster", lambda model: where_faster(model, inputs(model, options), algorithms)))
    found += [Variant(f"{share:.0%} smaller", _shrinker(share, align)) for share in shares]
    return [*found, Variant(f"{shares[-1]:.0%} smaller, unaligned", _shrinker(shares[-1], 1))]


def _shrinker(share: float, align: int) -> Callable[[nn.Module], nn.Module]:
    return lambda model: shrunk(model, share, align)


def shrunk(model: nn.Module, share: float, align: int) -> nn.Module:
    """A copy without this share of the heads and neurons of every block; neurons in multiples of `align`."""
    copied = copy.deepcopy(model)
    keep = {}
    for group in sd3.groups(copied):
        exact = group.units * (1 - share)
        step = align if group.kind == "ffn" else 1
        keep[group.name] = range(max(step, round(exact / step) * step))
    shrink(copied, sd3, keep)
    return copied


def two_of_four(
    model: nn.Module, example: dict[str, Tensor], compress: Compress, algorithms: Algorithms | None
) -> nn.Module:
    """A copy whose prunable linears hold 2:4 weights, as semi-structured tensors of the best algorithm."""
    copied = _forced(model)
    for name, count in _tokens(copied, example).items():
        linear: Any = copied.get_submodule(name)
        shape = Shape(count, linear.in_features, linear.out_features)
        algorithm = 0 if algorithms is None else algorithms.best(shape)
        semi_structured.give(linear, compress(linear.weight.detach(), algorithm))
    return copied


def where_faster(model: nn.Module, example: dict[str, Tensor], algorithms: Algorithms | None) -> nn.Module:
    """The same, where that was timed faster."""
    copied = _forced(model)
    semi_structured.use_where_faster(copied, _tokens(copied, example), algorithms=algorithms, rounds=FEWEST)
    return copied


def _forced(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    for spec in sd3.linears(copied):
        linear: Any = copied.get_submodule(spec.name)
        linear.weight = nn.Parameter(forced(linear.weight), requires_grad=False)
    return copied


def forced(weight: Tensor) -> Tensor:
    """The weight with the two smallest of every four along k set to zero."""
    groups = weight.detach().clone().view(weight.shape[0], -1, 4)
    return groups.scatter(-1, groups.abs().argsort(-1)[..., :2], 0.0).view(weight.shape)


def inputs(model: nn.Module, options: Options) -> dict[str, Tensor]:
    """Of one guided call at 1024 x 1024 pixels: 2 rows of 4096 image and 333 text tokens."""
    pixels = 64 if options.tiny else 1024
    example = sd3.example(
        model,
        batch=ROWS,
        size=(pixels // 8, pixels // 8),
        text_tokens=6 if options.tiny else TEXT_TOKENS,
        pixels=(pixels, pixels),
    )
    return {name: tensor.to(options.device) for name, tensor in example.items()}


def block_inputs(model: nn.Module, example: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the first block is called with in such a call."""
    found: dict[str, Tensor] = {}

    def note(block: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.update({name: value for name, value in named.items() if isinstance(value, Tensor)})

    blocks: Any = model.transformer_blocks
    hook = blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**example)
    finally:
        hook.remove()
    if not found:
        raise CompatibilityError("this diffusers calls SD3's blocks otherwise than by name")
    return found


def compiled(model: nn.Module, backend: str) -> nn.Module:
    """The same model, its blocks compiled; one graph serves all blocks that are alike."""
    view = copy.copy(model)
    view._modules = dict(model._modules)
    blocks: Any = model.transformer_blocks
    made: list[Any] = [torch.compile(block, dynamic=False, backend=backend) for block in blocks]
    view.transformer_blocks = nn.ModuleList(made)
    return view


def _tokens(model: nn.Module, example: dict[str, Tensor]) -> dict[str, int]:
    """Rows of the matrix that each prunable linear multiplies in a call."""
    found: dict[str, int] = {}
    hooks = []
    for spec in sd3.linears(model):

        def note(linear: nn.Module, given: tuple[Tensor, ...], name: str = spec.name) -> None:
            found[name] = given[0].numel() // given[0].shape[-1]

        hooks.append(model.get_submodule(spec.name).register_forward_pre_hook(note))
    try:
        with torch.no_grad():
            model(**example)
    finally:
        for hook in hooks:
            hook.remove()
    return found
