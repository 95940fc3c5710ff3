"""Requests, responses and errors in OpenAI's shape, with fields of diffusion servers beside them."""

import re
from typing import Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from obsdiff_runtime.controls import MOST_SCALE

OutputFormat = Literal["png", "jpeg", "webp"]
FORMATS: Final[tuple[OutputFormat, ...]] = get_args(OutputFormat)
MOST_IMAGES: Final = 10
MOST_PREVIEWS: Final = 3
MOST_PICTURES: Final = 4
SIZE: Final = re.compile(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}")


class ImageRequest(BaseModel):
    """The body of POST /v1/images/generations; what is not here is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, description="What to draw.")
    model: str | None = Field(None, description="One of /v1/models; the first if none is named.")
    n: int = Field(1, ge=1, le=MOST_IMAGES, description="How many images.")
    size: str | None = Field(None, description='"WIDTHxHEIGHT" or "auto", the model\'s own.')
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="url: a data: URL with the picture.")
    output_format: OutputFormat = Field("png", description="Of pictures; films are no jpeg.")
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp.")
    stream: bool = Field(False, description="Server-sent events instead of one answer.")
    partial_images: int = Field(0, ge=0, le=MOST_PREVIEWS, description="Pictures of the way there, when streaming.")
    progress: bool = Field(False, description="Events obsdiff.progress and obsdiff.finished too, when streaming.")
    user: str | None = Field(None, description="Accepted for OpenAI's clients, and not kept.")
    negative_prompt: str = Field("", description="What to keep away from.")
    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps; the model's own if none.")
    guidance_scale: float | None = Field(
        None, ge=0, le=100, allow_inf_nan=False, description="1 and less, of Z-Image 0: off."
    )
    guidance_scale_2: float | None = Field(
        None,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="Of the denoisers behind the first, where they take turns.",
    )
    num_frames: int | None = Field(None, ge=1, description="Of a film; the model's own if none.")
    strength: float | None = Field(
        None, gt=0, le=1, allow_inf_nan=False, description="How much of a picture is changed, where it is."
    )
    control_scale: float | None = Field(
        None,
        ge=0,
        le=MOST_SCALE,
        allow_inf_nan=False,
        description="How much a control picture counts; 1 if none is given.",
    )
    seed: int | None = Field(None, ge=0, lt=2**63, description="Of the noise; drawn by lot if none is given.")
    noise_source: Literal["numpy", "torch"] = Field(
        "numpy", description="torch: a seed means what it does in diffusers."
    )

    @field_validator("size")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        if value not in (None, "auto") and SIZE.fullmatch(value) is None:
            raise ValueError('should be "auto" or WIDTHxHEIGHT, such as 512x512')
        return value

    @property
    def pixels(self) -> tuple[int, int] | None:
        """(width, height), None for the model's own."""
        if self.size in (None, "auto"):
            return None
        width, height = (self.size or "").split("x")
        return int(width), int(height)


class ImageData(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None


class Measured(BaseModel):
    """How the answer came about.

    `stage_seconds`: "queue", "text", "denoise", "decode"; runs that were shared with others count in full.
    """

    seed: int
    num_inference_steps: int
    guidance_scale: float
    stage_seconds: dict[str, float]


class ImagesResponse(BaseModel):
    created: int
    data: list[ImageData]
    size: str
    output_format: str
    metrics: Measured


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "obsdiff"
    details: dict[str, Any]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Problem(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """What every error of this server looks like."""

    error: Problem
