"""What a client reads when something is refused or breaks: OpenAI's error body and an id.

A message never holds a path, an address or a Python repr; the log has those, under the same id.
"""

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import uuid4

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from eaglerun.errors import CapacityError, EngineError, RequestError

log = logging.getLogger(__name__)

RETRY_AFTER = {"retry-after": "1"}
REQUEST_ID = "eaglerun.request_id"
# What an error body repeats of a request, in characters.
MAX_MESSAGE, MAX_PARAM, MAX_STEP = 1024, 256, 64
BROKEN = "the server failed to answer; its log has the details under this request id"

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """A refusal with its HTTP status, and the request field (``param``) it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            status, shortened(message, MAX_MESSAGE), dict(headers) if headers else None
        )
        self.param = None if param is None else shortened(param, MAX_PARAM)
        self.code = code


def shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def refuse(param: str, message: str, code: str | None = None) -> ApiError:
    """A 400 about one field."""
    return ApiError(400, f"{shortened(param, MAX_PARAM)}: {message}", param, code)


def overloaded(message: str, headers: Mapping[str, str] | None = None) -> ApiError:
    """A 503 that is worth another try."""
    return ApiError(503, message, code="overloaded", headers={**RETRY_AFTER, **(headers or {})})


def new_id() -> str:
    return uuid4().hex


def request_id(scope: Scope) -> str:
    """The id that the guard gave the request."""
    found = scope[REQUEST_ID]
    assert isinstance(found, str)
    return found


def error_object(error: ApiError, id_: str) -> dict[str, Any]:
    kind = _KINDS.get(
        error.status_code, "server_error" if error.status_code >= 500 else "invalid_request_error"
    )
    body = {"message": error.detail, "type": kind, "param": error.param, "code": error.code}
    return {"error": body | {"request_id": id_}}


def error_response(error: ApiError, id_: str) -> Response:
    return Response(
        orjson.dumps(error_object(error, id_)),
        error.status_code,
        headers=error.headers,
        media_type="application/json",
    )


KnownError = ApiError | RequestError | CapacityError | EngineError


def as_api_error(error: KnownError, names: Mapping[str, str]) -> ApiError:
    """An error of the engine's door as the client sees it.

    ``names`` are the route's names of fields that the engine calls otherwise.
    """
    match error:
        case ApiError():
            return error
        case RequestError():
            names = {"num_draft_tokens": "speculation.num_draft_tokens", **names}
            return refuse(names.get(error.field, error.field), error.message)
        case CapacityError():
            return overloaded(str(error))
        case EngineError():
            return ApiError(503, "the engine is not running", headers=RETRY_AFTER)


def install_handlers(app: FastAPI) -> None:
    """Every way to fail ends in an error body."""

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if not isinstance(error, ApiError):
            error = ApiError(error.status_code, error.detail, headers=error.headers)
        return error_response(error, request_id(request.scope))

    async def on_engine(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError | CapacityError | EngineError)
        return error_response(as_api_error(error, {}), request_id(request.scope))

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(
            validation_error(error.errors(), error.body), request_id(request.scope)
        )

    async def on_bug(request: Request, error: Exception) -> Response:
        id_ = request_id(request.scope)
        log.error("request %s failed", id_)
        # This response is made outside the guard, which names the request in all others.
        return error_response(ApiError(500, BROKEN, headers={"x-request-id": id_}), id_)

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)
    for kind in (RequestError, CapacityError, EngineError):
        app.add_exception_handler(kind, on_engine)
    app.add_exception_handler(Exception, on_bug)


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean "..."?', or nothing."""
    close = difflib.get_close_matches(name, known, 1)
    return f'; did you mean "{close[0]}"?' if close else ""


def validation_error(errors: Sequence[Any], body: Any) -> ApiError:
    """The first field that is wrong, with everything that is said about it."""
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON")
    found: dict[str | None, list[str]] = {}
    for error in errors:
        param = _path(error["loc"], error["type"], body)
        field = error.get("ctx", {}).get("field")
        if field is not None:
            param = f"{param}.{field}" if param else field
        message = "is required" if error["type"] == "missing" else error["msg"]
        found.setdefault(param, []).append(message.removeprefix("Input "))
    param, messages = next(iter(found.items()))
    text = " or ".join(dict.fromkeys(messages))
    if param is None:
        return ApiError(400, "the body must be a JSON object, sent as application/json")
    return refuse(param, text)


def _path(loc: Sequence[str | int], kind: str, body: Any) -> str | None:
    """The field in the body, as messages[0].content; steps that only name a type are left out."""
    path = ""
    value = body
    for i, step in enumerate(loc[1:], 2):
        missing = i == len(loc) and kind == "missing"
        if isinstance(step, int) and isinstance(value, list) and step < len(value):
            path += f"[{step}]"
            value = value[step]
        elif isinstance(step, str) and (missing or (isinstance(value, dict) and step in value)):
            path += f".{shortened(step, MAX_STEP)}" if path else shortened(step, MAX_STEP)
            value = value[step] if not missing else None
    return path or (str(loc[1]) if loc[0] in ("query", "path") and len(loc) > 1 else None)
