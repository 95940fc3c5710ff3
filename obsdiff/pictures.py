"""Reference pictures in torch: what calibration and comparison tell a denoiser beside the prompts.

Prompt i is told picture i of the folder, which begins again behind its last. A picture is cropped to the shape of what
is drawn and scaled to its size, so that it has as many tokens as that.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor

from obsdiff import offloading
from obsdiff.families import references
from obsdiff.instead import instead
from obsdiff.recipe import Sampling
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.pictures import open_picture

ARGUMENT = "image"
"""Of the calls of pipelines that are told pictures."""


@torch.no_grad()
def latents(pipeline: DiffusionPipeline, sampling: Sampling, rows: range) -> dict[str, Tensor]:
    """What the calls of these prompts are told of pictures, (rows, channels, h, w); nothing where they are told none.

    Raises:
        ConfigError: a file is no picture, or the pipeline has no VAE.
    """
    files = sampling.references
    if not files:
        return {}
    untyped: Any = pipeline
    vae = untyped.vae
    if vae is None:
        raise ConfigError("--references: the pipeline has no VAE to read pictures with")
    own = [files[row % len(files)] for row in rows]
    found: dict[str, Tensor] = {}
    with offloading.borrowed([vae], pipeline.device):
        for file in dict.fromkeys(own):
            image = open_picture(Path(file))
            size = (sampling.width, sampling.height)
            pixels = torch.from_numpy(np.array(ImageOps.fit(image, size, Image.Resampling.LANCZOS)))
            told = (pixels.permute(2, 0, 1)[None] / 127.5 - 1).to(vae.device, vae.dtype)
            found[file] = untyped._encode_vae_image(told, None)
    return {ARGUMENT: torch.cat([found[file] for file in own])}


def call(pipeline: DiffusionPipeline) -> Callable[..., Any]:
    """The call of a pipeline of FLUX.2 that is told latents of a picture for each prompt, as FLUX.1 Kontext's is."""
    return partial(_draw, pipeline)


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


def note(pipeline_class: str, sampling: Sampling) -> tuple[str, ...]:
    """What a user should know who prunes a denoiser that is told pictures, and gives none."""
    if references.of(pipeline_class) is None or sampling.references:
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
