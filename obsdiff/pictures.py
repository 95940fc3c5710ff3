"""Pictures in torch: what calibration and comparison tell a denoiser beside the prompts, and what its films begin with.

Prompt i is told picture i of the folder, which begins again behind its last. A picture is cropped to the shape of what
is drawn and scaled to its size, so that it has as many tokens as that.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from torch import Tensor

from obsdiff import offloading
from obsdiff.families import references
from obsdiff.instead import instead
from obsdiff.recipe import Sampling
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.pictures import open_picture

ARGUMENT: Final = "image"
"""Of the calls of pipelines that are told pictures."""

SEEN: Final = "image_embeds"
"""Likewise: what an image encoder sees in them."""


@torch.no_grad()
def latents(pipeline: DiffusionPipeline, sampling: Sampling, rows: range) -> dict[str, Tensor]:
    """What the calls of these prompts are told of pictures, (rows, ...) each; nothing where they are told none.

    Raises:
        ConfigError: a file is no picture, there is none and films begin with one, or the pipeline has no VAE.
    """
    files = sampling.references
    opens = references.opens(type(pipeline).__name__)
    require(type(pipeline).__name__, sampling)
    if not files:
        return {}
    untyped: Any = pipeline
    vae = untyped.vae
    if vae is None:
        raise ConfigError("--references: the pipeline has no VAE to read pictures with")
    own = [files[row % len(files)] for row in rows]
    found: dict[str, dict[str, Tensor]] = {}
    readers = [vae, *([untyped.image_encoder] if opens and untyped.image_encoder is not None else [])]
    with offloading.borrowed(readers, pipeline.device):
        for file in dict.fromkeys(own):
            image = open_picture(Path(file))
            size = (sampling.width, sampling.height)
            fitted = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.array(fitted))
            told = (pixels.permute(2, 0, 1)[None] / 127.5 - 1).to(vae.device, vae.dtype)
            if opens:
                found[file] = _beginning(untyped, fitted, told, sampling)
            else:
                found[file] = {ARGUMENT: untyped._encode_vae_image(told, None)}
    return {name: torch.cat([found[file][name] for file in own]) for name in found[own[0]]}


def _beginning(pipeline: Any, image: Image.Image, pixels: Tensor, sampling: Sampling) -> dict[str, Tensor]:
    """What films are told of a picture that they begin with, (1, 3, height, width): (1, channels, frames, h, w).

    And what an image encoder sees in it, (1, tokens, width), where the denoiser is told that.
    """
    size = (sampling.height, sampling.width, sampling.num_frames)
    channels, unread = pipeline.vae.config.z_dim, torch.zeros(())
    where = (torch.float32, pipeline.vae.device)
    _, states = pipeline.prepare_latents(pixels, 1, channels, *size, *where, latents=unread)
    if not references.sees(pipeline.transformer.config):
        return {ARGUMENT: states}
    return {ARGUMENT: states, SEEN: pipeline.encode_image(image, pipeline.vae.device)}


class _OfEach:
    """Rows where diffusers' call would repeat one for all."""

    def __init__(self, rows: Tensor | None) -> None:
        self._rows = rows

    def repeat(self, *_: int) -> Tensor | None:
        return self._rows


def call(pipeline: DiffusionPipeline) -> Callable[..., Any]:
    """The call of a pipeline that is told latents of a picture for each prompt, as FLUX.1 Kontext's is."""
    return partial(_open if references.opens(type(pipeline).__name__) else _draw, pipeline)


def _open(pipeline: Any, *, image: Tensor | Image.Image, image_embeds: Tensor | None = None, **told: Any) -> Any:
    """Draws films; `image` is what each is told of how it begins, of `latents`, or a picture for all of them."""
    if not isinstance(image, Tensor):
        return pipeline(image=image, **told)

    def prepared(_: Any, films: int, channels: int, *size: Any) -> tuple[Tensor, Tensor]:
        dtype, device, generator = size[3:6]
        noise = randn_tensor((films, channels, *image.shape[2:]), generator=generator, device=device, dtype=dtype)
        return noise, image.to(device, dtype)

    unread = Image.new("RGB", (16, 16))
    with (
        instead(pipeline, "prepare_latents", prepared),
        instead(pipeline, "encode_image", lambda *_: _OfEach(image_embeds)),
    ):
        return pipeline(image=unread, **told)


def _draw(pipeline: Any, *, image: Tensor | None = None, **told: Any) -> Any:
    """Draws; `image` is (rows, channels, h, w), where diffusers' call reads pictures that all rows have in common."""
    if image is None:
        return pipeline(**told)

    def prepared(images: Sequence[Any], batch_size: int, *, device: Any, dtype: Any, **_: Any) -> tuple[Tensor, Tensor]:
        tokens = image.flatten(2).transpose(1, 2)  # (rows, tokens, channels)
        places = pipeline._prepare_image_ids([image[:1]])  # (1, tokens, axes)
        return tokens.to(device, dtype), places.repeat(batch_size, 1, 1).to(device)

    unread = Image.new("RGB", (64, 64))
    with instead(pipeline, "prepare_image_latents", prepared):
        return pipeline(image=[unread], **told)


def require(pipeline_class: str, sampling: Sampling) -> None:
    """Raises ConfigError where films begin with a picture, and there is none."""
    if references.opens(pipeline_class) and not sampling.references:
        raise ConfigError("films of this pipeline begin with a picture; give some: --references FOLDER")


def note(pipeline_class: str, sampling: Sampling) -> tuple[str, ...]:
    """What a user should know who prunes a denoiser that is told pictures, and gives none."""
    if sampling.references:
        return ()
    if references.opens(pipeline_class):
        return ("films of this pipeline begin with a picture; calibration and comparison want --references FOLDER",)
    if references.of(pipeline_class) is None:
        return ()
    return (
        "this denoiser is told pictures, too, and calibration told it none: it looked at prompts alone. --references "
        "FOLDER shows it some",
    )


def drawn(arguments: Mapping[str, Any]) -> Tensor | None:
    """Which tokens of the image's sequence a denoiser's call draws, (tokens,), bool; None where that is all."""
    places = arguments.get("img_ids")
    if not isinstance(places, Tensor):
        return None
    own: Tensor = places.reshape(-1, *places.shape[-2:])[0, :, 0] == 0  # the same for all rows
    return None if bool(own.all()) else own
