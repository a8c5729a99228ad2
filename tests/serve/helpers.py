"""A client that can go away, and what it received."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI


class Exchange:
    """One request straight over ASGI, as Ray Serve makes it: a task that is cancelled when the client goes away."""

    def __init__(
        self,
        app: FastAPI,
        path: str,
        body: Any,
        spec_version: str = "2.3",
        on_send: Callable[[dict[str, Any]], Awaitable[None]] | None = None,
    ) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec_version},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        self._request = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        self._gone = asyncio.Event()
        self._on_send = on_send
        self._arrived = asyncio.Condition()
        self.sent: list[dict[str, Any]] = []
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))  # type: ignore[arg-type]

    async def _receive(self) -> dict[str, Any]:
        if self._request:
            return self._request.pop()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(dict(message))
        async with self._arrived:
            self._arrived.notify_all()
        if self._on_send is not None:
            await self._on_send(message)

    def hang_up(self) -> None:
        """The server tells the application that the client has gone."""
        self._gone.set()

    @property
    def status(self) -> int | None:
        return next((m["status"] for m in self.sent if m["type"] == "http.response.start"), None)

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something in what was sent."""

        async def met() -> None:
            async with self._arrived:
                await self._arrived.wait_for(condition)

        await asyncio.wait_for(met(), 10)


def events(body: bytes) -> list[Any]:
    """The events of a stream, checked for exact framing; `[DONE]` stays a string."""
    assert body.endswith(b"\n\n")
    parsed: list[Any] = []
    for frame in body[:-2].split(b"\n\n"):
        assert frame.startswith(b"data: ")
        assert b"\n" not in frame
        data = frame[6:]
        parsed.append("[DONE]" if data == b"[DONE]" else json.loads(data))
    return parsed
