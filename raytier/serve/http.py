"""The HTTP front: all routes, and what every request passes before them: an id, a limit, keys, forwarding."""

from __future__ import annotations

import re
import uuid
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from fastapi import FastAPI, HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raytier.config import MIB, ApiSection
from raytier.serve.auth import KeyGuard, Keys
from raytier.serve.backend import Backend
from raytier.serve.errors import REQUEST_ID, error_response, install_handlers
from raytier.serve.openai_routes import make_router
from raytier.serve.runtime_routes import make_runtime_router
from raytier.serve.server_routes import make_server_router

MAX_BODY_BYTES = int(ApiSection().max_body_mb * MIB)

if TYPE_CHECKING:
    from raytier.serve.upstream import Upstream

# What goes into logs and back into a header unchanged.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestScope:
    """Give every request an id, a limit to its body, and every exception an answer.

    Pure ASGI: Starlette's `BaseHTTPMiddleware` runs the route in a task of its own, which would
    hide a disconnect (Ray Serve cancels the task that it started).

    Args:
        echo: write `X-Request-Id` into the answer. Ray Serve's proxy appends that header itself
            (and passes the id on in the request), so the deployment turns this off: twice would be
            read as one value "id, id".
    """

    def __init__(self, app: ASGIApp, echo: bool, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._echo = echo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})[REQUEST_ID] = request_id
        started = False
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                # An HTTPException: FastAPI takes every other one for JSON that it cannot read.
                raise HTTPException(
                    413,
                    f"The body is larger than {self._max_body_bytes} bytes (api.max_body_mb); send less per request.",
                )
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self._echo:
                    MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, limited_receive, send_with_id)
        except Exception as error:
            response = error_response(error, request_id)
            if started:
                raise  # too late for a status: the server cuts the connection
            await response(scope, receive, send_with_id)


def build_api(
    backend: Backend,
    *,
    keys: Keys | None = None,
    upstream: Upstream | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    echo_request_id: bool = True,
) -> FastAPI:
    """The ASGI application over `backend`.

    Args:
        backend: holds the engines.
        keys: who may call; None: anybody.
        upstream: gets requests for models that `backend` does not hold.
        max_body_bytes: largest request body.
        echo_request_id: answer with `X-Request-Id`; False behind Ray Serve, whose proxy does it.
    """
    app = FastAPI(
        title="raytier",
        version=package_version(),
        description="Language models larger than the fastest memory, on Ray.",
        docs_url="/api/docs",
        redoc_url="/api/redoc",
        openapi_url="/api/openapi.json",
    )
    # The last one added is the first that sees a request.
    if upstream is not None:
        from raytier.serve.upstream import Forwarding  # with httpx, 4 MiB: for those who forward

        app.add_middleware(Forwarding, upstream=upstream, held=backend.model_ids)
    app.add_middleware(KeyGuard, keys=keys or Keys())
    app.add_middleware(RequestScope, echo=echo_request_id, max_body_bytes=max_body_bytes)
    install_handlers(app)
    app.include_router(make_router(backend, upstream))
    app.include_router(make_runtime_router(backend.runtime, app.title, app.version))
    app.include_router(make_server_router(backend, app.version))

    return app


def package_version() -> str:
    """Version of the installed package; `unknown` in a checkout that was never installed."""
    try:
        return version("raytier")
    except PackageNotFoundError:
        return "unknown"
