"""How an error reaches a client: OpenAI's `{"error": {message, type, param, code}}` always, a traceback never."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from raytier.errors import (
    AccessError,
    ConfigurationError,
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
    RaytierError,
)
from raytier.serve.fields import shown
from raytier.serve.schema import ErrorBody, ErrorResponse

logger = logging.getLogger(__name__)

#: Key of the ASGI scope's `state` that holds the id of the request.
REQUEST_ID = "request_id"
_SHOWN_PROBLEMS = 5
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 415: "unsupported_media_type"}


class JSONBytes(Response):
    """A response whose JSON is already encoded."""

    media_type = "application/json"


def request_id_of(request: Request) -> str:
    """Id of the request, as the middleware of `build_api` set it."""
    return str(getattr(request.state, REQUEST_ID, "unknown"))


def error_object(error: BaseException, request_id: str) -> tuple[int, ErrorResponse]:
    """HTTP status and error object of an exception.

    What raytier did not raise on purpose is a bug: it is logged with its traceback, and the client
    gets the request's id to quote and nothing of the inside.
    """
    if isinstance(error, RaytierError):
        if error.http_status >= 500:
            logger.error("request %s failed: %s: %s", request_id, type(error).__name__, error.message)
        param = error.param if isinstance(error, InvalidRequestError) else None
        code = None
        if isinstance(error, ModelNotFoundError):
            param, code = "model", "model_not_found"
        return error.http_status, _response(error.message, error.openai_type, param, code)
    if isinstance(error, HTTPException) and error.status_code < 500:
        return error.status_code, _refused(error.status_code, str(error.detail))
    logger.error("request %s failed unexpectedly", request_id, exc_info=error)
    message = f"Internal error. The server's log says more under request id {request_id}."
    return 500, _response(message, RaytierError.openai_type, None, None)


def error_response(error: BaseException, request_id: str) -> Response:
    """The same as an HTTP response; a full queue adds Retry-After in whole seconds."""
    status, body = error_object(error, request_id)
    headers = {}
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, AccessError) and error.missing:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONBytes(body.json_bytes(), status_code=status, headers=headers)


def invalid_request(problems: Sequence[Mapping[str, Any]]) -> InvalidRequestError:
    """One error out of pydantic's list: field, what is wrong, value. `param` is the first field."""
    lines: list[str] = []
    first: str | None = None
    for problem in problems:
        param, text = _explain(problem)
        first = first if lines else param
        lines.append(text)
    if len(lines) > _SHOWN_PROBLEMS:
        lines[_SHOWN_PROBLEMS:] = [f"and {len(lines) - _SHOWN_PROBLEMS} more problems"]
    return InvalidRequestError("; ".join(lines), param=first)


def install_handlers(app: FastAPI) -> None:
    """Register the handlers that give every error of `app` OpenAI's shape."""
    app.add_exception_handler(RaytierError, _on_raytier_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_raytier_error(request: Request, error: Exception) -> Response:
    return error_response(error, request_id_of(request))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    refused = invalid_request(error.errors())
    if isinstance(error.body, bytes):
        given = request.headers.get("content-type", "none")
        refused = InvalidRequestError(f"The body must be JSON: send Content-Type: application/json, not {shown(given)}")
    response = error_response(refused, request_id_of(request))
    route = request.scope.get("route")
    if not isinstance(error.body, bytes) and not str(getattr(route, "path", "")).startswith("/v1/"):
        response.status_code = 422  # OpenAI's own API says 400
    return response


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What the router itself refuses: unknown routes, wrong methods, unreadable bodies."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {shown(request.url.path)}"
    message = str(error.detail)
    if error.status_code == 404:
        message = f"No such route: {where}. The routes are listed at /api/docs."
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{where} is not allowed; use {allowed}."
    elif error.status_code == 400:
        message = f"The body of {where} could not be read as JSON: {message}"
    body = _refused(error.status_code, message)
    return JSONBytes(body.json_bytes(), status_code=error.status_code, headers=error.headers)


def _refused(status: int, message: str) -> ErrorResponse:
    kind = ConfigurationError.openai_type if status < 500 else RaytierError.openai_type
    return _response(message, kind, None, _CODES.get(status))


def _response(message: str, kind: str, param: str | None, code: str | None) -> ErrorResponse:
    return ErrorResponse(error=ErrorBody(message=message, type=kind, param=param, code=code))


def _explain(problem: Mapping[str, Any]) -> tuple[str | None, str]:
    """Field (None for the body as a whole) and one line of text for one of pydantic's errors."""
    context = problem.get("ctx") or {}
    location = [part for part in problem["loc"] if part != "body"]
    if problem["type"] == "json_invalid":
        position = location[0] if location else 0
        return None, f"The body is not valid JSON: {context.get('error', problem['msg'])} at character {position}"
    if (name := context.get("param")) is not None:
        location.append(name)
    param = _path(location)
    if problem["type"] == "extra_forbidden":
        return param, f"{param}: unknown field (value {shown(problem['input'])}); leave it out, or see /api/docs"
    if problem["type"] == "missing":
        return param, f"{param or 'The body'}: required, not given"
    if problem["type"] == "raytier":
        return param, f"{param}: {problem['msg']}"
    name = param or "The body"
    return param, f"{name}: {problem['msg']} (value {shown(problem['input'])}, {_json_type(problem['input'])})"


def _path(location: Sequence[int | str]) -> str | None:
    """`("messages", 0, "role")` -> `messages[0].role`."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path or None


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), type(value).__name__)
