"""The weight stream: units arrive in the ring ahead of their use, sweep after sweep."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from raytier.errors import ResourceNotAvailableError
from raytier.execution.layout import StreamUnit, assemble
from raytier.execution.reader import ReaderPool
from raytier.execution.ring import RingAllocator
from raytier.execution.ticket import ReadTicket
from raytier.tiers.aligned import AlignedBuffer


@dataclass(slots=True)
class StreamStats:
    """Totals of a stream, or of several that followed each other.

    Attributes:
        units: units acquired, experts that were fetched among them.
        bytes_consumed: parameter bytes of those units.
        bytes_read: bytes read from disk for them and for cancelled prefetches, alignment included.
        io_wait_s: seconds that was waited for them.
        bytes_found: parameter bytes of experts that were chosen and still there.
    """

    units: int = 0
    bytes_consumed: int = 0
    bytes_read: int = 0
    io_wait_s: float = 0.0
    bytes_found: int = 0


@dataclass(frozen=True, slots=True)
class _Segment:
    index: int
    offset: int
    view: memoryview
    ticket: ReadTicket


class WeightStream:
    """Units in sweep order, wrapping from the last to the first, each read anew in every sweep.

    Prefetches are issued in `acquire` and `release`, by the one thread that consumes, and executed by `pool`;
    the ring is the only bound in bytes, so an idle consumer finds it full. Not thread-safe.

    Invariants: `_held` then `_ahead` are consecutive units modulo the sweep and the ring's segments in order;
    no unit is in the ring twice.

    Args:
        units: of one sweep, not empty.
        ring_buffer: at least as large as the largest unit; the caller owns it, and keeps it open until `close`.
        window: how far to read ahead of what is held, in sizes of the largest unit (so that many small units
            count as few large ones); 0 reads only on `acquire`.
        stats: totals to go on counting in; None begins new ones.
    """

    def __init__(
        self,
        units: Sequence[StreamUnit],
        pool: ReaderPool,
        ring_buffer: AlignedBuffer,
        window: int,
        stats: StreamStats | None = None,
    ) -> None:
        if not units or window < 0:
            raise ValueError(f"{len(units)} units, window {window}: give at least one unit and no negative window")
        largest = max(units, key=lambda unit: unit.nbytes)
        if largest.nbytes > ring_buffer.nbytes:
            raise ResourceNotAvailableError(
                f"{largest.name} needs {largest.nbytes} bytes, the ring has {ring_buffer.nbytes}: plan a larger ring"
            )
        self.units = tuple(units)
        self.stats = StreamStats() if stats is None else stats
        self._pool = pool
        self._buffer = ring_buffer
        self._ring = RingAllocator(ring_buffer.nbytes)
        self._window_bytes = window * largest.nbytes
        self._held: deque[_Segment] = deque()  # acquired, oldest first
        self._ahead: deque[_Segment] = deque()  # prefetched or being so
        self._next = 0  # the unit that `acquire` expects

    def start(self) -> None:
        """Begin to prefetch from the next unit on."""
        self._prefetch()

    def acquire(self, index: int) -> memoryview:
        """The bytes of unit `index`, once they are all there; they stay until its `release`.

        Several units may be held at once as far as the ring has room.

        Raises:
            TierError: a read failed; `cancel` makes the stream usable again.
            RuntimeError: `index` is not the next unit of the sweep, or what is held leaves no room for it.
        """
        if index != self._next:
            raise RuntimeError(f"unit {index} acquired, but the next one of the sweep is {self._next}")
        if not self._ahead and not self._issue():
            raise RuntimeError(f"no room for {self.units[index].name}: {len(self._held)} units are held, release one")
        segment, unit = self._ahead[0], self.units[index]
        began = time.perf_counter()
        segment.ticket.wait()
        assemble(unit, segment.view)
        self.stats.io_wait_s += time.perf_counter() - began
        self.stats.units += 1
        self.stats.bytes_consumed += unit.wanted_bytes
        self.stats.bytes_read += segment.ticket.bytes_read
        self._held.append(self._ahead.popleft())
        self._next = (index + 1) % len(self.units)
        self._prefetch()
        return segment.view

    def release(self, index: int) -> None:
        """Give back unit `index`, the oldest that is held; nothing may use its memory from now on."""
        if not self._held or self._held[0].index != index:
            held = [segment.index for segment in self._held]
            raise RuntimeError(f"unit {index} released, but held are {held}, oldest first")
        self._ring.release(self._held.popleft().offset)
        self._prefetch()

    def cancel(self) -> None:
        """Drop everything, held units too, and return when no read writes to the ring; then the sweep starts anew."""
        for segment in reversed(self._ahead):  # newest first: what waits behind the running reads must not begin now
            segment.ticket.cancel()
            self.stats.bytes_read += segment.ticket.bytes_read
        self._held.clear()
        self._ahead.clear()
        self._ring.clear()
        self._next = 0

    def close(self) -> None:
        """As `cancel`; the ring's memory is the caller's again."""
        self.cancel()

    def _prefetch(self) -> None:
        ahead = sum(self.units[segment.index].nbytes for segment in self._ahead)
        while len(self._held) + len(self._ahead) < len(self.units):
            unit = self.units[self._upcoming]
            ahead += unit.nbytes
            if ahead > self._window_bytes or not self._issue():
                return

    @property
    def _upcoming(self) -> int:
        return (self._next + len(self._ahead)) % len(self.units)

    def _issue(self) -> bool:
        """Start to read the upcoming unit; False when the ring has no room for it yet."""
        index = self._upcoming
        unit = self.units[index]
        offset = self._ring.allocate(unit.nbytes)
        if offset is None:
            return False
        view = self._buffer.view[offset : offset + unit.nbytes]
        self._ahead.append(_Segment(index, offset, view, self._pool.submit(unit.reads, view)))
        return True

    def __enter__(self) -> WeightStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
