"""Server-sent events: framing, the end of a stream, and what happens when the client goes away."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from raytier.serve.errors import error_object
from raytier.serve.schema import Answer

DONE = b"data: [DONE]\n\n"
# Proxies must neither keep nor hold back events.
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(answer: Answer) -> bytes:
    """One event: `data: {json}`, an empty line."""
    return b"data: " + answer.json_bytes() + b"\n\n"


async def guarded(events: AsyncIterator[bytes], request_id: str) -> AsyncGenerator[bytes, None]:
    """`events`, then `[DONE]`; an exception becomes one event with the error object and ends the stream without it."""
    try:
        async for part in events:
            yield part
    except Exception as error:
        yield event(error_object(error, request_id)[1])
        return
    yield DONE


class EventStream(StreamingResponse):
    """A stream that always runs `close`, however it ends.

    Starlette leaves the generator suspended when the client goes away while a part is being sent, and
    a generator that was never started runs no `finally`: neither may keep the request in the engine.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], Awaitable[None]]) -> None:
        super().__init__(events, headers=_HEADERS)
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            try:
                await self._close()
            finally:
                await self._events.aclose()
