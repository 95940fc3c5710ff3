"""The calls of pipelines as one: some draw classes, some are told pictures or texts in a way of their own."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from diffusers import (
    DiffusionPipeline,
    DiTPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    SanaSprintPipeline,
    ZImagePipeline,
)

from obsdiff import class_calls, pictures
from obsdiff.families import parts


def call(pipeline: DiffusionPipeline) -> Callable[..., Any]:
    """The pipeline's call, with the arguments and results that others have."""
    if isinstance(pipeline, DiTPipeline):
        return class_calls.call(pipeline)
    if isinstance(pipeline, (Flux2KleinPipeline, Flux2Pipeline)):
        return pictures.call(pipeline)
    if isinstance(pipeline, ZImagePipeline):
        return partial(_listed, pipeline)
    if isinstance(pipeline, SanaSprintPipeline):
        return partial(_stepped, pipeline)
    return cast("Callable[..., Any]", pipeline)


def _listed(pipeline: ZImagePipeline, **told: Any) -> Any:
    """Draws; of embedded texts, told with their masks, the call takes each without its padding."""
    for prefix in ("", "negative_"):
        mask = told.pop(f"{prefix}prompt_attention_mask", None)
        if mask is not None:
            told[f"{prefix}prompt_embeds"] = parts.listed(told[f"{prefix}prompt_embeds"], mask)
    return pipeline(**told)


def in_steps(pipeline_class: type[DiffusionPipeline] | None, steps: int) -> dict[str, Any]:
    """Arguments by which a call takes so many steps.

    By default that of Sana-Sprint knows when the second of two steps is, and refuses other numbers of them.
    """
    told: dict[str, Any] = {"num_inference_steps": steps}
    return told | {"intermediate_timesteps": None} if pipeline_class is SanaSprintPipeline and steps != 2 else told


def _stepped(pipeline: SanaSprintPipeline, *, num_inference_steps: int, **told: Any) -> Any:
    """Draws; see `in_steps`."""
    return pipeline(**in_steps(type(pipeline), num_inference_steps), **told)
