"""F1, F2, F3, F6: sequences that share blocks, find them again and give up what their windows have passed."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from raytier.config import KVCache as KVConfig
from raytier.kv.block_pool import NULL_BLOCK, BlockPool
from raytier.kv.cache import KVCache
from raytier.kv.ledger import GroupShape, LeaseLedger
from raytier.kv.tables import BlockCopy, SequenceKV
from raytier.kv.usage import Pressure

SIZE = 4


def cache_of(blocks: int, *windows: int | None, **policy: object) -> KVCache:
    pools = []
    for _ in windows or (None,):
        pool = BlockPool(SIZE)
        pool.add_extent(1, blocks)
        pools.append(pool)
    return KVCache(pools, windows or (None,), KVConfig(**policy))  # type: ignore[arg-type]


def run(cache: KVCache, seq_id: int, tokens: list[int], chunk: int = 100) -> tuple[SequenceKV, int]:
    """Compute all of `tokens`; the sequence, and how many tokens were found."""
    kv = SequenceKV(seq_id)
    prefix = cache.find(kv, tokens, len(tokens) - 1)
    cache.begin(kv, prefix, len(tokens))
    computed = prefix.num_tokens
    while computed < len(tokens):
        stop = min(len(tokens), computed + chunk)
        assert cache.grow(kv, len(tokens), computed, stop) is not None
        cache.computed(kv, tokens, stop)
        computed = stop
    return kv, prefix.num_tokens


def test_a_prefix_is_found_while_its_sequence_runs_and_after() -> None:
    cache = cache_of(20)
    tokens = list(range(18))
    first, found = run(cache, 1, tokens)
    assert found == 0
    second, found = run(cache, 2, tokens)
    assert found == 16 and second.tables[0][:4] == first.tables[0][:4]
    assert cache.num_used == 6
    cache.release(first)
    cache.release(second)
    assert (cache.num_used, cache.num_cached) == (0, 4)
    _, found = run(cache, 3, [*tokens[:9], 99, *tokens[10:]])
    assert found == 8, "whole blocks, up to the first that differs"
    assert (cache.counts.queries, cache.counts.hits) == (54, 24)
    assert cache.counts.allocations == 5 + 1 + 3


def test_the_last_token_is_always_computed() -> None:
    cache = cache_of(20)
    kv, _ = run(cache, 1, list(range(16)))
    cache.release(kv)
    _, found = run(cache, 2, list(range(16)))
    assert found == 12


@pytest.mark.parametrize(("policy", "found"), [({}, 12), ({"min_prefix_blocks": 4}, 0), ({"prefix_caching": False}, 0)])
def test_switches(policy: dict[str, object], found: int) -> None:
    cache = cache_of(20, **policy)
    kv, _ = run(cache, 1, list(range(13)))
    cache.release(kv)
    assert run(cache, 2, list(range(15)))[1] == found
    assert (cache.num_cached > 0 or found > 0) == cache.policy.prefix_caching


def test_other_salts_share_nothing() -> None:
    cache = cache_of(20)
    run(cache, 1, list(range(13)))
    other = SequenceKV(2, root=b"salt")
    assert cache.find(other, list(range(13)), 12).num_tokens == 0
    assert cache.find(SequenceKV(3), list(range(13)), 12).num_tokens == 12


def test_what_a_window_has_passed_is_free_and_a_hit_needs_the_last_window() -> None:
    """Window 6 and blocks of 4: the next token sees 5 others."""
    cache = cache_of(20, None, 6)
    tokens = list(range(30))
    kv, _ = run(cache, 1, tokens, chunk=7)
    assert [table.count(NULL_BLOCK) for table in kv.tables] == [0, 6]
    assert [pool.num_used for pool in cache.pools] == [8, 2]
    window = cache.pools[1]
    assert window.num_cached == 6, "found until they are taken"
    cache.release(kv)
    window.evict(3)  # blocks 0 to 2, which nobody at token 24 or later sees
    again = SequenceKV(2)
    prefix = cache.find(again, tokens, 29)
    assert prefix.num_tokens == 28 and prefix.tables[1][:5] == (NULL_BLOCK,) * 5
    gone = window.find(kv.hashes[6])
    assert gone is not None
    window.share([gone])
    window.clear()  # now no window is whole
    assert cache.find(again, tokens, 29).num_tokens == 0
    window.free([gone])


def test_a_fork_copies_the_block_that_it_writes_to() -> None:
    cache = cache_of(20)
    tokens = list(range(10))
    parent, _ = run(cache, 1, tokens)
    children = [SequenceKV(i) for i in (2, 3)]
    for kv in children:
        prefix = cache.fork_of(parent, 9)
        assert prefix is not None and prefix.tables[0] == tuple(parent.tables[0])
        cache.begin(kv, prefix, 10)
    assert cache.num_used == 3
    last = parent.tables[0][2]
    copies = [cache.grow(kv, 10, 9, 10) for kv in children]
    assert copies == [[BlockCopy(0, last, kv.tables[0][2])] for kv in children]
    assert cache.grow(parent, 11, 10, 11) == [], "who is left alone writes in place"
    assert len({kv.tables[0][2] for kv in (parent, *children)}) == 3
    assert cache.num_used == 5
    cache.check_integrity([parent, *children])
    assert cache.counts.copies == 2 and cache.counts.forks == 2


def test_sixteen_samples_take_the_prompt_once_and_a_tail_each() -> None:
    cache = cache_of(200)
    prompt = list(range(4 * 30 + 2))
    parent, _ = run(cache, 1, prompt)
    for number in range(2, 17):
        kv = SequenceKV(number)
        prefix = cache.fork_of(parent, len(prompt) - 1)
        assert prefix is not None
        cache.begin(kv, prefix, len(prompt))
        assert cache.grow(kv, len(prompt), len(prompt) - 1, len(prompt)) is not None
    assert cache.num_used == 30 + 16


def test_nothing_changes_where_blocks_are_missing() -> None:
    cache = cache_of(5, None, 6)
    kv, _ = run(cache, 1, list(range(12)))
    before = [list(table) for table in kv.tables]
    assert cache.grow(kv, 30, 12, 13) is None
    assert kv.tables == before and cache.counts.failures == 1
    cache.check_integrity([kv])


def test_pressure_and_collection() -> None:
    cache = cache_of(20)
    kvs = []
    levels = []
    for number in range(5):
        levels.append(cache.pressure)
        kvs.append(run(cache, number, [100 * number + i for i in range(16)])[0])
    assert levels == [Pressure.LOW] * 4 + [Pressure.HIGH] and cache.pressure is Pressure.CRITICAL
    for kv in kvs:
        cache.release(kv)
    assert cache.pressure is Pressure.LOW and cache.num_cached == 20
    collection = cache.collect(keep=8)
    assert collection.blocks == 12 and collection.seconds >= 0 and cache.num_cached == 8
    assert cache.evict(3) == 3 and cache.clear() == 5 and cache.num_cached == 0


def test_nothing_of_before_a_clear_is_found() -> None:
    """Blocks that running sequences fill later stand on KV of before; those of new sequences are found."""
    cache, tokens = cache_of(20), list(range(16))
    kv, _ = run(cache, 1, tokens[:6])
    assert cache.clear() == 1
    assert cache.fork_of(kv, 6) is None
    assert cache.grow(kv, 16, 6, 16) == []
    cache.computed(kv, tokens, 16)
    assert run(cache, 2, tokens)[1] == 0
    cache.release(kv)
    again = SequenceKV(3)
    assert cache.find(again, tokens, 15).num_tokens == 12, "of sequence 2"
    once_more, found = run(cache, 1, tokens)
    assert found == 12 and cache.fork_of(once_more, 16) is not None


def test_the_longest_sequence_that_fits() -> None:
    assert cache_of(10).most_tokens(8) == 40
    assert cache_of(10, 6).most_tokens(8) == 2**62, "window and chunk fit, so any length does"
    assert cache_of(3, 6).most_tokens(8) == 12
    assert cache_of(10, None, 6).most_tokens(8) == 40


class CacheMachine(RuleBasedStateMachine):
    """Sequences over two groups, against slots that really hold what was written: every token that is computed must
    see its own history in both groups. A ledger follows the deltas."""

    windows: tuple[int | None, ...] = (None, 6)

    def __init__(self) -> None:
        super().__init__()
        self.cache = cache_of(14, *self.windows)
        self.ledger = LeaseLedger([GroupShape(15, 10)] * len(self.windows), SIZE)
        for group in range(len(self.windows)):
            self.ledger.lease("e", 0, 14, group)
        self.slots: list[dict[int, tuple[int, ...]]] = [{} for _ in self.windows]  # slot -> history
        self.live: dict[int, tuple[SequenceKV, list[int], int]] = {}
        self.before: set[int] = set()  # sequences that had begun when the cache was cleared
        self.ids = self.reports = 0

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=40), chunk=st.integers(1, 9))
    def begin(self, tokens: list[int], chunk: int) -> None:
        self.ids += 1
        kv = SequenceKV(self.ids)
        prefix = self.cache.find(kv, tokens, len(tokens) - 1)
        assert prefix.num_tokens < len(tokens) and prefix.num_tokens % SIZE == 0
        stop = min(len(tokens), prefix.num_tokens + chunk)
        if self.cache.can_begin(prefix, len(tokens), stop, 0):
            self.cache.begin(kv, prefix, len(tokens))
            self.live[self.ids] = (kv, tokens, prefix.num_tokens)
            self._compute(self.ids, stop)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), more=st.integers(1, 9))
    def step(self, data: st.DataObject, more: int) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.live)))
        kv, tokens, computed = self.live[seq_id]
        if computed == len(tokens):
            tokens.append(data.draw(st.integers(0, 1)))
        free = [pool.num_free for pool in self.cache.pools]
        if not self._compute(seq_id, min(len(tokens), computed + more)):
            assert [pool.num_free for pool in self.cache.pools] == free
            self.cache.release(kv)
            del self.live[seq_id]

    def _compute(self, seq_id: int, stop: int) -> bool:
        kv, tokens, computed = self.live[seq_id]
        copies = self.cache.grow(kv, len(tokens), computed, stop)
        if copies is None:
            return False
        for copy in copies:
            for offset in range(SIZE):
                self.slots[copy.group].pop(copy.target * SIZE + offset, None)
                if (held := self.slots[copy.group].get(copy.source * SIZE + offset)) is not None:
                    self.slots[copy.group][copy.target * SIZE + offset] = held
        for group, window in enumerate(self.windows):
            table, slots = kv.tables[group], self.slots[group]
            for position in range(computed, stop):
                block = table[position // SIZE]
                assert block != NULL_BLOCK and self.cache.pools[group].is_writable(block)
                slots[block * SIZE + position % SIZE] = tuple(tokens[: position + 1])
            for position in range(computed, stop):
                first = 0 if window is None else max(0, position - window + 1)
                for seen in range(first, position + 1):
                    slot = table[seen // SIZE] * SIZE + seen % SIZE
                    assert slots[slot] == tuple(tokens[: seen + 1]), f"token {position} sees another's history"
        self.cache.computed(kv, tokens, stop)
        if seq_id in self.before:
            tables = zip(self.cache.pools, kv.tables, strict=True)
            assert all(
                pool.is_writable(block) or pool.references(block) > 1
                for pool, table in tables
                for block in table
                if block != NULL_BLOCK
            )
        self.live[seq_id] = (kv, tokens, stop)
        return True

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        kv, tokens, computed = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        count = data.draw(st.integers(1, computed))
        prefix = self.cache.fork_of(kv, count)
        if prefix is None:
            assert None not in self.windows or len(self.windows) > 1, "full attention has given up nothing"
            return
        known = [*tokens[:count], data.draw(st.integers(0, 1))]
        if self.cache.can_begin(prefix, len(known), len(known), 0):
            self.ids += 1
            child = SequenceKV(self.ids)
            self.cache.begin(child, prefix, len(known))
            self.live[self.ids] = (child, known, count)
            assert self._compute(self.ids, len(known)), "there were blocks"

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.live)))
        self.cache.release(self.live.pop(seq_id)[0])

    @rule(n=st.integers(0, 6))
    def evict(self, n: int) -> None:
        self.cache.evict(n)

    @rule()
    def clear(self) -> None:
        """What was begun before stays, and is not found by anyone."""
        self.cache.clear()
        self.before = set(self.live)
        tokens = [0] * 20
        assert self.cache.find(SequenceKV(0), tokens, 19).num_tokens == 0

    @rule()
    def report(self) -> None:
        self.reports += 1
        assert self.ledger.report("e", 0, self.reports, self.cache.take_delta())
        for group in range(len(self.windows)):
            held = {i: tuple(sorted({*kv.tables[group]} - {NULL_BLOCK})) for i, (kv, _, _) in self.live.items()}
            assert self.ledger.holdings("e", group) == {i: blocks for i, blocks in held.items() if blocks}
        stats = self.ledger.stats()
        assert (stats.used_blocks, stats.cached_blocks) == (self.cache.num_used, self.cache.num_cached)
        self.ledger.check_integrity()

    @invariant()
    def consistent(self) -> None:
        self.cache.check_integrity([kv for kv, _, _ in self.live.values()])

    def teardown(self) -> None:
        for kv, _, _ in self.live.values():
            self.cache.release(kv)
        self.live = {}
        assert self.cache.num_used == 0
        self.report()


class WindowMachine(CacheMachine):
    windows = (6,)


class TwoWindowsMachine(CacheMachine):
    windows = (None, 3, 9)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestWindowMachine = WindowMachine.TestCase
TestWindowMachine.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestTwoWindowsMachine = TwoWindowsMachine.TestCase
TestTwoWindowsMachine.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
