"""The routes: OpenAI's images API, models, health, readiness, metrics and a page."""

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from obsdiff_runtime.errors import ObsdiffError
from obsdiff_runtime.server import answers, edits, page
from obsdiff_runtime.server.follow import Follower
from obsdiff_runtime.server.limits import BoundedBodies
from obsdiff_runtime.server.metrics import Metrics
from obsdiff_runtime.server.models import ServedModel
from obsdiff_runtime.server.orders import BusyError, Drawn
from obsdiff_runtime.server.problems import Refused, problem_of, response_of
from obsdiff_runtime.server.schemas import ErrorResponse, ImageRequest, ImagesResponse, Model, ModelList
from obsdiff_runtime.version import __version__

log = logging.getLogger(__name__)

ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    code: {"model": ErrorResponse} for code in (400, 401, 404, 408, 413, 429, 500, 503, 504)
}
EVENT: Final = {"type": "object", "properties": {name: {"type": "string"} for name in ("event", "data")}}
ANSWERS: Final[dict[int | str, dict[str, Any]]] = {
    **ERRORS,
    200: {"content": {"text/event-stream": {"schema": EVENT}}, "description": "Pictures, or the events of them"},
}
SEEDS: Final = 2**32


@dataclass(kw_only=True)
class Server:
    """What the routes share.

    Attributes:
        models: by name; the first one is the default.
        api_keys: one of them must come with a request, where there are any.
        draining: no new requests are taken; those under way go on.
    """

    models: Mapping[str, ServedModel]
    metrics: Metrics
    api_keys: tuple[str, ...] = ()
    draining: bool = False
    started: float = field(default_factory=time.time)

    @property
    def is_idle(self) -> bool:
        return all(model.batcher.is_idle for model in self.models.values())

    def drain(self) -> None:
        self.draining = True
        for model in self.models.values():
            model.batcher.close()

    def find(self, name: str | None) -> ServedModel:
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models)
            raise Refused(404, f"there is no model {name!r}; there are {known}", param="model", code="model_not_found")
        return self.models[name]


def create_app(server: Server) -> FastAPI:
    """The application; whoever runs it starts and stops the models."""
    app = FastAPI(title="obsdiff", version=__version__, docs_url=None, redoc_url=None)
    app.state.server = server
    app.add_middleware(BoundedBodies, forms=(edits.PATH,))

    def authorised(request: Request) -> None:
        if not server.api_keys:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        known = [hmac.compare_digest(key.strip().encode(), each.encode()) for each in server.api_keys]
        if scheme.lower() != "bearer" or not any(known):
            raise Refused(401, "this server wants an API key: Authorization: Bearer KEY", code="invalid_api_key")

    protected = [Depends(authorised)]

    app.routes.extend(page.routes())

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the process can still draw."""
        dead = [name for name, model in server.models.items() if not model.batcher.is_alive]
        return JSONResponse({"status": "failed" if dead else "ok", "failed": dead}, 500 if dead else 200)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether new requests are taken."""
        return JSONResponse({"ready": not server.draining}, 503 if server.draining else 200)

    @app.get("/metrics", dependencies=protected)
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", dependencies=protected, responses={401: ERRORS[401]})
    async def models() -> ModelList:
        return ModelList(data=[_described(model) for model in server.models.values()])

    @app.get("/v1/models/{name}", dependencies=protected, responses={code: ERRORS[code] for code in (401, 404)})
    async def model(name: str) -> Model:
        return _described(server.find(name))

    @app.post("/v1/images/generations", dependencies=protected, responses=ANSWERS, response_model=ImagesResponse)
    async def generations(request: Request, asked: ImageRequest) -> Any:
        return await _caught(_generate(server, request, asked))

    @app.post(
        edits.PATH, dependencies=protected, responses=ANSWERS, response_model=ImagesResponse, openapi_extra=edits.BODY
    )
    async def edit(request: Request) -> Any:
        return await _caught(_edit(server, request))

    for kind in (Refused, ObsdiffError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer)
    return app


async def _caught(answer: Awaitable[Any]) -> Any:
    try:
        return await answer
    except (Refused, ObsdiffError, HTTPException, RequestValidationError):
        raise
    except Exception as bug:  # Starlette would answer it, and then close the connection on the answer
        log.exception("a request failed")
        return response_of(bug)


async def _answer(request: Request, error: Exception) -> Response:
    return response_of(error)


def _described(model: ServedModel) -> Model:
    return Model(id=model.id, created=model.created, details=model.details)


async def _edit(server: Server, request: Request) -> Any:
    asked, uploads = await edits.read_form(request)
    return await _generate(server, request, asked, uploads)


async def _generate(server: Server, request: Request, asked: ImageRequest, uploads: edits.Uploads | None = None) -> Any:
    model = server.find(asked.model)
    metrics, started = server.metrics.of(model.id), time.monotonic()
    seed = secrets.randbelow(SEEDS) if asked.seed is None else asked.seed
    if asked.output_format not in model.formats:
        known = " or ".join(model.formats)
        message = f"{model.id} draws films, and {asked.output_format} holds none; ask for {known}"
        raise Refused(400, message, param="output_format")
    width, height = asked.pixels or (None, None)
    call: dict[str, Any] = {
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "num_inference_steps": asked.num_inference_steps,
        "guidance_scale": asked.guidance_scale,
        "guidance_scale_2": asked.guidance_scale_2,
        "num_frames": asked.num_frames,
        "height": height,
        "width": width,
        "seed": seed,
        "noise_source": asked.noise_source,
        "num_images": asked.n,
        "strength": None if uploads else asked.strength,
    }
    if asked.control_scale is not None and (uploads is None or uploads.control is None):
        raise Refused(400, "control_scale says how much a control picture counts; send one", param="control_scale")
    try:
        settings = model.resolve(call)
        if uploads:  # decoded, and scaled to what is asked for, where that is allowed and there is room
            model.batcher.require_room()
            call |= await edits.read_pictures(model.pipeline, uploads, asked.pixels)
            call["strength"] = asked.strength
            call["control_scale"] = asked.control_scale
            settings = model.resolve(call)
        order = model.order(call, settings, asked.n, asked.partial_images if asked.stream else 0)
        follower = Follower.submit(model.batcher, order, request)
    except BusyError as error:
        metrics.rejected("draining" if server.draining else "queue full")
        metrics.answered(problem_of(error).status, time.monotonic() - started, 0)
        raise
    answer = answers.Answer(asked, settings, seed, model.pipeline.fps, edits=bool(uploads))

    def told(status: int, images: int) -> None:
        metrics.answered(status, time.monotonic() - started, images)

    if asked.stream:
        return StreamingResponse(answers.events(follower, answer, told), media_type="text/event-stream")
    pictures = {}
    try:
        async for event in follower:
            if isinstance(event, Drawn):
                pictures[event.image] = await asyncio.to_thread(answer.encode, event.pixels)
    except Exception as error:
        told(problem_of(error).status, len(pictures))
        raise
    told(200, len(pictures))
    return answer.response([pictures[image] for image in sorted(pictures)], follower.seconds)
