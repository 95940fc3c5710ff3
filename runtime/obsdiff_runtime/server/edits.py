"""POST /v1/images/edits: a form with pictures, as OpenAI's clients send it, beside the fields of a generation.

What a model does with them differs: its denoiser is told them, a film begins with one, or one is changed, all of it or
what its mask says. A control picture steers a ControlNet, beside a picture or alone.
"""

import asyncio
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from obsdiff_runtime.autoencoder import Pixels
from obsdiff_runtime.errors import CompatibilityError, ConfigError
from obsdiff_runtime.masks import Mask, mask_of
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
CONTROL: Final = "control"

_FIELDS: Final = ImageRequest.model_json_schema()
BODY: Final = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": _FIELDS["required"],
                    "properties": {
                        "image": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "minItems": 1,
                            "maxItems": MOST_PICTURES,
                        },
                        MASK: {"type": "string", "format": "binary"},
                        CONTROL: {"type": "string", "format": "binary"},
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
    """The files of a form: pictures in their order, which part of the picture is drawn anew, and what steers."""

    pictures: Sequence[Upload]
    mask: Upload | None = None
    control: Upload | None = None


async def read_form(request: Request) -> tuple[ImageRequest, Uploads]:
    """The fields of the form, and its files.

    Raises:
        Refused: it is no form, there is no picture, or text in place of one, or there are too many.
        HTTPException: the form cannot be read.
        RequestValidationError: a field is unknown, or is not what it should be.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refused(400, "the body should be a form (multipart/form-data) with image and prompt")
    files: dict[str, list[Upload]] = {NAMES[0]: [], MASK: [], CONTROL: []}
    fields: dict[str, Any] = {}
    async with request.form(max_files=2 * MOST_PICTURES, max_fields=len(ImageRequest.model_fields) + 1) as form:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                if name in (*NAMES, *files):
                    raise Refused(400, f"{name}: should be a file, and is text", param=name)
                fields[name] = value
            elif name in (*NAMES, *files):
                own = files[NAMES[0] if name in NAMES else name]
                own.append(Upload(name=value.filename or name, content=await value.read()))
            else:
                raise Refused(400, f"{name}: no file of that name is read; give pictures as image", param=name)
    pictures, controls = files[NAMES[0]], files[CONTROL]
    if files[MASK] and not pictures:
        raise Refused(400, f"{MASK}: it says which part of an image is drawn anew; send one as image", param=MASK)
    if not (controls or pictures):
        raise Refused(
            400, f"image: there is none; send a picture, or as {CONTROL} what steers the model", param="image"
        )
    if len(pictures) > MOST_PICTURES:
        raise Refused(400, f"image: {len(pictures)} pictures; 1 to {MOST_PICTURES} are taken", param="image")
    for name in (MASK, CONTROL):
        if len(files[name]) > 1:
            raise Refused(400, f"{name}: {len(files[name])} files; one is taken", param=name)
    single = {name: next(iter(files[name]), None) for name in (MASK, CONTROL)}
    try:
        return ImageRequest.model_validate_strings(fields), Uploads(pictures=pictures, **single)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


async def read_pictures(pipeline: Pipeline, uploads: Uploads, size: tuple[int, int] | None) -> dict[str, Any]:
    """The files as `Pipeline.begin` takes them.

    Args:
        pipeline: that is to be told them.
        uploads: the files.
        size: (width, height) in pixels that is to be drawn; the bundle's own if None.

    Raises:
        Refused: one is no picture, or too large; there are too few or too many, or this bundle has no use for one.
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
    if uploads.control is not None and not resolver.choices.control:
        raise Refused(400, f"{CONTROL}: nothing steers this model; leave it out", param=CONTROL)

    scaled = resolver.opens or resolver.changes

    def read(upload: Upload) -> Pixels | Reference:
        image = _open(upload)
        return resized(image, width, height) if scaled else pipeline.fit(image)

    def read_mask(upload: Upload) -> Mask:
        return mask_of(_open(upload, None), width, height)

    def read_control(upload: Upload) -> Pixels:
        return resized(_open(upload), width, height)

    told: dict[str, Any] = {}
    with _refusing("image"):
        if count:
            resolver.check_pictures()
        found = [await asyncio.to_thread(read, upload) for upload in uploads.pictures]
        told |= dict(zip(("image", "last_image"), found, strict=False)) if scaled else {"reference": found}
    with _refusing(MASK):
        if uploads.mask is not None:
            told[MASK] = await asyncio.to_thread(read_mask, uploads.mask)
    with _refusing(CONTROL):
        if uploads.control is not None:
            told[CONTROL] = await asyncio.to_thread(read_control, uploads.control)
    return told


@contextmanager
def _refusing(param: str) -> Iterator[None]:
    """What is wrong within is wrong with that file of the form."""
    try:
        yield
    except (CompatibilityError, ConfigError) as error:
        raise Refused(400, str(error), param=param) from None


def _open(upload: Upload, mode: str | None = "RGB") -> "Image":
    file = io.BytesIO(upload.content)
    return open_picture(file, upload.name, formats=FORMATS, most_pixels=MOST_PIXELS, mode=mode)
