"""Forwarding: requests under /v1 for models that are not held here go to another OpenAI-compatible server, as they are.

The bytes of the request and of the answer pass unchanged, events of a stream one by one as they come. A client's own
key stays here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import quote

import httpx
from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raytier.config import Upstream as UpstreamSection
from raytier.errors import UpstreamError, UpstreamTimeoutError
from raytier.serve.auth import read_keys, route_path
from raytier.serve.errors import REQUEST_ID, error_object
from raytier.serve.sse import event

logger = logging.getLogger(__name__)

#: What is forwarded, word by word: of any other path the upstream's own reading could lead out of its /v1.
_ROUTES = frozenset(
    {
        "/v1/audio/speech",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/images/generations",
        "/v1/moderations",
        "/v1/rerank",
        "/v1/responses",
        "/v1/score",
    }
)
_MODEL = "/v1/models/"
_PASSED_ON = frozenset({b"accept", b"content-type", b"openai-beta", b"user-agent"})
_PASSED_BACK = frozenset({b"content-type", b"cache-control", b"retry-after", b"x-accel-buffering"})
_QUERY = "!$%&'()*+,/:;=?@"
#: A list of models must not wait for a server that may be off.
_LIST_TIMEOUT_S = 2.0


class Upstream:
    """The server behind this one.

    Raises:
        ConfigurationError: its key is not where the configuration says.
    """

    def __init__(self, section: UpstreamSection) -> None:
        assert section.base_url is not None
        self.base_url = section.base_url
        keys = read_keys(section.key, "api.upstream.key")
        self._headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        timeout = httpx.Timeout(section.timeout_s, connect=section.connect_timeout_s)
        # What it answers is for the client to follow, and this machine's proxy settings are not for localhost. A cookie
        # that one client got would go out with the requests of all others.
        no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))
        self._client = httpx.AsyncClient(
            timeout=timeout, limits=httpx.Limits(max_connections=None), trust_env=False, cookies=no_cookies
        )
        self._timeout_s = section.timeout_s

    async def models(self) -> list[dict[str, Any]]:
        """Its models as it describes them; none while it does not answer."""
        try:
            answer = await self._client.get(f"{self.base_url}/models", headers=self._headers, timeout=_LIST_TIMEOUT_S)
            answer.raise_for_status()
            cards = answer.json()["data"]
            return [card for card in cards if isinstance(card, dict) and isinstance(card.get("id"), str)]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s does not list its models: %s: %s", self.base_url, type(error).__name__, error)
            return []

    async def forward(
        self, method: str, path: str, query: bytes, headers: Headers, body: bytes, request_id: str
    ) -> Response:
        """The answer to a request, its body still to come.

        Args:
            path: below /v1, percent-encoded, without segments of dots.
            query: as it came, percent-encoded.
            headers: the client's, of which some are passed on.

        Raises:
            UpstreamError: it cannot be reached. UpstreamTimeoutError: it does not answer.
        """
        # As bytes: what a header holds need not be ASCII.
        passed = [(name, value) for name, value in headers.raw if name in _PASSED_ON]
        passed += [(b"x-request-id", request_id.encode())]
        passed += [(name.encode(), value.encode()) for name, value in self._headers.items()]
        # Of a query the bytes that a URL cannot hold are escaped, the others pass.
        url = f"{self.base_url}{path}" + (f"?{quote(query, safe=_QUERY)}" if query else "")
        request = self._client.build_request(method, url, content=body, headers=passed)
        try:
            answer = await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise self._failure(error) from error
        given = ((name.lower(), value) for name, value in answer.headers.raw)
        kept = {name.decode(): value.decode("latin-1") for name, value in given if name in _PASSED_BACK}
        return _Passed(answer, self._failure, request_id, headers=kept)

    def _failure(self, error: httpx.HTTPError) -> UpstreamError:
        who = f"the server behind this one, {self.base_url},"
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            return UpstreamTimeoutError(f"{who} did not answer within {self._timeout_s:g} s")
        return UpstreamError(f"{who} cannot be reached: {type(error).__name__}")

    async def aclose(self) -> None:
        await self._client.aclose()


class _Passed(StreamingResponse):
    """An answer from upstream; however it ends, the connection to there is given back."""

    def __init__(
        self,
        answer: httpx.Response,
        failure: Callable[[httpx.HTTPError], UpstreamError],
        request_id: str,
        headers: dict[str, str],
    ) -> None:
        self._answer = answer
        self._failure = failure
        self._request_id = request_id
        super().__init__(self._content(), status_code=answer.status_code, headers=headers)

    async def _content(self) -> AsyncGenerator[bytes, None]:
        try:
            async for part in self._answer.aiter_bytes():
                yield part
        except httpx.HTTPError as error:
            failure = self._failure(error)
            # A stream of events can still say what is wrong; anything else is cut.
            if not self.headers.get("content-type", "").startswith("text/event-stream"):
                raise failure from error
            yield event(error_object(failure, self._request_id)[1])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.aclose()


class Forwarding:
    """Sends on what is meant for other models; everything else goes its way.

    Args:
        held: ids of the models that are served here.
    """

    def __init__(self, app: ASGIApp, upstream: Upstream, held: Callable[[], Collection[str]]) -> None:
        self._app = app
        self._upstream = upstream
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope) if scope["type"] == "http" else ""
        if path in _ROUTES and scope["method"] == "POST":
            await self._post(path, scope, receive, send)
        elif path.startswith(_MODEL) and scope["method"] == "GET":
            model = path.removeprefix(_MODEL)
            # The path is decoded here, and encoded again so that it cannot leave /models/. Segments of dots are no
            # model's name, and servers may resolve them even when they are encoded: the route here answers 404.
            known = not {".", ".."} & set(model.replace("\\", "/").split("/"))
            target = f"/models/{quote(model, safe='')}"
            await self._pass(target, model if known else None, b"", scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _post(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        received = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            received += message.get("body", b"")
            more = message.get("more_body", False)
        body = bytes(received)
        model = None
        # What is no JSON is refused by the route itself.
        with suppress(ValueError, RecursionError):
            given = json.loads(body)
            model = given.get("model") if isinstance(given, dict) else None
        await self._pass(path.removeprefix("/v1"), model, body, scope, _replayed(body, receive), send)

    async def _pass(self, path: str, model: object, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        if not isinstance(model, str) or model in self._held():
            await self._app(scope, receive, send)
            return
        request_id = str(scope["state"][REQUEST_ID])
        response = await self._upstream.forward(
            scope["method"], path, scope.get("query_string", b""), Headers(scope=scope), body, request_id
        )
        await response(scope, receive, send)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` from the beginning."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return pending.pop() if pending else await receive()

    return again
