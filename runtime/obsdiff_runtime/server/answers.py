"""Pictures and progress as OpenAI's clients read them: one JSON answer, or server-sent events."""

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final

from obsdiff_runtime import films
from obsdiff_runtime.kinds import Settings
from obsdiff_runtime.server.follow import Follower
from obsdiff_runtime.server.orders import Drawn, Pixels, Previewed, Stepped
from obsdiff_runtime.server.problems import problem_of
from obsdiff_runtime.server.schemas import ImageData, ImageRequest, ImagesResponse, Measured

QUALITY: Final = 90
"""Of jpeg and webp where a request does not say."""
NO_TOKENS: Final = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}
"""OpenAI's clients expect a usage; tokens are not what is counted here."""


class Answer:
    """How the pictures of one request are told."""

    def __init__(self, asked: ImageRequest, settings: Settings, seed: int, fps: float, *, edits: bool = False) -> None:
        self._asked, self._settings, self._seed, self._fps = asked, settings, seed, fps
        self._kind = "image_edit" if edits else "image_generation"
        self.size = f"{settings.width}x{settings.height}"

    @property
    def tells_progress(self) -> bool:
        return self._asked.progress

    def encode(self, pixels: Pixels) -> str:
        """A picture, (height, width, 3), or a film, (frames, height, width, 3), as a file in base64."""
        from PIL import Image

        file = io.BytesIO()
        options: dict[str, Any] = {"compress_level": 1}
        if self._asked.output_format != "png":
            options = {"quality": self._asked.output_compression or QUALITY}
        if pixels.ndim == 4:
            films.animate(pixels, file, self._asked.output_format, self._fps, **options)
        else:
            Image.fromarray(pixels).save(file, self._asked.output_format, **options)
        return base64.b64encode(file.getvalue()).decode()

    def response(self, pictures: Sequence[str], seconds: Mapping[str, float]) -> ImagesResponse:
        return ImagesResponse(
            created=int(time.time()),
            data=[self._data(picture) for picture in pictures],
            size=self.size,
            output_format=self._asked.output_format,
            metrics=self.measured(seconds),
        )

    def measured(self, seconds: Mapping[str, float]) -> Measured:
        return Measured(
            seed=self._seed,
            num_inference_steps=self._settings.num_inference_steps,
            guidance_scale=self._settings.guidance_scale,
            stage_seconds=dict(seconds),
        )

    def event(self, kind: str, picture: str, **more: Any) -> bytes:
        """A server-sent event that holds a picture."""
        data = {
            "type": f"{self._kind}.{kind}",
            "b64_json": picture,
            "created_at": int(time.time()),
            "size": self.size,
            "quality": "auto",
            "background": "opaque",
            "output_format": self._asked.output_format,
            **more,
        }
        return sse(f"{self._kind}.{kind}", data)

    def _data(self, picture: str) -> ImageData:
        if self._asked.response_format == "b64_json":
            return ImageData(b64_json=picture)
        return ImageData(url=f"data:image/{self._asked.output_format};base64,{picture}")


async def events(follower: Follower, answer: Answer, told: Callable[[int, int], None]) -> AsyncIterator[bytes]:
    """The order's events as server-sent ones; an error is the last."""
    images, status = 0, 499
    try:
        async for event in follower:
            if isinstance(event, Stepped) and answer.tells_progress:
                yield sse("obsdiff.progress", {"type": "obsdiff.progress", "step": event.done, "steps": event.calls})
            elif isinstance(event, Previewed):
                picture = await asyncio.to_thread(answer.encode, event.pixels)
                more = {"partial_image_index": event.index, "image_index": event.image}
                yield answer.event("partial_image", picture, **more)
            elif isinstance(event, Drawn):
                picture = await asyncio.to_thread(answer.encode, event.pixels)
                images += 1
                yield answer.event("completed", picture, usage=NO_TOKENS, image_index=event.image)
        status = 200
        if answer.tells_progress:
            metrics = answer.measured(follower.seconds).model_dump()
            yield sse("obsdiff.finished", {"type": "obsdiff.finished", "metrics": metrics})
    except Exception as error:
        problem = problem_of(error)
        status = problem.status
        yield sse("error", problem.to_json())
    finally:
        told(status, images)


def sse(event: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {event}\ndata: {json.dumps(data)}\n\n".encode()
