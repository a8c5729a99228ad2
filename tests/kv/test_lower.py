"""F4, F5: what is below the device, as a state machine: a block that is found has the bytes that it was given up with.

The machine plays the executor: it keeps bytes per device block, host slot and disk slot, carries orders out late or
never, and lets writes and loads fail.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from raytier.kv.costs import KVCosts, LinearCost
from raytier.kv.lower import LowerTiers
from raytier.kv.orders import BlockMove, DiskWrite, KVOrders, KVReport, LowerShape
from raytier.kv.slots import SlotIndex

HOST, DISK, GROUPS = 4, 6, 2
DIGESTS = st.integers(0, 15).map(lambda n: bytes([n]))
GROUP = st.integers(0, GROUPS - 1)


class LowerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tiers = LowerTiers(LowerShape((64 << 20, 64 << 20), HOST, DISK))
        self.device: dict[tuple[int, int], bytes] = {}  # (group, block) -> what the executor would read there
        self.host: dict[tuple[int, int], bytes] = {}
        self.disk: dict[tuple[int, int], bytes] = {}
        self.writing: list[DiskWrite] = []
        self.expected: dict[tuple[int, int], bytes] = {}  # what loads that were ordered must bring
        self.block = 0

    @rule(group=GROUP, digest=DIGESTS, seen=st.booleans())
    def give_up(self, group: int, digest: bytes, seen: bool) -> None:
        self.block += 1
        self.device[group, self.block] = digest
        if seen:
            self.tiers.note_seen(digest)
        self.tiers.evicted(group, self.block, digest)

    @rule(group=GROUP, digest=DIGESTS)
    def load(self, group: int, digest: bytes) -> None:
        if self.tiers.find(group, digest) is None:
            return
        self.block += 1
        self.tiers.load(group, digest, self.tiers.pin(group, digest), self.block)
        self.expected[group, self.block] = digest

    @rule(digest=DIGESTS)
    def see(self, digest: bytes) -> None:
        self.tiers.note_seen(digest)

    @rule(data=st.data(), settle=st.booleans())
    def step(self, data: st.DataObject, settle: bool) -> None:
        orders = self.tiers.take_orders(settle=settle) or KVOrders()
        for move in orders.stores:
            self.host[move.group, move.slot] = self.device[move.group, move.block]
        lost: list[BlockMove] = []
        for move in orders.loads:
            assert self.host[move.group, move.slot] == self.expected.pop((move.group, move.block))
        for move in orders.disk_loads:
            assert self.disk[move.group, move.slot] == self.expected.pop((move.group, move.block))
            if data.draw(st.integers(0, 4)) == 0:
                lost.append(move)
        assert not self.expected
        self.writing += orders.writes
        count = len(self.writing) if orders.settle else data.draw(st.integers(0, len(self.writing)))
        written, failed = [], []
        for write in self.writing[:count]:
            # The host slot has stayed as it was, however long it took.
            assert self.host[write.group, write.source] == write.digest
            self.disk[write.group, write.target] = write.digest
            (failed if data.draw(st.integers(0, 4)) == 0 else written).append(write)
        self.writing = self.writing[count:]
        self.tiers.apply(KVReport(tuple(written), tuple(failed), None, tuple(lost)))

    @precondition(lambda self: not self.expected)
    @rule()
    def clear(self) -> None:
        self.tiers.clear()

    @invariant()
    def books_are_right(self) -> None:
        self.tiers.check_integrity()


TestLowerMachine = LowerMachine.TestCase
TestLowerMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def step(tiers: LowerTiers, *, fail: bool = False) -> KVOrders:
    """Carry everything out; writes fail or not."""
    orders = tiers.take_orders() or KVOrders()
    tiers.apply(KVReport(failed=orders.writes) if fail else KVReport(written=orders.writes))
    return orders


def test_one_off_blocks_do_not_wear_the_disk() -> None:
    tiers = LowerTiers(LowerShape((4096,), 8, 8))
    tiers.note_seen(b"once")
    tiers.evicted(0, 1, b"once")
    assert not step(tiers).writes and not tiers.has_writes
    tiers.note_seen(b"once")
    assert [write.digest for write in step(tiers).writes] == [b"once"]
    eager = LowerTiers(LowerShape((4096,), 8, 8), disk_once=True)
    eager.note_seen(b"once")
    eager.evicted(0, 1, b"once")
    assert [write.digest for write in step(eager).writes] == [b"once"]


def test_what_is_there_is_not_stored_again() -> None:
    tiers = LowerTiers(LowerShape((4096,), 8, 0))
    tiers.evicted(0, 1, b"a")
    assert step(tiers).stores == (BlockMove(0, 1, 0),)
    tiers.load(0, b"a", tiers.pin(0, b"a"), 2)
    assert step(tiers).loads == (BlockMove(0, 2, 0),)
    tiers.evicted(0, 2, b"a")
    assert not step(tiers).stores


def test_a_disk_that_fails_is_left_alone_for_a_while() -> None:
    tiers = LowerTiers(LowerShape((4096,), 64, 64), disk_once=True)
    attempts = 0
    for number in range(52):
        digest = number.to_bytes(4, "little")
        tiers.note_seen(digest)
        tiers.evicted(0, number, digest)
        attempts += bool(step(tiers, fail=True).writes)
    assert attempts == 3, "at once, after 16 steps, and after 32 more"
    assert tiers.counts.write_failures >= 3 and not any(len(index) for index in tiers.disk)


def test_all_slots_pinned() -> None:
    index = SlotIndex(2)
    for digest in (b"a", b"b"):
        assert index.put(digest) is not None
        index.pin(digest)
    assert index.put(b"c") is None
    index.unpin(b"b")
    assert index.put(b"c") == (1, b"b"), "the only one that may go, although the other is older"
    index.check_integrity()


def test_costs_follow_what_is_measured() -> None:
    cost = LinearCost(0.01, 1e-3, 1000)
    assert cost.of(100) == pytest.approx(0.11)
    for x in (10, 50, 400, 1000) * 20:
        cost.measured(x, 0.02 + 1e-4 * x)
    assert cost.of(700) == pytest.approx(0.09, rel=0.05)
    for _ in range(100):
        cost.forget()
    assert cost.of(100) == pytest.approx(0.11, rel=0.1), "what was measured is forgotten where it is not used"
    same = LinearCost(0.01, 1e-3, 1000)
    for _ in range(60):
        same.measured(100, 0.055)
    assert same.of(100) == pytest.approx(0.055, rel=0.05) and same.fixed >= 0 and same.each >= 0


def test_the_better_of_load_and_compute() -> None:
    costs = KVCosts(0.01, 1e-4, 128, 1e9, 1e8)
    assert costs.compute(1000, 0) == pytest.approx(8 * 0.01 + 1000 * 1e-4)
    assert costs.compute(1000, 900) == pytest.approx(0.01 + 100 * 1e-4)
    assert costs.load(10**6, 0) < costs.load(0, 10**6)
    assert costs.load(0, 0) == 0
