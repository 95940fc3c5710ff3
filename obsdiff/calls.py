"""The calls of pipelines as one: some draw classes, some are told pictures or texts in a way of their own."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

from diffusers import (
    DiffusionPipeline,
    DiTPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    WanImageToVideoPipeline,
    WanPipeline,
    ZImagePipeline,
)

from obsdiff import class_calls, pictures, turns
from obsdiff.families import controls, fills, ltx, parts, references, wan


def call(pipeline: DiffusionPipeline, *, own_timesteps: bool = False) -> Callable[..., Any]:
    """The pipeline's call, with the arguments and results that others have.

    A denoiser that the pipeline tells a timestep for each token (Wan 2.2 TI2V) is told one, unless `own_timesteps` or
    there is a picture: without one all are equal, so it is the same in less work.
    """
    if isinstance(pipeline, DiTPipeline):
        return class_calls.call(pipeline)
    if isinstance(pipeline, (Flux2KleinPipeline, Flux2Pipeline)):
        return partial(pictures.draw_referring, pipeline)
    if isinstance(pipeline, (QwenImageEditPipeline, QwenImageEditPlusPipeline)):
        return partial(pictures.draw_edited, pipeline)
    if isinstance(pipeline, WanImageToVideoPipeline):
        return partial(_begun, pipeline)
    if isinstance(pipeline, ZImagePipeline):
        return partial(_listed, pipeline)
    if controls.steers(type(pipeline).__name__):
        return partial(_steered, pipeline)
    if fills.keeps(type(pipeline).__name__):
        return partial(fills.draw, pipeline)
    if isinstance(pipeline, pictures.LTX):
        return partial(pictures.draw_ltx, pipeline)
    if isinstance(pipeline, WanPipeline) and pipeline.config.expand_timesteps:
        return partial(_begun_or_not, pipeline, own_timesteps)
    return cast("Callable[..., Any]", pipeline)


def _listed(pipeline: ZImagePipeline, **told: Any) -> Any:
    """Draws; of embedded texts, told with their masks, the call takes each without its padding."""
    for prefix in ("", "negative_"):
        mask = told.pop(f"{prefix}prompt_attention_mask", None)
        if mask is not None:
            told[f"{prefix}prompt_embeds"] = parts.listed(told[f"{prefix}prompt_embeds"], mask)
    return pipeline(**told)


def _steered(pipeline: DiffusionPipeline, *, image: Any = None, **told: Any) -> Any:
    """Draws, steered by a control picture where there is one."""
    untyped: Any = controls.plain(pipeline) if image is None else partial(pipeline, image=image)
    return untyped(**told)


def _begun(pipeline: WanImageToVideoPipeline, **told: Any) -> Any:
    """Draws films that begin with a picture."""
    with wan.plainly(pipeline):
        return pictures.draw_opened(pipeline, **told)


def _begun_or_not(pipeline: WanPipeline, own_timesteps: bool, *, image: Any = None, **told: Any) -> Any:
    """Draws films that begin with a picture, where there is one; without one a film has one timestep."""
    if image is not None:
        return _begun(pictures.opener(pipeline), image=image, **told)
    pipeline.register_to_config(expand_timesteps=own_timesteps)
    try:
        return pipeline(**told)
    finally:
        pipeline.register_to_config(expand_timesteps=True)


@contextmanager
def by_frames(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Until the end, its denoisers take little memory for timesteps of tokens, where they are told such."""
    with ExitStack() as stack:
        if references.masks_frames(type(pipeline).__name__, pipeline.config):
            films = ltx if isinstance(pipeline, pictures.LTX) else wan
            for denoiser in turns.modules(pipeline, films).values():
                stack.enter_context(films.by_frames(denoiser))
        yield
