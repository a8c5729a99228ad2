"""H4: models that are not held here, asked of a real second server on localhost."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from openai import AsyncOpenAI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from raytier.config import Upstream as UpstreamSection
from raytier.serve.auth import Keys
from raytier.serve.http import build_api
from raytier.serve.upstream import Upstream
from tests.serve.echo import MODEL, Served

CHUNK: dict[str, Any] = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "big"}


class Other:
    """Another OpenAI-compatible server.

    Attributes:
        paths: of every request, as it stood on the wire, the query with it.
        seen: headers and body of requests for models and chats.
        release: the second half of a stream waits for it.
        gone: a stream was cut.
    """

    def __init__(self) -> None:
        self.paths: list[bytes] = []
        self.seen: list[tuple[dict[str, str], Any]] = []
        self.release = asyncio.Event()
        self.gone = asyncio.Event()
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
        ]
        self._routes = Starlette(routes=routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.paths.append(scope["raw_path"] + b"?" * bool(scope["query_string"]) + scope["query_string"])
        await self._routes(scope, receive, send)

    async def models(self, request: Request) -> Response:
        self.seen.append((dict(request.headers), None))
        cards = [{"id": name, "object": "model", "created": 1, "owned_by": "other"} for name in ("big", MODEL)]
        return JSONResponse({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        return JSONResponse({"id": request.path_params["name"], "object": "model", "created": 1, "owned_by": "other"})

    async def embeddings(self, request: Request) -> Response:
        error = {"message": "no room", "type": "busy", "param": None, "code": "x"}
        return JSONResponse({"error": error}, 429, {"Retry-After": "7", "Set-Cookie": "session=of-one-client; Path=/"})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.seen.append((dict(request.headers), body))
        if body["model"] == "slow":
            await asyncio.sleep(30)
        if not body.get("stream"):
            message = {"role": "assistant", "content": "from afar"}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            return JSONResponse(
                {"id": "c", "object": "chat.completion", "created": 1, "model": "big", "choices": choices}
            )
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        try:
            for text in ("from ", "afar"):
                choices = [{"index": 0, "delta": {"content": text}, "finish_reason": None}]
                yield f"data: {json.dumps({**CHUNK, 'choices': choices})}\n\n"
                await self.release.wait()
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.gone.set()
            raise


@asynccontextmanager
async def running(app: Any) -> AsyncIterator[str]:
    """`app` on a port of localhost; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", lifespan="off"))
    task = asyncio.ensure_future(server.serve())
    try:
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        await task


@pytest.fixture
async def other() -> Other:
    return Other()


@asynccontextmanager
async def front(served: Served, base_url: str, keys: Keys | None = None, **section: Any) -> AsyncIterator[str]:
    upstream = Upstream(UpstreamSection(base_url=base_url, **section))
    try:
        async with running(build_api(served, keys=keys, upstream=upstream)) as url:
            yield url
    finally:
        await upstream.aclose()


Ask = Callable[[AsyncOpenAI], Awaitable[Any]]


