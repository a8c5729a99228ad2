"""D1: the ring of streamed bytes."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from raytier.execution.ring import RingAllocator

PAGE = 4096


def test_segments_follow_each_other_and_go_around() -> None:
    ring = RingAllocator(10 * PAGE)
    assert ring.allocate(4 * PAGE) == 0
    assert ring.allocate(3 * PAGE + 1) == 4 * PAGE
    assert ring.allocate(3 * PAGE) is None  # two pages at the end, none at the start
    ring.release(0)
    assert ring.allocate(3 * PAGE) == 0  # the tail is skipped
    assert ring.allocate(PAGE + 1) is None
    assert ring.allocate(PAGE) == 3 * PAGE
    assert ring.allocate(1) is None  # exactly full
    ring.check_integrity()
    ring.release(4 * PAGE)
    assert ring.allocate(6 * PAGE) == 4 * PAGE
    assert len(ring) == 3


def test_an_empty_ring_takes_a_segment_of_its_size_wherever_it_stood() -> None:
    ring = RingAllocator(10 * PAGE)
    assert ring.allocate(7 * PAGE) == 0
    ring.release(0)
    assert ring.allocate(10 * PAGE) == 0
    ring.clear()
    assert ring.allocate(10 * PAGE) == 0


def test_misuse() -> None:
    ring = RingAllocator(2 * PAGE + 5)
    assert ring.capacity == 2 * PAGE
    for size in (0, 2 * PAGE + 1):
        with pytest.raises(ValueError, match="cannot be in a ring"):
            ring.allocate(size)
    with pytest.raises(ValueError, match="none"):
        ring.release(0)
    ring.allocate(1)
    ring.allocate(1)
    with pytest.raises(ValueError, match="not the oldest"):
        ring.release(PAGE)
    with pytest.raises(ValueError, match="at least"):
        RingAllocator(100)


class RingMachine(RuleBasedStateMachine):
    """Segments never overlap, and are refused only when neither the gap behind the newest nor the start has room."""

    PAGES = 16

    def __init__(self) -> None:
        super().__init__()
        self.ring = RingAllocator(self.PAGES * PAGE)
        self.live: deque[tuple[int, int]] = deque()  # (first page, pages)

    @rule(pages=st.integers(1, 16))
    def allocate(self, pages: int) -> None:
        used = {page for first, count in self.live for page in range(first, first + count)}
        offset = self.ring.allocate(pages * PAGE - 7)
        behind = sum(self.live[-1]) if self.live else 0
        candidates = [start for start in (behind, 0) if start + pages <= self.PAGES]
        fitting = [start for start in candidates if used.isdisjoint(range(start, start + pages))]
        if self.live and self.live[-1][0] < self.live[0][0]:  # already gone around: only behind the newest
            fitting = [start for start in fitting if start == behind]
        assert offset == (fitting[0] * PAGE if fitting else None)
        if fitting:
            self.live.append((fitting[0], pages))

    @precondition(lambda self: self.live)
    @rule()
    def release(self) -> None:
        self.ring.release(self.live.popleft()[0] * PAGE)

    @rule()
    def drain_always_makes_room(self) -> None:
        while self.live:
            self.release()
        assert self.ring.allocate(self.PAGES * PAGE) == 0
        self.ring.release(0)

    @invariant()
    def consistent(self) -> None:
        self.ring.check_integrity()
        assert len(self.ring) == len(self.live)


RingMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
test_ring_matches_its_model = RingMachine.TestCase
