"""What families share: how a denoiser is made flat, and its example inputs.

    b         batch
    h, w      sides of the latent image

Names of inputs and outputs are those of optimum's ONNX folders. Networks keep the names of their weights.
"""

import copy
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from obsdiff.instead import instead
from obsdiff_export.component import Component
from obsdiff_runtime.autoencoder import VAE_SCALE as VAE_SCALE
from obsdiff_runtime.kinds import PACKED

Size = tuple[int, int]
Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)

GUIDANCE: Final = "guidance_scale"
"""Argument of most pipelines' calls."""

SEED: Final = 0
_LARGEST_EXAMPLE: Final = 256


class Flat(nn.Module):
    """A model under another forward: its submodules and weights, under the names they have in it.

    Subclasses define a forward that takes the inputs by name, calls `self.source`, and returns tensors. Copies stay
    whole: a deep copy's `source` has the copied weights. Puts the model into eval mode.
    """

    source: Any

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = source._parameters, source._buffers, source._modules
        self._non_persistent_buffers_set = source._non_persistent_buffers_set
        self.__dict__["source"] = source.eval()  # beside the registry: all it holds is registered already
        self.training = False


def view(module: nn.Module, **children: nn.Module) -> Any:
    """A shallow copy with the same weights, some of its children exchanged."""
    seen = copy.copy(module)
    seen._modules = {**module._modules, **children}
    return seen


