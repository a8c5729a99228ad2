"""D4: the node's RAM pool and who has which range of it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from raytier.errors import ResourceNotAvailableError, TierError
from raytier.tiers.arena import Arena, ArenaHandle, RangeAllocator

PEER = """
import pickle, sys
from raytier.tiers.arena import Arena
arena = Arena.attach(pickle.loads(bytes.fromhex(sys.argv[1])))
print(bytes(arena.view[:5]).decode())
arena.view[5:10] = b"world"
"""


def test_a_peer_process_shares_the_bytes() -> None:
    with Arena.create("raytier-test", 5000) as arena:
        assert arena.nbytes == len(arena.view) == 8192
        arena.view[:5] = b"hello"
        command = [sys.executable, "-c", PEER, pickle.dumps(arena.handle).hex()]
        peer = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert peer.stdout == "hello\n", peer.stderr
        assert bytes(arena.view[:10]) == b"helloworld"


def test_views_outlive_close_and_attached_memory_outlives_its_owner() -> None:
    owner = Arena.create("raytier-test", 4096)
    peer = Arena.attach(owner.handle)
    view = owner.view
    owner.close()
    owner.close()
    view[0] = 9
    assert peer.view[0] == 9
    peer.close()
    with pytest.raises(ValueError, match="closed"):
        _ = peer.view


def test_attach_to_a_dead_owner() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(TierError, match="is its owner still running"):
        Arena.attach(ArenaHandle(process.pid, 3, 4096, 1))


def test_attach_to_a_descriptor_that_was_reused() -> None:
    arena = Arena.create("raytier-test", 4096)
    handle = arena.handle
    arena.close()
    with Arena.create("raytier-other", 4096) as other:
        assert other.handle.fd == handle.fd
        with pytest.raises(TierError, match="another file now"):
            Arena.attach(handle)


def test_no_process_can_resize_it() -> None:
    with Arena.create("raytier-test", 4096) as arena:
        for size in (0, 8192):
            with pytest.raises(PermissionError):
                os.ftruncate(arena.handle.fd, size)


def test_released_pages_go_back_to_the_system_for_all_who_map_them() -> None:
    with Arena.create("raytier-test", 64 << 20) as arena, Arena.attach(arena.handle) as peer:
        assert arena.touched_bytes == 0, "a budget that nobody fills costs nothing"
        arena.view[:] = b"x" * len(arena.view)
        assert arena.touched_bytes == 64 << 20
        before = _resident_shared()
        arena.release(16 << 20, 32 << 20)
        assert arena.touched_bytes == peer.touched_bytes == 32 << 20
        assert before - _resident_shared() >= 31 << 20
        assert bytes(peer.view[(16 << 20) - 1 : (16 << 20) + 1]) == b"x\0"
        assert bytes(peer.view[(48 << 20) - 1 : (48 << 20) + 1]) == b"\0x"
        arena.view[16 << 20] = 7  # the range can be filled again
        assert peer.view[16 << 20] == 7
        assert arena.touched_bytes == (32 << 20) + 2 * 4096, "reading one takes a page as well"


def _resident_shared() -> int:
    """Bytes of shared memory that this process has in its page tables."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssShmem:")[2].split()[0]) * 1024


@pytest.mark.parametrize(("offset", "nbytes"), [(1, 4096), (0, 1), (-4096, 4096), (4096, 8192), (0, -4096)])
def test_release_of_what_is_no_range_is_refused(offset: int, nbytes: int) -> None:
    with Arena.create("raytier-test", 8192) as arena, pytest.raises(ValueError, match="cannot release"):
        arena.release(offset, nbytes)


def test_descriptors_are_closed() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Arena.create("raytier-test", 4096) as arena, Arena.attach(arena.handle):
        pass
    del arena
    assert len(os.listdir("/proc/self/fd")) == before


def test_refuses_nothing_and_too_much() -> None:
    with pytest.raises(ValueError, match="positive"):
        Arena.create("raytier-test", 0)
    with pytest.raises(TierError, match=r"tiers\.host\.max_mb"):
        Arena.create("raytier-test", 1 << 62)


def test_first_fit_reuses_and_joins_what_was_freed() -> None:
    ranges = RangeAllocator(4 * 4096)
    assert [ranges.allocate(name, 1) for name in "abcd"] == [0, 4096, 8192, 12288]
    ranges.free("b")
    ranges.free("c")
    assert ranges.allocate("e", 5000) == 4096
    assert ranges.range_of("e") == (4096, 8192)
    ranges.check_integrity()


def test_refusal_says_how_much_is_free() -> None:
    ranges = RangeAllocator(3 * 4096)
    for name in "abc":
        ranges.allocate(name, 4096)
    ranges.free("a")
    ranges.free("c")
    with pytest.raises(ResourceNotAvailableError, match=r"8192 bytes of d: 8192 of 12288 bytes are free.* 4096"):
        ranges.allocate("d", 8192)
    ranges.check_integrity()
    with pytest.raises(ValueError, match="already owns"):
        ranges.allocate("b", 1)
    with pytest.raises(ValueError, match="cannot allocate"):
        ranges.allocate("d", 0)
    with pytest.raises(KeyError):
        ranges.free("d")


class RangeMachine(RuleBasedStateMachine):
    """Against a model that is one owner per unit of space."""

    UNITS = 24

    def __init__(self) -> None:
        super().__init__()
        self.ranges = RangeAllocator(self.UNITS * 16 + 5, alignment=16)
        self.space: list[str | None] = [None] * self.UNITS
        self.count = 0

    def largest(self) -> int:
        return max(len(gap) for gap in "".join("x" if owner else "." for owner in self.space).split("x"))

    @rule(nbytes=st.integers(1, 160))
    def allocate(self, nbytes: int) -> None:
        self.count += 1
        owner, units = f"owner {self.count}", -(-nbytes // 16)
        if units > self.largest():
            with pytest.raises(ResourceNotAvailableError):
                self.ranges.allocate(owner, nbytes)
            return
        offset = self.ranges.allocate(owner, nbytes)
        assert offset % 16 == 0
        first = offset // 16
        assert not any(self.space[first : first + units])
        self.space[first : first + units] = [owner] * units

    @precondition(lambda self: any(self.space))
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted({owner for owner in self.space if owner})))
        self.ranges.free(owner)
        self.space = [None if each == owner else each for each in self.space]

    @invariant()
    def agrees(self) -> None:
        self.ranges.check_integrity()
        assert self.ranges.free_bytes == self.space.count(None) * 16
        assert self.ranges.largest_free == self.largest() * 16


RangeMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_range_allocator_matches_its_model = RangeMachine.TestCase
