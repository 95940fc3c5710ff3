"""POST /v1/images/edits: a form with pictures, as OpenAI's clients send it, beside the fields of a generation.

What a model does with them differs: its denoiser is told them, a film begins with one, or one is changed, all of it or
what its mask says.
"""

import asyncio
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from obsdiff_runtime.autoencoder import Pixels
from obsdiff_runtime.errors import CompatibilityError, ConfigError
from obsdiff_runtime.masks import mask_of
from obsdiff_runtime.pictures import open_picture, resized
from obsdiff_runtime.pipeline import Pipeline
from obsdiff_runtime.references import Reference
from obsdiff_runtime.server.problems import Refused
from obsdiff_runtime.server.schemas import MOST_PICTURES, ImageRequest

if TYPE_CHECKING:
    from PIL.Image import Image

PATH: Final = "/v1/images/edits"
NAMES: Final = ("image", "image[]")
"""Of the pictures in the form: one, or several."""

FORMATS: Final = ("PNG", "JPEG", "WEBP")
"""OpenAI's; to read others can start other programs."""

MOST_PIXELS: Final = 25_000_000
"""Of a picture as it is sent; it is scaled down before the model reads it."""

MASK: Final = "mask"

_FIELDS: Final = ImageRequest.model_json_schema()
BODY: Final = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image", *_FIELDS["required"]],
                    "properties": {
                        "image": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "minItems": 1,
                            "maxItems": MOST_PICTURES,
                        },
                        MASK: {"type": "string", "format": "binary"},
                        **_FIELDS["properties"],
                    },
                    "additionalProperties": False,
                }
            }
        },
    }
}
"""For the description of the API."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A file of a form."""

    name: str
    content: bytes


@dataclass(frozen=True, kw_only=True)
class Uploads:
    """The files of a form: pictures in their order, and which part of the picture is drawn anew."""

    pictures: Sequence[Upload]
    mask: Upload | None = None


async def read_form(request: Request) -> tuple[ImageRequest, Uploads]:
    """The fields of the form, and its files.

    Raises:
        Refused: it is no form, there is no picture, or there are too many, or several masks.
        HTTPException: the form cannot be read.
        RequestValidationError: a field is unknown, or is not what it should be.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refused(400, "the body should be a form (multipart/form-data) with image and prompt")
    pictures: list[Upload] = []
    masks: list[Upload] = []
    fields: dict[str, Any] = {}
    async with request.form(max_files=2 * MOST_PICTURES, max_fields=len(ImageRequest.model_fields) + 1) as form:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                fields[name] = value
            elif name in (*NAMES, MASK):
                files = masks if name == MASK else pictures
                files.append(Upload(name=value.filename or name, content=await value.read()))
            else:
                raise Refused(400, f"{name}: no file of that name is read; give pictures as image", param=name)
    if not 0 < len(pictures) <= MOST_PICTURES:
        raise Refused(400, f"image: {len(pictures)} pictures; 1 to {MOST_PICTURES} are taken", param="image")
    if len(masks) > 1:
        raise Refused(400, f"{MASK}: {len(masks)} masks; there is one picture for them", param=MASK)
    try:
        return ImageRequest.model_validate_strings(fields), Uploads(pictures=pictures, mask=next(iter(masks), None))
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


async def read_pictures(pipeline: Pipeline, uploads: Uploads, size: tuple[int, int] | None) -> dict[str, Any]:
    """The pictures as `Pipeline.begin` takes them.

    Args:
        pipeline: that is to be told them.
        uploads: their files.
        size: (width, height) in pixels that is to be drawn; the bundle's own if None.

    Raises:
        Refused: one is no picture, or too large; there are too few or too many, or this bundle is told none, or no
            mask.
    """
    own = pipeline.bundle.manifest.defaults
    width, height = size or (own.width, own.height)
    resolver, count = pipeline.resolver, len(uploads.pictures)
    least, most = resolver.choices.pictures
    if count < least or (most and count > most):
        given = "1 picture" if count == 1 else f"{count} pictures"
        raise Refused(400, f"image: {given}; this model takes {most or f'{least} or more'}", param="image")

    if uploads.mask is not None and not resolver.changes:
        raise Refused(400, f"{MASK}: this model changes no part of a picture; leave it out", param=MASK)

    def read(upload: Upload) -> Pixels | Reference:
        image = _open(upload)
        return resized(image, width, height) if resolver.opens or resolver.changes else pipeline.fit(image)

    try:
        resolver.check_pictures()
        found = [await asyncio.to_thread(read, upload) for upload in uploads.pictures]
    except (CompatibilityError, ConfigError) as error:
        raise Refused(400, str(error), param="image") from None
    if resolver.opens:
        return dict(zip(("image", "last_image"), found, strict=False))
    if not resolver.changes:
        return {"reference": found}
    try:
        redrawn = None if uploads.mask is None else mask_of(_open(uploads.mask, None), width, height)
    except ConfigError as error:
        raise Refused(400, str(error), param=MASK) from None
    return {"image": found[0], "mask": redrawn}


def _open(upload: Upload, mode: str | None = "RGB") -> "Image":
    file = io.BytesIO(upload.content)
    return open_picture(file, upload.name, formats=FORMATS, most_pixels=MOST_PIXELS, mode=mode)
