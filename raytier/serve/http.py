"""The HTTP front: OpenAI's and the runtime's own routes, health, version; one shape for errors, an id on every request.

No `from __future__ import annotations` here: FastAPI reads the annotations at run time.
"""

import re
import uuid
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raytier.serve.backend import Backend
from raytier.serve.errors import REQUEST_ID, error_response, install_handlers
from raytier.serve.openai_routes import make_router
from raytier.serve.runtime_routes import make_runtime_router

#: Largest request body in bytes; a prompt of a million tokens as JSON integers is about 7 MB.
MAX_BODY_BYTES = 32 * 2**20

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

    def __init__(self, app: ASGIApp, echo: bool) -> None:
        self._app = app
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
            if received > MAX_BODY_BYTES:
                raise HTTPException(413, f"The body is larger than {MAX_BODY_BYTES} bytes; send less per request.")
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


def build_api(backend: Backend, *, echo_request_id: bool = True) -> FastAPI:
    """The ASGI application over `backend`.

    Args:
        backend: holds the engines.
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
    app.add_middleware(RequestScope, echo=echo_request_id)
    install_handlers(app)
    app.include_router(make_router(backend))
    app.include_router(make_runtime_router(backend.runtime, app.title, app.version))

    @app.get("/health", tags=["server"], summary="200 when requests can be served, else 503 with the reason")
    async def health() -> JSONResponse:
        reason = backend.health()
        if reason is not None:
            return JSONResponse({"status": "unavailable", "reason": reason}, status_code=503)
        return JSONResponse({"status": "ok", "models": backend.model_ids()})

    @app.get("/version", tags=["server"], summary="Version of raytier")
    async def get_version() -> dict[str, Any]:
        return {"version": package_version()}

    return app


def package_version() -> str:
    """Version of the installed package; `unknown` in a checkout that was never installed."""
    try:
        return version("raytier")
    except PackageNotFoundError:
        return "unknown"
