"""Pictures in torch: what calibration and comparison tell a denoiser beside the prompts, and what its films begin with.

Prompt i is told picture i of the folder, which begins again behind its last, or pictures 2 i and 2 i + 1 where its film
ends with one, too. A picture is cropped to the shape of what is drawn and scaled to its size, so that it has as many
tokens as that. A text encoder that looks at pictures looks at the same, at the size that diffusers gives it.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    QwenImagePipeline,
    WanImageToVideoPipeline,
)
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from torch import Tensor, nn

from obsdiff import offloading
from obsdiff.families import Family, controls, fills, parts, references, seeing
from obsdiff.families.autoencoders import draws_films
from obsdiff.instead import instead
from obsdiff.recipe import Sampling
from obsdiff_runtime.autoencoder import FRAME_SCALE, latent_frames
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.kinds import PACKED
from obsdiff_runtime.pictures import open_picture
from obsdiff_runtime.references import Reference

ARGUMENT: Final = "image"
"""Of the calls of pipelines that are told pictures."""

LTX: Final = (LTXPipeline, LTXConditionPipeline, LTXImageToVideoPipeline)
"""Pipelines whose films can begin with a picture, in place of the first frame."""

SEEN: Final = "image_embeds"
"""Likewise: what an image encoder sees in them."""


@torch.no_grad()
def encode(
    pipeline: DiffusionPipeline,
    family: Family,
    prompts: Sequence[str],
    negative: Sequence[str],
    sampling: Sampling,
    rows: range,
) -> dict[str, Tensor]:
    """What the calls of these prompts are told of text, see `Family.encode`, and of pictures, (rows, ...) each.

    Raises:
        ConfigError: a file is no picture, the pipeline has no VAE, or it draws nothing without a picture.
    """
    name = type(pipeline).__name__
    require(name, sampling)
    if sampling.references and sampling.num_frames == 1 and references.masks_frames(name, pipeline.config):
        raise ConfigError("--num-frames 1: nothing is drawn of a film whose only frame is given; give more")
    length = sampling.max_sequence_length
    own = _own(sampling.references, rows, 2 if references.ends(pipeline) else 1)
    pictures = {file: _fitted(Path(file), sampling) for files in own for file in files}
    kind = references.of(name)
    if kind is None or kind.seen is None:
        options = {} if length is None else {"max_sequence_length": length}
        text = family.encode(pipeline, prompts, negative, **options)
    else:
        longest = family.text_tokens({}, length) + kind.seen_tokens(sampling.width, sampling.height)
        told = []
        for index, (file,) in enumerate(own):
            seen = Reference(pixels=np.asarray(pictures[file])).looked_at(kind.seen)
            with seeing.looking(pipeline, [Image.fromarray(seen)]):
                each = (prompts[index : index + 1], negative[index : index + 1])
                told.append(family.encode(pipeline, *each, max_sequence_length=longest))
        text = {name: torch.cat([each[name] for each in told]) for name in told[0]}
    return text | _read(pipeline, sampling, pictures, own, rows)


def _own(files: Sequence[str], rows: range, each: int) -> list[tuple[str, ...]]:
    """The pictures of each row, so many of them."""
    return [tuple(files[(each * row + place) % len(files)] for place in range(each)) for row in rows if files]


def _fitted(file: Path, sampling: Sampling) -> Image.Image:
    return ImageOps.fit(open_picture(file), (sampling.width, sampling.height), Image.Resampling.LANCZOS)


def _read(
    pipeline: DiffusionPipeline,
    sampling: Sampling,
    pictures: Mapping[str, Image.Image],
    own: Sequence[tuple[str, ...]],
    rows: range,
) -> dict[str, Tensor]:
    """What networks make of the pictures of each row, by name."""
    if not own:
        return {}
    name = type(pipeline).__name__
    steered, filled = controls.steers(name), fills.keeps(name)
    if steered or filled:  # diffusers reads the pixels itself
        masks = {fills.MASK: fills.boxes(rows, sampling.height, sampling.width)} if filled else {}
        return {ARGUMENT: torch.cat([_pixels(pictures[file]) for (file,) in own]), **masks}
    untyped: Any = pipeline
    vae = untyped.vae
    if vae is None:
        raise ConfigError("--references: the pipeline has no VAE to read pictures with")
    found: dict[tuple[str, ...], dict[str, Tensor]] = {}
    opens = references.opens(name) or references.masks_frames(name, pipeline.config)
    encoder = getattr(untyped, "image_encoder", None) if opens else None
    readers = [vae, *([] if encoder is None else [encoder])]
    with offloading.borrowed(readers, pipeline.device):
        for files in dict.fromkeys(own):
            images = [pictures[file] for file in files]
            told = [(2 * _pixels(image) - 1).to(vae.device, vae.dtype) for image in images]
            found[files] = _beginning(untyped, images, told, sampling) if opens else _reference(untyped, *told)
    return {key: torch.cat([found[files][key] for files in own]) for key in found[own[0]]}


def _pixels(image: Image.Image) -> Tensor:
    """(1, 3, height, width), in 0..1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def _reference(pipeline: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Latents of a picture beside what is drawn, (1, channels, h, w)."""
    films = draws_films(pipeline.vae)
    latents = pipeline._encode_vae_image(pixels[:, :, None] if films else pixels, None)
    return {ARGUMENT: latents[:, :, 0] if films else latents}


def _beginning(
    pipeline: Any, images: Sequence[Image.Image], pixels: Sequence[Tensor], sampling: Sampling
) -> dict[str, Tensor]:
    """What films are told of a picture that they begin with, (1, 3, height, width): (1, channels, frames, h, w).

    And of the one that they end with, where there are two. And what an image encoder sees, (1, tokens, width) or (1, 2,
    tokens, width), where the denoiser is told that. Where latents stand in place of the first ones, they are all.
    """
    if isinstance(pipeline, LTX):
        vae = pipeline.vae
        mean = vae.encode(pixels[0][:, :, None]).latent_dist.mode()
        return {ARGUMENT: pipeline._normalize_latents(mean, vae.latents_mean, vae.latents_std)}
    size = (sampling.height, sampling.width, sampling.num_frames)
    channels, unread = pipeline.vae.config.z_dim, torch.zeros(())
    where = (torch.float32, pipeline.vae.device)
    first, *last = pixels
    ends = {"last_image": last[0]} if last else {}
    _, states, *_ = opener(pipeline).prepare_latents(first, 1, channels, *size, *where, latents=unread, **ends)
    if not references.sees(pipeline.transformer.config):
        return {ARGUMENT: states}
    seen = pipeline.encode_image(list(images), pipeline.vae.device)
    return {ARGUMENT: states, SEEN: seen[None] if last else seen}


def opener(pipeline: Any) -> WanImageToVideoPipeline:
    """The pipeline, or one of its networks, that draws films which begin with a picture."""
    if isinstance(pipeline, WanImageToVideoPipeline):
        return pipeline
    own = {name: pipeline.config[name] for name in ("boundary_ratio", "expand_timesteps")}
    return parts.again(pipeline, WanImageToVideoPipeline, **own)


class _OfEach:
    """Rows where diffusers' call would repeat one for all."""

    def __init__(self, rows: Tensor | None) -> None:
        self._rows = rows

    def repeat(self, *_: int) -> Tensor | None:
        return self._rows


def draw_opened(pipeline: Any, *, image: Tensor | Image.Image, image_embeds: Tensor | None = None, **told: Any) -> Any:
    """Draws films that begin with a picture; `image` is what `encode` makes of one for each, or a picture for all."""
    if not isinstance(image, Tensor):
        return pipeline(image=image, **told)

    def prepared(_: Any, films: int, channels: int, *size: Any) -> tuple[Tensor, ...]:
        frames, dtype, device, generator = size[2:6]
        shape = (films, channels, latent_frames(frames, FRAME_SCALE), *image.shape[3:])
        noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        states = image.to(device, dtype)
        if not pipeline.config.expand_timesteps:
            return noise, states
        mask = torch.ones_like(noise[:1, :1])
        mask[:, :, 0] = 0
        return noise, states, mask

    unread = Image.new("RGB", (16, 16))
    seen = None if image_embeds is None else image_embeds.flatten(0, -3)
    with (
        instead(pipeline, "prepare_latents", prepared),
        instead(pipeline, "encode_image", lambda *_: _OfEach(seen)),
    ):
        return pipeline(image=unread, **told)


def draw_ltx(pipeline: Any, *, image: Tensor | Image.Image | None = None, **told: Any) -> Any:
    """Draws films by LTX-Video, which begin with a picture where there is one.

    `image` is what `encode` makes of one for each, or a picture for all.
    """
    conditions = isinstance(pipeline, LTXConditionPipeline)
    plain, drawer = (
        pipeline if conditions or isinstance(pipeline, kind) else parts.again(pipeline, kind)
        for kind in (LTXPipeline, LTXImageToVideoPipeline)
    )
    if image is None:
        return plain(**told)
    if not isinstance(image, Tensor):
        return drawer(image=image, **told)
    prepare = plain.prepare_latents

    def prepared(_: Any, *given: Any, **named: Any) -> tuple[Any, ...]:
        """Tokens of which the first are those of the opening, and which these are, as either call wants it."""
        tokens, _, *places = prepare([], *given, **named) if conditions else (prepare(*given), None)
        opening = pipeline._pack_latents(image.to(tokens))  # (rows, tokens of a frame, channels)
        shown = torch.zeros_like(tokens[:, :, 0])
        shown[:, : opening.shape[1]] = 1
        return (torch.cat([opening, tokens[:, opening.shape[1] :]], dim=1), shown, *places)

    with instead(drawer, "prepare_latents", prepared):
        return drawer(image=Image.new("RGB", (16, 16)), **told)


def draw_referring(pipeline: Any, *, image: Tensor | None = None, **told: Any) -> Any:
    """Draws by FLUX.2, told latents of a picture for each prompt, (rows, channels, h, w), as FLUX.1 Kontext's call is.

    diffusers' own call reads pictures that all rows have in common.
    """
    if image is None:
        return pipeline(**told)

    def prepared(images: Sequence[Any], batch_size: int, *, device: Any, dtype: Any, **_: Any) -> tuple[Tensor, Tensor]:
        tokens = image.flatten(2).transpose(1, 2)  # (rows, tokens, channels)
        places = pipeline._prepare_image_ids([image[:1]])  # (1, tokens, axes)
        return tokens.to(device, dtype), places.repeat(batch_size, 1, 1).to(device)

    unread = Image.new("RGB", (64, 64))
    with instead(pipeline, "prepare_image_latents", prepared):
        return pipeline(image=[unread], **told)


def draw_edited(pipeline: Any, *, image: Any = None, **told: Any) -> Any:
    """Draws by Qwen-Image-Edit, told latents of a picture for each prompt, (rows, channels, h, w), and what is read.

    It is Qwen-Image's call but for the pictures. diffusers' own takes one prompt at a time, and `image` as it reads it.
    """
    if not isinstance(image, Tensor):
        return pipeline(image=image, **told)
    drawer: Any = parts.again(pipeline, QwenImagePipeline, "processor")
    tokens = parts.packed(image)
    shape = (1, image.shape[-2] // PACKED, image.shape[-1] // PACKED)

    def tell(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states = torch.cat([given["hidden_states"], tokens.to(given["hidden_states"])], dim=1)
        shapes = [[*given["img_shapes"][0], shape]]  # of all rows, however many there are
        return args, {**given, "hidden_states": states, "img_shapes": shapes}

    def read(_: nn.Module, __: tuple[Any, ...], found: tuple[Tensor]) -> tuple[Tensor]:
        return (found[0][:, : -tokens.shape[1]],)

    with ExitStack() as stack:
        # first of all and last of all, so that who watches the denoiser sees all that it is told and gives
        stack.callback(pipeline.transformer.register_forward_pre_hook(tell, prepend=True, with_kwargs=True).remove)
        stack.callback(pipeline.transformer.register_forward_hook(read).remove)
        return drawer(**told)


def example(pipeline: DiffusionPipeline, height: int, width: int) -> dict[str, Any]:
    """What calls are told of a picture where none is drawn without, or a ControlNet has nothing to do: a grey one.

    It has the size that is drawn.
    """
    grey, name = Image.new("RGB", (width, height), (127,) * 3), type(pipeline).__name__
    if references.opens(name):
        return {ARGUMENT: grey, **({"last_image": grey} if references.ends(pipeline) else {})}
    if controls.steers(name):
        return {ARGUMENT: grey}
    return {} if _why_needed(name) is None else {ARGUMENT: [grey]}


def _why_needed(pipeline_class: str) -> str | None:
    """Why a pipeline draws nothing without a picture; None where it does."""
    if references.opens(pipeline_class):
        return "films of this pipeline begin with a picture"
    kind = references.of(pipeline_class)
    return None if kind is None or not kind.least else "this pipeline edits pictures and draws nothing without one"


def require(pipeline_class: str, sampling: Sampling) -> None:
    """Raises ConfigError where there is no picture, and nothing is drawn without one."""
    why = _why_needed(pipeline_class)
    if why is not None and not sampling.references:
        raise ConfigError(f"{why}; give some: --references FOLDER")


def note(index: Mapping[str, Any], sampling: Sampling, *, who: str = "calibration") -> tuple[str, ...]:
    """What a user should know who prunes, or compares, a denoiser that is told pictures, and gives none.

    `index` is the pipeline's configuration, as in model_index.json, and `who` draws.
    """
    pipeline_class = str(index["_class_name"])
    why, masks = _why_needed(pipeline_class), references.masks_frames(pipeline_class, index)
    if sampling.references or not references.takes(index):
        return ()
    if why is not None:
        return (f"{why}; calibration and comparison want --references FOLDER",)
    if masks:
        return (
            f"films of this pipeline can begin with a picture, and {who} draws none that do; --references FOLDER gives "
            "them some",
        )
    if controls.steers(pipeline_class):
        return (
            f"a ControlNet steers this denoiser, and {who} draws without; --references FOLDER gives it control "
            "pictures, such as edges or depths",
        )
    if fills.keeps(pipeline_class):
        return (
            f"this denoiser is told what stays of a picture, and {who} draws all of it anew; --references FOLDER gives "
            "it pictures of which a box is drawn anew",
        )
    return (
        f"this denoiser is told pictures, too, and {who} told it none: it looked at prompts alone. --references FOLDER "
        "shows it some",
    )


def drawn(arguments: Mapping[str, Any]) -> Tensor | None:
    """Which tokens of the image's sequence a denoiser's call draws, (tokens,), bool; None where that is all.

    Of a film whose first latents are given, those with a timestep above 0.
    """
    timestep = arguments.get("timestep")
    if isinstance(timestep, Tensor) and timestep.ndim == 2 and "hidden_states" in arguments:
        noisy: Tensor = timestep[0] > 0  # the same for all rows
        return None if bool(noisy.all()) else noisy
    if "img_shapes" in arguments:  # of each row what is drawn, and the pictures
        first, *told = (math.prod(shape) for shape in arguments["img_shapes"][0])
        return torch.arange(first + sum(told), device=arguments["hidden_states"].device) < first if told else None
    places = arguments.get("img_ids")
    if not isinstance(places, Tensor):
        return None
    own: Tensor = places.reshape(-1, *places.shape[-2:])[0, :, 0] == 0  # the same for all rows
    return None if bool(own.all()) else own