async def test_other_models_are_asked_upstream(served: Served, other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYTIER_UPSTREAM_KEY", "upstream-key")
    other.release.set()
    messages: Any = [{"role": "user", "content": "dog"}]
    async with (
        running(other) as behind,
        front(served, f"{behind}/v1/", Keys(["sesame"])) as url,
        AsyncOpenAI(api_key="sesame", base_url=f"{url}/v1", max_retries=0) as client,
    ):
        own = await client.chat.completions.create(model=MODEL, messages=messages)
        assert own.choices[0].message.content == "dog"
        assert other.seen == []
        far = await client.chat.completions.create(
            model="big", messages=messages, extra_body={"its_own": 1}, extra_headers={"X-Request-Id": "mine"}
        )
        assert far.choices[0].message.content == "from afar"
        headers, body = other.seen[0]
        assert body == {"model": "big", "messages": messages, "its_own": 1}, "as it came"
        assert headers["authorization"] == "Bearer upstream-key"
        assert headers["x-request-id"] == "mine"
        assert "sesame" not in str(headers)
        stream = await client.chat.completions.create(model="big", messages=messages, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "from afar"
        assert [model.id for model in (await client.models.list()).data] == [MODEL, "big"]
        assert (await client.models.retrieve("big")).owned_by == "other"
        assert (await client.models.retrieve(MODEL)).owned_by == "raytier"
        with pytest.raises(openai.PermissionDeniedError):
            await client.with_options(api_key="wrong").chat.completions.create(model="big", messages=messages)


async def test_events_come_one_by_one_and_a_client_that_leaves_is_felt_upstream(served: Served, other: Other) -> None:
    body = {"model": "big", "messages": [], "stream": True}
    async with (
        running(other) as behind,
        front(served, f"{behind}/v1") as url,
        httpx.AsyncClient() as http,
    ):
        async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            first = await anext(answer.aiter_bytes())
            assert b"from " in first
            assert b"afar" not in first
        await asyncio.wait_for(other.gone.wait(), 10)


async def test_what_upstream_refuses_is_passed_on(served: Served, other: Other) -> None:
    async with running(other) as behind, front(served, f"{behind}/v1") as url, httpx.AsyncClient() as http:
        refused = await http.post(f"{url}/v1/embeddings", json={"model": "big", "input": "x"})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "7")
        assert refused.json()["error"]["message"] == "no room"
        own = await http.post(
            f"{url}/v1/completions", content=b'{"model": "big"', headers={"content-type": "application/json"}
        )
        assert own.status_code == 400
        assert "not valid JSON" in own.json()["error"]["message"]
        assert (await http.post(f"{url}/v1/completions", json={"prompt": "dog"})).json()["model"] == MODEL


async def test_nobody_there_is_503_and_silence_is_504(served: Served, other: Other) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        async with front(served, nowhere) as url, httpx.AsyncClient() as http:
            refused = await http.post(f"{url}/v1/chat/completions", json={"model": "big"})
            assert refused.status_code == 503
            assert nowhere in refused.json()["error"]["message"]
            assert [m["id"] for m in (await http.get(f"{url}/v1/models")).json()["data"]] == [MODEL]
    async with (
        running(other) as behind,
        front(served, f"{behind}/v1", timeout_s=0.2) as url,
        httpx.AsyncClient() as http,
    ):
        late = await http.post(f"{url}/v1/chat/completions", json={"model": "slow", "messages": []})
        assert late.status_code == 504
        assert "0.2 s" in late.json()["error"]["message"]


async def test_a_stream_that_breaks_off_is_an_error_event(served: Served, other: Other) -> None:
    body = {"model": "big", "messages": [], "stream": True}
    async with (
        running(other) as behind,
        front(served, f"{behind}/v1", timeout_s=0.3) as url,
        httpx.AsyncClient() as http,
    ):
        answer = await http.post(f"{url}/v1/chat/completions", json=body)
    last = json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert "0.3 s" in last["error"]["message"]
    assert "[DONE]" not in answer.text


OUTSIDE = [
    ("POST", "/v1/%2e%2e/api/models/unload"),
    ("POST", "/v1/chat/completions/%2e%2e/%2e%2e/%2e%2e/api/models/unload"),
    ("POST", "/v1/chat/completions%3F/%2e%2e"),
    ("POST", "/v1/models/unload"),
    ("GET", "/v1/models/%2e%2e/%2e%2e/api/status"),
    ("GET", "/v1/models/%2e%2e"),
    ("GET", "/v1/models/%2e"),
    ("GET", "/v1/models/a%2F..%2F..%2F..%2Fapi%2Fstatus"),
    ("GET", "/v1/models/..%5C..%5Capi"),
]


@pytest.mark.parametrize(("method", "path"), OUTSIDE)
async def test_nothing_but_its_openai_routes_is_reached(served: Served, other: Other, method: str, path: str) -> None:
    """Ours is the key that goes with a request, so a client must not choose where it goes."""
    async with running(other) as behind, front(served, f"{behind}/v1") as url:
        # Not with httpx, which resolves what looks like a path.
        status = await raw(url, f"{method} {path}", b'{"model": "their-model"}')
    assert status in (404, 405)
    assert other.paths == []


async def test_a_model_is_one_segment_and_a_query_passes(served: Served, other: Other) -> None:
    async with running(other) as behind, front(served, f"{behind}/v1") as url:
        for path, status in (("org/a%23b%3Fc", 200), ("a%0Ab", 404), ("org%2Fname?x=%201&y=%23", 200)):
            assert await raw(url, f"GET /v1/models/{path}", b"") == status
        assert await raw(url, "POST /v1/embeddings?api-version=1&b", b'{"model": "big"}') == 429
    assert other.paths == [
        b"/v1/models/org%2Fa%23b%3Fc",
        b"/v1/models/a%0Ab",
        b"/v1/models/org%2Fname?x=%201&y=%23",
        b"/v1/embeddings?api-version=1&b",
    ]


async def test_headers_need_not_be_ascii(served: Served, other: Other) -> None:
    other.release.set()
    async with running(other) as behind, front(served, f"{behind}/v1") as url:
        body = b'{"model": "big", "messages": []}'
        assert await raw(url, "POST /v1/chat/completions", body, "User-Agent: Köln 1.0") == 200
    assert other.seen[0][0]["user-agent"] == "Köln 1.0".encode().decode("latin-1")


async def test_a_cookie_of_one_client_is_not_sent_for_another(served: Served, other: Other) -> None:
    async with running(other) as behind, front(served, f"{behind}/v1") as url, httpx.AsyncClient() as http:
        await http.post(f"{url}/v1/embeddings", json={"model": "big", "input": "x"})
        await http.post(f"{url}/v1/chat/completions", json={"model": "big", "messages": []})
    assert "cookie" not in other.seen[0][0]


async def raw(url: str, request: str, body: bytes, header: str = "Accept: */*") -> int:
    """Status of the answer to a request that is sent as it is written here."""
    address = httpx.URL(url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        head = f"{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()
    return int(answer.split()[1])