def latent_sizes(height: int, width: int, *, vae_scale: int, multiple: int, limit: int | None = None) -> list[Size]:
    """Three sizes of latents to export and compare with: two small and lopsided, and the one asked for.

    Args:
        height: of the image, in pixels; what exceeds 256 is cut to that, so that comparing stays quick.
        width: likewise.
        vae_scale: pixels per side of a latent pixel.
        multiple: sides must be multiples of it.
        limit: most multiples that a side can have.
    """
    largest = limit or max(height, width)
    asked = [max(1, min(side, _LARGEST_EXAMPLE) // vae_scale // multiple) for side in (height, width)]
    return [
        (multiple * min(rows, largest), multiple * min(columns, largest))
        for rows, columns in ((3, 5), (6, 4), (asked[0], asked[1]))
    ]


def rows(
    sizes: Sequence[tuple[int, ...]], text_tokens: tuple[int, int, int] = (11, 7, 13)
) -> list[tuple[int, int, tuple[int, ...]]]:
    """Per example its batch, text tokens and size; the first one is traced, so all its sizes are distinct."""
    return [(batch, length, size) for batch, length, size in zip((2, 3, 1), text_tokens, sizes, strict=True)]


def noise(*shape: int, dtype: torch.dtype) -> Tensor:
    """Seeded normal numbers, on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(dtype)


def patches(latents: Tensor, side: int) -> Tensor:
    """(b, channels, h, w) -> (b, h / side * w / side, side * side * channels): the channels behind a patch's pixels."""
    pixels = torch.unflatten(pixel_unshuffle(latents, side), 1, (-1, side**2)).transpose(1, 2)
    return pixels.flatten(1, 2).flatten(2).transpose(1, 2)


def unpatched(tokens: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """What `patches` took apart: rows * columns patches -> (b, channels, h, w)."""
    grid = torch.unflatten(tokens.transpose(1, 2), 2, (rows, columns))
    pixels = torch.unflatten(grid, 1, (side**2, -1)).transpose(1, 2)
    return pixel_shuffle(pixels.flatten(1, 2), side)


def beside(latents: Tensor, told: Tensor | None) -> Tensor:
    """Latents, and behind their channels those of what a denoiser is told of the same pixels."""
    return latents if told is None else torch.cat([latents, told], dim=1)


@contextmanager
def exchanged(
    denoiser: nn.Module,
    before: Callable[..., None],
    forwards: Mapping[nn.Module, Callable[..., Any]],
    classes: Mapping[nn.Module, type[nn.Module]],
) -> Iterator[None]:
    """Until the end, modules of a denoiser work otherwise.

    Args:
        denoiser: any.
        before: told the denoiser, arguments and keyword arguments of each of its calls.
        forwards: in place of some modules' own.
        classes: of some modules.
    """
    with ExitStack() as stack:
        stack.callback(denoiser.register_forward_pre_hook(before, with_kwargs=True).remove)
        for module, forward in forwards.items():
            stack.enter_context(instead(module, "forward", forward))
        for module, kind in classes.items():
            stack.callback(setattr, module, "__class__", type(module))
            module.__class__ = kind
        yield


def modulated(tokens: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """Tokens (b, frames * n, width) times a scale of their frame's, (b, frames, width), plus a shift."""
    grid = tokens.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]  # type: ignore[no-untyped-call]
    return (grid if shift is None else grid + shift[:, :, None]).flatten(1, 2)  # type: ignore[no-any-return]


def packed(latents: Tensor) -> Tensor:
    """(b, channels, h, w) -> (b, h / 2 * w / 2, channels * 4): a token's pixels behind each of its channels."""
    return pixel_unshuffle(latents, PACKED).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """What `packed` made of latents of that size."""
    grid = torch.unflatten(tokens.transpose(1, 2), 2, (height // PACKED, width // PACKED))
    return pixel_shuffle(grid, PACKED)


def timesteps(batch: int, *, dtype: torch.dtype) -> Tensor:
    """(b,): distinct timesteps between 1 and 999."""
    return torch.linspace(999, 1, batch).to(dtype)


def config_of(model: Any) -> dict[str, Any]:
    """A diffusers or transformers model's configuration as JSON data, without where it was loaded from."""
    source = model if hasattr(model, "to_json_string") else model.config
    config: dict[str, Any] = json.loads(source.to_json_string())
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def sample_size(config: Mapping[str, Any]) -> Size:
    """Latent (height, width) by a denoiser's `sample_size`; 64 a side where it says none."""
    size = config.get("sample_size") or 64
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def denoiser_component(
    flat: Flat,
    example: Callable[..., dict[str, Tensor]],
    *,
    name: str,
    output: str,
    latents: str,
    sizes: Sequence[tuple[int, ...]],
    pixels: Size,
    text: Sequence[str] = ("encoder_hidden_states",),
    text_tokens: tuple[int, int, int] = (11, 7, 13),
) -> Component:
    """A denoiser whose inputs all have a batch, whose latents any size, and whose text any length.

    Args:
        flat: the denoiser as exported.
        example: the family's `example`.
        name: of the component.
        output: name of what it gives.
        latents: its input for latents, (b, channels, h, w), or (b, channels, frames, h, w).
        sizes: three sizes of latents; see `latent_sizes`. Those of films have frames before the height. Where they are
            one, the graph takes no other.
        pixels: (height, width) of the image.
        text: its inputs of text, (b, text tokens, ...).
        text_tokens: of each example.
    """
    examples = [
        example(flat.source, batch=batch, size=size, text_tokens=length, pixels=pixels)
        for batch, length, size in rows(sizes, text_tokens)
    ]
    axes = {key: {0: "batch"} for key in examples[0]}
    sides = examples[0][latents].ndim
    if len(set(sizes)) > 1:
        axes[latents] |= {sides - 2: "height", sides - 1: "width"} | ({2: "frames"} if sides == 5 else {})
    for key in text:
        axes[key] |= {1: "text_tokens"}
    return Component(
        name=name,
        module=flat,
        inputs=examples[0],
        dynamic_axes=axes,
        outputs=(output,),
        config=config_of(flat.source),
        more_inputs=tuple(examples[1:]),
    )


def again(pipeline: DiffusionPipeline, pipeline_class: type[Pipeline], *without: str, **options: Any) -> Pipeline:
    """Another pipeline of the same networks, but for those of some names, which is as quiet."""
    networks = {name: part for name, part in pipeline.components.items() if name not in without}
    found: Pipeline = pipeline_class(**networks, **options)
    found.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return found


def guidance_argument(pipeline_class: type[DiffusionPipeline]) -> str:
    """The argument of the call that is the scale of guidance.

    A call that has both of diffusers' guides by GUIDANCE, unless that is None by default: then only a distilled
    denoiser would be told it, and negative prompts have a scale of their own, true_cfg_scale.
    """
    known = inspect.signature(pipeline_class.__call__).parameters
    unused = GUIDANCE not in known or known[GUIDANCE].default is None
    return "true_cfg_scale" if unused and "true_cfg_scale" in known else GUIDANCE


def draws_films(pipeline_class: type[DiffusionPipeline]) -> bool:
    """Whether its call gives frames, not images."""
    return "num_frames" in inspect.signature(pipeline_class.__call__).parameters


def padded(batch: int, length: int, *, dtype: torch.dtype) -> Tensor:
    """(b, l): 1 for text, 0 for padding behind it, one token more in each row."""
    return (torch.arange(length) < (length - torch.arange(batch)[:, None]).clamp_min(1)).to(dtype)


def masked_example(
    denoiser: nn.Module, batch: int, size: tuple[int, ...], text_tokens: int, text_width: int
) -> dict[str, Tensor]:
    """See `Family.example`: of a denoiser that is told latents, text, which of it is padding, and the timestep."""
    config: Any = denoiser.config
    dtype: Any = denoiser.dtype
    return {
        "hidden_states": noise(batch, config.in_channels, *size, dtype=dtype),
        "encoder_hidden_states": noise(batch, text_tokens, text_width, dtype=dtype),
        "encoder_attention_mask": padded(batch, text_tokens, dtype=dtype),
        "timestep": timesteps(batch, dtype=dtype),
    }


def listed(text: Tensor, mask: Tensor) -> list[Tensor]:
    """Each row of (b, l, width) without its padding, which is where (b, l) is 0."""
    return [row[shown] for row, shown in zip(text, mask.bool(), strict=True)]
