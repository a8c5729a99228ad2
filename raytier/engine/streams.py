"""Deltas from the engine's thread to asyncio readers: one wake-up per step and event loop."""

from __future__ import annotations

import asyncio

from raytier.engine.outputs import OutputDelta, merge


class StreamReader:
    """One request's deltas on the event loop's side; what came while the reader was busy is merged."""

    def __init__(self) -> None:
        self._ready: list[OutputDelta] = []
        self._arrived = asyncio.Event()

    def put(self, delta: OutputDelta) -> None:
        self._ready.append(delta)
        self._arrived.set()

    async def get(self) -> OutputDelta:
        """Wait for a delta; all that are there by then, as one."""
        await self._arrived.wait()
        self._arrived.clear()
        deltas, self._ready = self._ready, []
        return merge(deltas)


class LoopMailbox:
    """Collects the deltas of a step for all readers of one event loop and wakes the loop once.

    `post` and `flush` are called by the engine's thread only. `readers` counts the streams that use the
    mailbox, under the engine's lock.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.readers = 0
        self._loop = loop
        self._posted: list[tuple[StreamReader, OutputDelta]] = []

    def post(self, reader: StreamReader, delta: OutputDelta) -> None:
        self._posted.append((reader, delta))

    def flush(self) -> set[str]:
        """Hand over what was posted. Returns the requests nobody reads any more, because the loop is closed."""
        posted, self._posted = self._posted, []
        try:
            if posted:
                self._loop.call_soon_threadsafe(_dispatch, posted)
        except RuntimeError:
            return {delta.request_id for _, delta in posted}
        return set()


def _dispatch(posted: list[tuple[StreamReader, OutputDelta]]) -> None:
    for reader, delta in posted:
        reader.put(delta)
