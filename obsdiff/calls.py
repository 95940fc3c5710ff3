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
        return partial(_in_steps, pipeline)
    return cast("Callable[..., Any]", pipeline)


def _listed(pipeline: ZImagePipeline, **told: Any) -> Any:
    """Draws; of embedded texts, told with their masks, the call takes each without its padding."""
    for prefix in ("", "negative_"):
        mask = told.pop(f"{prefix}prompt_attention_mask", None)
        if mask is not None:
            told[f"{prefix}prompt_embeds"] = parts.listed(told[f"{prefix}prompt_embeds"], mask)
    return pipeline(**told)


def _in_steps(pipeline: SanaSprintPipeline, *, num_inference_steps: int, **told: Any) -> Any:
    """Draws; by default the call knows when the second of two steps is, and refuses other numbers of them."""
    between = {} if num_inference_steps == 2 else {"intermediate_timesteps": None}
    return pipeline(num_inference_steps=num_inference_steps, **between, **told)
