"""Which segment of the ring of streamed bytes is in use: circular, first in first out."""

from __future__ import annotations

from collections import deque

from raytier.tiers.aligned import ALIGNMENT, align_down, align_up


class RingAllocator:
    """Contiguous segments of [0, capacity), released in the order in which they were allocated.

    Invariant: seen from the oldest segment around the ring, segments follow each other without overlap up to
    `_head`; a segment never wraps. A tail too short for the next segment stays unused for that round.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < ALIGNMENT:
            raise ValueError(f"a ring of {capacity} bytes: give at least {ALIGNMENT}")
        self.capacity = align_down(capacity)
        self._segments: deque[tuple[int, int]] = deque()  # (offset, bytes), oldest first
        self._head = 0  # where the next segment starts if it fits there

    def __len__(self) -> int:
        return len(self._segments)

    def allocate(self, nbytes: int) -> int | None:
        """Offset of a new segment of `nbytes` rounded up to `ALIGNMENT`; None while there is no room.

        Raises:
            ValueError: the segment would not fit into an empty ring either.
        """
        size = align_up(nbytes)
        if not 0 < size <= self.capacity:
            raise ValueError(f"a segment of {size} bytes cannot be in a ring of {self.capacity}")
        if not self._segments:
            self._head = 0
        oldest = self._segments[0][0] if self._segments else self.capacity
        if self._segments and oldest < self._head and self._head + size > self.capacity:
            offset, limit = 0, oldest  # skip the tail, go around
        else:
            offset, limit = self._head, self.capacity if oldest < self._head else oldest
        if offset + size > limit:
            return None
        self._segments.append((offset, size))
        self._head = offset + size
        return offset

    def release(self, offset: int) -> None:
        """Free the oldest segment, which must start at `offset`."""
        if not self._segments or self._segments[0][0] != offset:
            oldest = self._segments[0][0] if self._segments else "none"
            raise ValueError(f"the segment at {offset} is not the oldest of the ring ({oldest})")
        self._segments.popleft()

    def clear(self) -> None:
        """Free everything."""
        self._segments.clear()

    def check_integrity(self) -> None:
        """AssertionError unless the invariant holds."""
        assert sum(size for _, size in self._segments) <= self.capacity
        wraps, position = 0, self._segments[0][0] if self._segments else 0
        for offset, size in self._segments:
            assert size > 0
            assert size % ALIGNMENT == 0
            assert offset % ALIGNMENT == 0
            assert offset + size <= self.capacity
            if offset != position:
                assert offset == 0, "a segment starts neither behind its predecessor nor at 0"
                wraps += 1
            position = offset + size
            assert wraps == 0 or position <= self._segments[0][0], "the newest segment overlaps the oldest"
        assert wraps <= 1
        assert not self._segments or self._head == position
