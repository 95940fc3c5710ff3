"""DiT: `DiTTransformer2DModel`, a transformer over the image that is told a class; there is no text.

A block reads four distinct tensors:

    norm1              attn1.to_q, to_k, to_v
    heads              attn1.to_out.0
    norm3              ff.net.0.proj
    neurons            ff.net.2

Each block has tables of its own for timestep and class, from which norm1 makes scales, shifts and gates of the whole
block; so the class is an input of the graph, an integer, and its rows of those tables are gathered inside.

The denoiser as exported gives the predicted noise alone: the channels behind it are a variance that no sampler reads.
Its pipeline draws one size, that of training, and so does the graph. Under guidance the pipeline's call has the rows
of no class, which it takes to be class 1000, behind the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff.families import layers, parts
from obsdiff.groups import Group, LinearSpec, Write
from obsdiff_export.component import Component
from obsdiff_runtime.errors import ConfigError, ModelError
from obsdiff_runtime.labels import COUNT, ID2LABEL, Labels, read_labels, written_labels

name: str = "dit"
denoiser: str = "transformer"
classes: tuple[str, ...] = ("DiTTransformer2DModel",)
pipeline: str = "DiTPipeline"
protect: tuple[int, int] = (1, 1)
vae_scale: int = parts.VAE_SCALE
negatives: bool = True
negative_first: bool = False
described: bool = True
text_mask: str | None = None

_NONE: Final = 1000
"""The class that stands for none, in diffusers' pipeline whatever the model."""


def linears(denoiser: nn.Module) -> tuple[LinearSpec, ...]:
    """See `Family.linears`. Tiers: into the heads, out of them, into the neurons, out of them."""
    blocks = ((block, prefix, _INPUTS) for block, prefix in enumerate(_blocks(denoiser)))
    return layers.of_blocks(denoiser, blocks, _writes)


def groups(denoiser: nn.Module) -> tuple[Group, ...]:
    """See `Family.groups`."""
    found: list[Group] = []
    for block, prefix in enumerate(_blocks(denoiser)):
        found.append(layers.heads(denoiser, f"{prefix}.attn1", block=block))
        found.append(layers.neurons(denoiser, f"{prefix}.ff", block=block))
    return tuple(found)


def tokens(
    config: Mapping[str, Any], *, height: int, width: int, text_tokens: int, vae_scale: int = 8
) -> dict[str, int]:
    """See `Family.tokens`: "image", one token per patch of the latents."""
    patch = int(config["patch_size"])
    return {"image": (height // vae_scale // patch) * (width // vae_scale // patch)}


def text_tokens(configs: Mapping[str, Mapping[str, Any]], max_sequence_length: int | None) -> int:
    """See `Family.text_tokens`: none."""
    return 0


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
    """See `Family.encode`: numbers of the classes that the prompts name, (n,)."""
    if any(negative):
        raise ConfigError("a class-conditional model is guided away from no class, and takes no negative prompt")
    if float(pipeline.scheduler.init_noise_sigma) != 1:
        raise ConfigError(
            f"diffusers' {type(pipeline).__name__} does not scale its noise, as {type(pipeline.scheduler).__name__} "
            "needs it; give the pipeline another scheduler, such as DDIMScheduler or DPMSolverMultistepScheduler"
        )
    labels = labels_of(pipeline)
    return {"class_labels": torch.tensor([labels.number(prompt) for prompt in prompts])}


def labels_of(pipeline: Any) -> Labels:
    """The classes that a DiTPipeline draws."""
    return read_labels({ID2LABEL: written_labels(pipeline.labels)}, pipeline.transformer.config)


def example(
    denoiser: nn.Module, *, batch: int, size: tuple[int, ...], text_tokens: int, pixels: tuple[int, int]
) -> dict[str, Tensor]:
    """See `Family.example`: the first row is of no class."""
    config: Any = denoiser.config
    dtype: Any = denoiser.dtype
    count = int(config[COUNT])
    return {
        "hidden_states": parts.noise(batch, config.in_channels, *size, dtype=dtype),
        "timestep": parts.timesteps(batch, dtype=dtype),
        "class_labels": (count - 321 * torch.arange(batch)) % (count + 1),
    }


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """See `Family.arguments`."""
    return dict(inputs)


class _Flat(parts.Flat):
    """The transformer, without options; (b, channels, h, w) to the same."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        noise: Tensor = self.source(hidden_states, timestep=timestep, class_labels=class_labels, return_dict=False)[0]
        return noise[:, : hidden_states.shape[1]]


def component(denoiser: nn.Module, *, height: int, width: int, vae_scale: int = 8) -> Component:
    """See `Family.component`: always of the size that the pipeline draws."""
    config: Any = denoiser.config
    return parts.denoiser_component(
        _Flat(denoiser),
        example,
        name="transformer",
        output="out_hidden_states",
        latents="hidden_states",
        sizes=[latent_size(config)] * 3,
        pixels=(height, width),
        text=(),
    )


_INPUTS: Final[layers.Inputs] = (
    (0, "norm1", "image", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    (1, "attn1.to_out.0", "image", ("attn1.to_out.0",)),
    (2, "norm3", "image", ("ff.net.0.proj",)),
    (3, "ff.net.2", "image", ("ff.net.2",)),
)


def _blocks(denoiser: Any) -> Iterator[str]:
    count = denoiser.config[COUNT]
    if count != _NONE:
        raise ModelError(
            f"this {type(denoiser).__name__} has {count} classes, and diffusers' pipeline guides by class {_NONE}; "
            f"obsdiff knows those of {_NONE} classes"
        )
    return (f"transformer_blocks.{child}" for child, _ in denoiser.transformer_blocks.named_children())


def _writes(prefix: str, linear: str) -> Write | None:
    """The gates are the second and the fifth thing that the norm in front of the attention gives."""
    norm1 = f"{prefix}.norm1"
    match linear:
        case "attn1.to_out.0":
            return Write(stream=norm1, gate=(norm1, 1))
        case "ff.net.2":
            return Write(stream=f"{prefix}.norm3", gate=(norm1, 4))
    return None
