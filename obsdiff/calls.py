"""The calls of pipelines as one: some draw classes, some are told pictures in a way of their own."""

from collections.abc import Callable
from typing import Any, cast

from diffusers import DiffusionPipeline, DiTPipeline, Flux2KleinPipeline, Flux2Pipeline

from obsdiff import class_calls, pictures


def call(pipeline: DiffusionPipeline) -> Callable[..., Any]:
    """The pipeline's call, with the arguments and results that others have."""
    if isinstance(pipeline, DiTPipeline):
        return class_calls.call(pipeline)
    if isinstance(pipeline, (Flux2KleinPipeline, Flux2Pipeline)):
        return pictures.call(pipeline)
    return cast("Callable[..., Any]", pipeline)
