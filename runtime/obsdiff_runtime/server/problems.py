"""What went wrong, in OpenAI's shape: a status, a sentence, and what to try."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from obsdiff_runtime.errors import CancelledError, ConfigError, ObsdiffError
from obsdiff_runtime.server.orders import BusyError, LateError
from obsdiff_runtime.server.schemas import ErrorResponse, ImageRequest, Problem

CLIENT_GONE: Final = 499
"""nginx's status for it; nobody is there to read it but the log."""


class Refused(Exception):  # noqa: N818
    """A request that is answered with this status."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True, kw_only=True)
class Told:
    """An error as it is told."""

    status: int
    problem: Problem
    headers: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return ErrorResponse(error=self.problem).model_dump()


def problem_of(error: Exception) -> Told:
    """How an error is told; one that is not expected says nothing of the server's inside."""
    match error:
        case Refused():
            return _told(error.status, str(error), param=error.param, code=error.code)
        case RequestValidationError():
            return _invalid(error.errors())
        case HTTPException():
            return _told(error.status_code, str(error.detail), headers=error.headers or {})
        case BusyError():
            status = 503 if "shutting down" in str(error) or "stopped" in str(error) else 429
            headers = {"Retry-After": str(max(1, round(error.retry_after_s)))}
            return _told(status, str(error), kind="server_overloaded", code="server_overloaded", headers=headers)
        case LateError():
            return _told(504, str(error), kind="timeout", code="deadline_exceeded")
        case CancelledError():
            return _told(CLIENT_GONE, str(error))
        case ConfigError():
            return _told(400, str(error), param=_subject(str(error)))
        case ObsdiffError():
            return _told(500, str(error))
        case _:
            return _told(500, "the server failed at this request; its log says why")


def response_of(error: Exception) -> JSONResponse:
    told = problem_of(error)
    return JSONResponse(told.to_json(), told.status, headers=dict(told.headers))


def _told(
    status: int,
    message: str,
    *,
    kind: str | None = None,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Told:
    kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
    return Told(
        status=status, problem=Problem(message=message, type=kind, param=param, code=code), headers=headers or {}
    )


def _subject(message: str) -> str | None:
    """The field that a message is about, if any: then it begins with its name."""
    first = message.partition(" ")[0].rstrip(":")
    name = "size" if first in ("width", "height") else first
    return name if name in ImageRequest.model_fields else None


def _invalid(errors: Sequence[Any]) -> Told:
    first = errors[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    name = where[0] if where else None
    if first["type"] == "json_invalid":
        return _told(400, "the body of the request is not JSON")
    if first["type"] == "extra_forbidden" and name is not None:
        near = difflib.get_close_matches(name, ImageRequest.model_fields, n=1)
        return _told(400, f"unknown parameter {name!r}" + (f"; did you mean {near[0]}?" if near else ""), param=name)
    what = str(first["msg"])
    return _told(
        400, f"{name}: {what[:1].lower()}{what[1:]}" if name else "the body should be a JSON object", param=name
    )
