"""Deltas from the engine's thread to asyncio readers: one wake-up per step and event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

from raytier.engine.outputs import OutputDelta, merge


class StreamReader:
    """One request's deltas on the event loop's side; what came while the reader was busy is merged, per sample."""

    def __init__(self) -> None:
        self._ready: dict[int, list[OutputDelta]] = {}
        self._arrived = asyncio.Event()

    def put(self, delta: OutputDelta) -> None:
        self._ready.setdefault(delta.index, []).append(delta)
        self._arrived.set()

    async def get(self) -> list[OutputDelta]:
        """Wait for a delta; all that are there by then, as one per sample, the `done` one last."""
        await self._arrived.wait()
        self._arrived.clear()
        ready, self._ready = self._ready, {}
        return sorted((merge(deltas) for deltas in ready.values()), key=lambda delta: delta.done)


class LoopMailbox:
    """Collects the deltas of a step for all readers of one event loop and wakes the loop once.

    `post` and `flush` are called by the engine's thread only. `readers` counts the streams that use it.
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


class Mailboxes:
    """One mailbox per event loop that reads from an engine; any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._boxes: dict[asyncio.AbstractEventLoop, LoopMailbox] = {}

    def __len__(self) -> int:
        return len(self._boxes)

    @contextmanager
    def reading(self) -> Iterator[LoopMailbox]:
        """The mailbox of the running event loop, for as long as one stream uses it."""
        loop = asyncio.get_running_loop()
        with self._lock:
            mailbox = self._boxes.setdefault(loop, LoopMailbox(loop))
            mailbox.readers += 1
        try:
            yield mailbox
        finally:
            with self._lock:
                mailbox.readers -= 1
                if not mailbox.readers:
                    self._boxes.pop(loop, None)

    def flush(self) -> set[str]:
        """Wake every loop that got something. Returns the requests whose loops are closed."""
        with self._lock:
            boxes = list(self._boxes.items())
        orphans: set[str] = set()
        for loop, mailbox in boxes:
            if lost := mailbox.flush():
                orphans |= lost
                with self._lock:
                    self._boxes.pop(loop, None)
        return orphans


def _dispatch(posted: list[tuple[StreamReader, OutputDelta]]) -> None:
    for reader, delta in posted:
        reader.put(delta)


def put_at(arrived: SimpleQueue[tuple[int, OutputDelta]], position: int, delta: OutputDelta) -> None:
    """The sink of one of several requests."""
    arrived.put((position, delta))
