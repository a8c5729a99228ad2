"""F8: leases, reports, and what a dead engine held."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from raytier.errors import EngineDeadError, ResourceNotAvailableError
from raytier.kv.ledger import Extent, GroupShape, LeaseLedger, LedgerDelta, SequenceDelta


def delta(seq_id: int, allocated: tuple[int, ...] = (), freed: tuple[int, ...] = ()) -> LedgerDelta:
    return LedgerDelta((SequenceDelta(seq_id, allocated, freed),), allocations=len(allocated))


def test_leases_are_extents_without_the_null_block() -> None:
    ledger = LeaseLedger([GroupShape(101, 2048)], 16)
    assert ledger.lease("a", 0, 40) == (Extent(1, 40),)
    assert ledger.lease("a", 0, 10) == (Extent(41, 10),), "behind what it has"
    [other] = ledger.lease("b", 0, 20)
    assert other.start > 50
    with pytest.raises(ResourceNotAvailableError, match=r"b wants 31 KV blocks \(63488 bytes\): 30 of 100"):
        ledger.lease("b", 0, 31)
    stats = ledger.stats()
    assert (stats.total_blocks, stats.leased_blocks, stats.used_blocks, stats.failures) == (100, 70, 0, 1)
    assert stats.total_bytes == 100 * 2048
    ledger.check_integrity()


def test_reports_are_applied_once() -> None:
    ledger = LeaseLedger([GroupShape(11, 100)], 16)
    ledger.lease("a", 3, 5)
    assert ledger.report("a", 3, 1, delta(7, (1, 2)))
    assert not ledger.report("a", 3, 1, delta(7, (1, 2)))
    assert ledger.report("a", 3, 2, LedgerDelta((SequenceDelta(8, (1, 3), ()), SequenceDelta(7, (), (1,))), 2, 4))
    assert not ledger.report("a", 3, 0, delta(7, (), (2,))), "late reports as well"
    assert ledger.holdings("a") == {7: (2,), 8: (1, 3)}
    stats = ledger.stats()
    assert (stats.used_blocks, stats.free_blocks, stats.active_sequences) == (3, 7, 2)
    assert (stats.allocations, stats.failures, stats.used_bytes) == (4, 4, 300)
    assert stats.engines["a"].last_step == 2
    assert stats.engines["a"].epoch == 3


def test_contradictions_are_refused_and_change_nothing() -> None:
    ledger = LeaseLedger([GroupShape(21, 100)], 16)
    ledger.lease("a", 0, 5)
    ledger.lease("b", 0, 5)
    ledger.report("a", 0, 1, delta(1, (1, 2)))
    for wrong, message in (
        (delta(2, (), (2,)), "does not hold"),
        (delta(1, (), (1, 1)), "names a block twice"),
        (delta(1, (3, 3)), "names a block twice"),
        (delta(1, (2,)), "which it holds already"),
        (delta(1, (13,)), "outside the lease"),
        (LedgerDelta((SequenceDelta(1, (3,)), SequenceDelta(2, (), (4,)))), "does not hold"),
    ):
        with pytest.raises(ValueError, match=message):
            ledger.report("a", 0, 2, wrong)
    assert ledger.holdings("a") == {1: (1, 2)}
    assert ledger.report("a", 0, 2, delta(1, (), (1, 2)))
    assert ledger.holdings("a") == {}
    assert ledger.holdings("unknown") == {}
    ledger.check_integrity()


def test_a_shared_block_is_counted_once_and_held_until_all_have_dropped_it() -> None:
    ledger = LeaseLedger([GroupShape(21, 100), GroupShape(11, 7)], 16)
    ledger.lease("a", 0, 10)
    ledger.lease("a", 0, 5, group=1)
    both = (SequenceDelta(1, (1, 2)), SequenceDelta(2, (2, 3)), SequenceDelta(1, (4,), (), 1))
    ledger.report("a", 0, 1, LedgerDelta(both, 4, queries=60, hits=20, copies=1, cached=(3, 2), evictions=5))
    stats = ledger.stats()
    assert (stats.total_blocks, stats.leased_blocks, stats.used_blocks, stats.active_sequences) == (30, 15, 4, 2)
    assert (stats.used_bytes, stats.cached_blocks, stats.cached_bytes) == (307, 5, 314)
    assert (stats.queries, stats.hits, stats.copies, stats.evictions) == (60, 20, 1, 5)
    assert stats.hit_rate == 20 / 60 and stats.engines["a"].group_blocks == (3, 1)
    assert ledger.holdings("a", 1) == {1: (4,)}
    ledger.report("a", 0, 2, LedgerDelta((SequenceDelta(1, (), (1, 2)), SequenceDelta(1, (), (4,), 1))))
    assert ledger.stats().used_blocks == 2 and ledger.stats().cached_blocks == 5
    ledger.check_integrity()
    assert ledger.release("a") == 15


def test_caps() -> None:
    ledger = LeaseLedger([GroupShape(101, 100)], 16)
    ledger.set_cap("a", 30)
    ledger.lease("a", 0, 20)
    with pytest.raises(ResourceNotAvailableError, match="wants 11 KV blocks beside its 20: it may have 30"):
        ledger.lease("a", 0, 11)
    ledger.lease("b", 0, 60)
    assert ledger.stats().engines["a"].max_blocks == 30
    ledger.set_cap("a", None)
    ledger.lease("a", 0, 20)
    assert ledger.stats().failures == 1


def test_only_the_running_epoch_counts() -> None:
    ledger = LeaseLedger([GroupShape(11, 100)], 16)
    ledger.lease("a", 1, 10)
    ledger.report("a", 1, 5, delta(1, (1, 2)))
    assert ledger.lease("a", 2, 10) == (Extent(1, 10),), "the old life's blocks came back"
    assert ledger.stats().used_blocks == 0
    with pytest.raises(EngineDeadError, match="epoch 1 ended, 2 is running"):
        ledger.lease("a", 1, 1)
    with pytest.raises(EngineDeadError, match="report of epoch 1, but 2 is running"):
        ledger.report("a", 1, 6, delta(1, (3,)))
    assert ledger.report("a", 2, 1, delta(1, (3,)))
    assert ledger.release("a") == 10
    assert ledger.release("a") == 0
    with pytest.raises(EngineDeadError, match="holds no lease"):
        ledger.report("a", 2, 2, LedgerDelta())
    assert ledger.stats().engines == {}
    assert ledger.stats().leased_blocks == 0


def test_misuse() -> None:
    with pytest.raises(ValueError, match="num_blocks"):
        LeaseLedger([GroupShape(1, 1)], 16)
    with pytest.raises(ValueError, match="at least 1 block"):
        LeaseLedger([GroupShape(10, 1)], 16).lease("a", 0, 0)


class LedgerMachine(RuleBasedStateMachine):
    """Engines that lease, allocate inside their leases, report (also twice), restart and die."""

    names = st.sampled_from(["a", "b", "c"])

    def __init__(self) -> None:
        super().__init__()
        self.ledger = LeaseLedger([GroupShape(41, 10)], 4)
        self.epochs: dict[str, int] = {}
        self.leases: dict[str, set[int]] = {}
        self.held: dict[str, dict[int, set[int]]] = {}
        self.step = 0
        self.last: tuple[str, int, int, LedgerDelta] | None = None

    @rule(name=names, count=st.integers(1, 20), restart=st.booleans())
    def lease(self, name: str, count: int, restart: bool) -> None:
        epoch = self.epochs.get(name, 0) + restart
        if restart:
            self.leases.pop(name, None)
            self.held.pop(name, None)
        taken = sum(map(len, self.leases.values()))
        if count > 40 - taken:
            with pytest.raises(ResourceNotAvailableError):
                self.ledger.lease(name, epoch, count)
            # The engine's new life is known only once it holds a lease.
            if name not in self.leases:
                self.epochs.pop(name, None)
            return
        blocks = {b for e in self.ledger.lease(name, epoch, count) for b in range(e.start, e.start + e.count)}
        assert len(blocks) == count
        assert blocks.isdisjoint(b for lease in self.leases.values() for b in lease)
        assert 0 not in blocks
        self.epochs[name] = epoch
        self.leases.setdefault(name, set()).update(blocks)
        self.held.setdefault(name, {})

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def report(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.leases)))
        held = self.held[name]
        changes = []
        for seq_id in data.draw(st.sets(st.integers(0, 4), max_size=3)):
            has = held.get(seq_id, set())
            lost = data.draw(st.sets(st.sampled_from(sorted(has)))) if has else set()
            others = self.leases[name] - has  # of other sequences as well
            gained = data.draw(st.sets(st.sampled_from(sorted(others)), max_size=4)) if others else set()
            held[seq_id] = (has - lost) | gained
            if not held[seq_id]:
                del held[seq_id]
            changes.append(SequenceDelta(seq_id, tuple(gained), tuple(lost)))
        self.step += 1
        self.last = (name, self.epochs[name], self.step, LedgerDelta(tuple(changes)))
        assert self.ledger.report(*self.last)

    @precondition(lambda self: self.last is not None)
    @rule()
    def report_again(self) -> None:
        assert self.last is not None
        name, epoch = self.last[:2]
        if name in self.leases and epoch == self.epochs[name]:
            assert not self.ledger.report(*self.last)
        else:
            with pytest.raises(EngineDeadError):
                self.ledger.report(*self.last)

    @rule(name=names)
    def release(self, name: str) -> None:
        assert self.ledger.release(name) == len(self.leases.pop(name, set()))
        self.held.pop(name, None)
        if name in self.epochs:
            self.epochs[name] += 1

    @invariant()
    def agrees(self) -> None:
        stats = self.ledger.stats()
        assert stats.leased_blocks == sum(map(len, self.leases.values()))
        assert stats.used_blocks == sum(len(set().union(*h.values())) for h in self.held.values())
        assert stats.used_blocks + stats.free_blocks == 40
        for name, held in self.held.items():
            assert self.ledger.holdings(name) == {s: tuple(sorted(blocks)) for s, blocks in held.items()}
        self.ledger.check_integrity()


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
