"""The KV of the sequences of one engine: their block tables, what they share, and what of it is found again.

Decoder layers with the same window are a *KV cache group*. Each group has a pool and, for every sequence, a block table
of its own: block i of a table holds tokens i * block_size and on in the layers of that group. A group with a window
gives up the blocks that its next token does not see any more; the null block stands for them in the table.

Pure and not thread-safe: it decides which blocks hold what. The data of a block that is copied is copied by the
executor, which is told so with the step (`BlockCopy`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from raytier.checkpoint.manifest import ModelManifest
from raytier.config import KVCache as KVConfig
from raytier.kv.block_pool import NULL_BLOCK, BlockPool
from raytier.kv.hashing import extend_hashes, root_hash
from raytier.kv.ledger import LedgerDelta, SequenceDelta
from raytier.kv.tables import BlockCopy, Prefix, SequenceKV
from raytier.kv.usage import CacheCounts, Collection, GroupUse, Pressure


class KVCache:
    """Block tables over one pool per KV cache group.

    Args:
        pools: of equal block sizes; theirs from now on.
        windows: of the groups, in tokens; None = all tokens are seen.
        policy: what is shared and kept.
        root: what all sequences' hashes begin with (`root_hash`).
    """

    def __init__(
        self,
        pools: SequenceOf[BlockPool],
        windows: SequenceOf[int | None] = (None,),
        policy: KVConfig | None = None,
        root: bytes = b"",
    ) -> None:
        if len(pools) != len(windows) or not pools or len({pool.block_size for pool in pools}) > 1:
            raise ValueError(f"{len(pools)} pools for {len(windows)} groups, of one block size")
        self.pools = tuple(pools)
        self.windows = tuple(windows)
        self.policy = KVConfig() if policy is None else policy
        self.root = root
        self.block_size = pools[0].block_size
        self.counts = CacheCounts()
        self._era = 0
        self._reported = (CacheCounts(), 0)
        self._changes: dict[tuple[int, int], tuple[set[int], set[int]]] = {}  # (sequence, group) -> blocks (+, -)

    @classmethod
    def of(cls, manifest: ModelManifest, block_size: int, policy: KVConfig) -> KVCache:
        """For a model: one pool per KV cache group, without blocks yet."""
        windows = manifest.kv_windows
        root = root_hash(
            model=json.dumps([manifest.model_dir, [[file.path, file.size] for file in manifest.files]]),
            dtype=manifest.compute_dtype,
            layout=json.dumps([[s.num_kv_heads, s.key_dim, s.value_dim, s.sliding_window] for s in manifest.kv_layers]),
            block_size=block_size,
        )
        return cls([BlockPool(block_size, policy.max_cached_blocks) for _ in windows], windows, policy, root)

    @property
    def num_blocks(self) -> int:
        return sum(pool.num_blocks for pool in self.pools)

    @property
    def num_used(self) -> int:
        return sum(pool.num_used for pool in self.pools)

    @property
    def num_cached(self) -> int:
        return sum(pool.num_cached for pool in self.pools)

    def shared_blocks(self, kv: SequenceKV) -> int:
        """Blocks of a sequence that others use as well."""
        return sum(
            pool.references(block) > 1 for pool, table in zip(self.pools, kv.tables, strict=False) for block in table
        )

    def use(self) -> tuple[GroupUse, ...]:
        """Of every group."""
        return tuple(
            GroupUse(window, pool.num_blocks, pool.num_used, pool.num_cached)
            for window, pool in zip(self.windows, self.pools, strict=True)
        )

    @property
    def num_evictions(self) -> int:
        """Blocks whose content was given up for another's."""
        return sum(pool.num_evictions for pool in self.pools)

    @property
    def pressure(self) -> Pressure:
        """By the group that has least."""
        free = min(pool.num_free / max(1, pool.num_blocks) for pool in self.pools)
        if free < self.policy.critical_free_fraction:
            return Pressure.CRITICAL
        return Pressure.HIGH if free < self.policy.high_free_fraction else Pressure.LOW

    def most_tokens(self, chunk: int) -> int:
        """The longest sequence that fits alone, computed in chunks of `chunk` tokens; for groups with a window that
        hold one window and a chunk there is no limit (2**62)."""
        return min(self._most(pool, window, chunk) for pool, window in zip(self.pools, self.windows, strict=True))

    def _most(self, pool: BlockPool, window: int | None, chunk: int) -> int:
        whole = pool.num_blocks * self.block_size
        # The window of the chunk's first token, the chunk, and what is before and behind in the outer blocks.
        if window is not None and pool.blocks_for(window - 1 + chunk) + 1 <= pool.num_blocks:
            return 2**62
        return whole

    # ---- beginnings ----------------------------------------------------------------------------

    def find(self, kv: SequenceKV, tokens: SequenceOf[int], limit: int) -> Prefix:
        """The longest prefix of `tokens`, of whole blocks and at most `limit` tokens, whose KV is on the device.

        Every group needs the blocks that the next token sees, so a group with a window only those at the end.
        """
        blocks = min(limit, len(tokens)) // self.block_size
        if not self.policy.prefix_caching or blocks < self.policy.min_prefix_blocks:
            return self._nothing()
        extend_hashes(kv.hashes, kv.root or self.root, tokens, self.block_size, blocks)
        hashes = kv.hashes[:blocks]
        count = blocks
        while True:  # it shrinks until all groups agree
            agreed = count
            for pool, window in zip(self.pools, self.windows, strict=True):
                count = self._hit(pool, window, hashes, count)
            if count == agreed:
                break
        if count < self.policy.min_prefix_blocks:
            return self._nothing()
        tables = []
        for group, pool in enumerate(self.pools):
            first = self._first_block(group, count * self.block_size)
            found = pool.find_prefix(hashes[first:count])
            tables.append((*[NULL_BLOCK] * first, *found))
        return self._prefix(count * self.block_size, tables)

    def _hit(self, pool: BlockPool, window: int | None, hashes: SequenceOf[bytes], most: int) -> int:
        """The largest number of blocks, at most `most`, behind which a token has what it sees in this group."""
        if window is None:
            return len(pool.find_prefix(hashes[:most]))
        last = most  # the end that is tried: what is between it and the loop's index is there
        for index in range(most - 1, -1, -1):
            if index < (last * self.block_size - window + 1) // self.block_size:
                break
            if pool.find(hashes[index]) is None:
                last = index
        return last

    def fork_of(self, parent: SequenceKV, num_tokens: int) -> Prefix | None:
        """The first `num_tokens` tokens of a running sequence, its last block shared even if it is not full.

        None where the parent has given up what the next token would see or has begun before `clear`, or samples share
        nothing.
        """
        if not self.policy.sharing or num_tokens < 1 or parent.era != self._era:
            return None
        count = -(-num_tokens // self.block_size)
        tables = []
        for group, table in enumerate(parent.tables):
            first = self._first_block(group, num_tokens)
            if len(table) < count or NULL_BLOCK in table[first:count]:
                return None
            tables.append((*[NULL_BLOCK] * first, *table[first:count]))
        return self._prefix(num_tokens, tables, forked=True)

    def can_begin(self, prefix: Prefix, known: int, stop: int, reserve: int) -> bool:
        """Whether a sequence of `known` tokens that begins with `prefix` has the blocks to compute up to `stop`, and
        `reserve` more are left."""
        for group, pool in enumerate(self.pools):
            table = prefix.tables[group]
            needed = self._covered(group, known, stop) - len(table) + prefix.idle[group] + reserve
            if prefix.num_tokens % self.block_size:
                needed += 1  # the copy of its last block
            if needed > pool.num_free:
                return False
        return True

    def begin(self, kv: SequenceKV, prefix: Prefix, queried: int) -> None:
        """Give a sequence without blocks those of `prefix`, which was looked up for `queried` tokens."""
        if prefix.forked:
            self.counts.forks += 1
        else:
            self.counts.queries += queried
            self.counts.hits += prefix.num_tokens
        kv.tables = [list(table) for table in prefix.tables]
        kv.passed = [table.count(NULL_BLOCK) for table in prefix.tables]
        kv.registered = prefix.num_tokens // self.block_size
        kv.era = self._era
        for group, (pool, table) in enumerate(zip(self.pools, kv.tables, strict=True)):
            blocks = table[kv.passed[group] :]
            pool.share(blocks)
            self._note(kv.seq_id, group, blocks, ())

    def _nothing(self) -> Prefix:
        return Prefix(0, ((),) * len(self.pools), (0,) * len(self.pools))

    def _prefix(self, num_tokens: int, tables: SequenceOf[tuple[int, ...]], *, forked: bool = False) -> Prefix:
        idle = tuple(sum(map(pool.is_cached, table)) for pool, table in zip(self.pools, tables, strict=True))
        return Prefix(num_tokens, tuple(tables), idle, forked)

    # ---- steps ---------------------------------------------------------------------------------

    def grow(self, kv: SequenceKV, known: int, computed: int, stop: int) -> list[BlockCopy] | None:
        """Let a sequence write tokens computed .. stop - 1; None, and nothing has changed, where blocks are missing.

        In groups without a window the blocks of all its `known` tokens are taken at once, so that they lie in few runs;
        others hold no more than the window and the step.

        Returns:
            Copies to make before: a block that others see is replaced by one of its own.
        """
        plans: list[tuple[int, int | None]] = []
        for group, pool in enumerate(self.pools):
            table = kv.tables[group]
            missing = max(0, self._covered(group, known, stop) - len(table))
            index = computed // self.block_size
            shared = index < len(table) and not pool.is_writable(table[index])
            if missing + shared > pool.num_free:
                self.counts.failures += 1
                return None
            plans.append((missing, index if shared else None))
        copies = []
        for group, (missing, place) in enumerate(plans):
            pool, table = self.pools[group], kv.tables[group]
            if place is not None:
                source, [target] = table[place], pool.allocate(1)
                table[place] = target
                pool.free([source])
                self._note(kv.seq_id, group, [target], [source])
                self.counts.allocations += 1
                if computed % self.block_size:
                    copies.append(BlockCopy(group, source, target))
                    self.counts.copies += 1
            if missing:
                self._note(kv.seq_id, group, pool.extend(table, missing), ())
                self.counts.allocations += missing
        return copies

    def computed(self, kv: SequenceKV, tokens: SequenceOf[int], num_computed: int) -> None:
        """The KV of the first `num_computed` tokens is there: full blocks can be found from now on, and those that no
        window reaches any more are free."""
        full = num_computed // self.block_size
        if self.policy.prefix_caching and full > kv.registered and kv.era == self._era:
            extend_hashes(kv.hashes, kv.root or self.root, tokens, self.block_size, full)
            for index in range(kv.registered, full):
                for pool, table in zip(self.pools, kv.tables, strict=True):
                    if table[index] != NULL_BLOCK:
                        pool.register(table[index], kv.hashes[index])
            kv.registered = full
        for group, window in enumerate(self.windows):
            if window is None:
                continue
            passed, first = kv.passed[group], self._first_block(group, num_computed)
            if first > passed:
                table = kv.tables[group]
                blocks = table[passed:first]
                self.pools[group].free(blocks)
                self._note(kv.seq_id, group, (), blocks)
                table[passed:first] = [NULL_BLOCK] * (first - passed)
                kv.passed[group] = first

    def release(self, kv: SequenceKV) -> None:
        """Drop all blocks of a sequence, exactly once."""
        tables, kv.tables = kv.tables, []
        for group, table in enumerate(tables):
            blocks = table[kv.passed[group] :]
            self.pools[group].free(blocks)
            self._note(kv.seq_id, group, (), blocks)
        kv.passed = []
        kv.registered = 0

    def _covered(self, group: int, known: int, stop: int) -> int:
        """Length of the table of a sequence that computes up to `stop`."""
        tokens = known if self.windows[group] is None else stop
        return -(-tokens // self.block_size)

    def _first_block(self, group: int, num_computed: int) -> int:
        """The first block that the token behind `num_computed` ones sees."""
        window = self.windows[group]
        return 0 if window is None else max(0, num_computed - window + 1) // self.block_size

    # ---- what is kept --------------------------------------------------------------------------

    def evict(self, n: int) -> int:
        """Give up the `n` least recently used cached blocks of every group; returns how many there were."""
        return sum(pool.evict(n) for pool in self.pools)

    def clear(self) -> int:
        """Nothing is found any more, and nothing of running sequences will be: their KV follows from what there was
        before. Returns how many hashes are gone."""
        self._era += 1
        return sum(pool.clear() for pool in self.pools)

    def collect(self, keep: int = 0) -> Collection:
        """Give up cached blocks until each group has at most `keep`."""
        began = time.perf_counter()
        blocks = sum(pool.evict(max(0, pool.num_cached - keep)) for pool in self.pools)
        return Collection(blocks, time.perf_counter() - began)

    # ---- reports -------------------------------------------------------------------------------

    def _note(self, seq_id: int, group: int, more: SequenceOf[int], less: SequenceOf[int]) -> None:
        """What came and went between two reports is not reported."""
        gained, lost = self._changes.setdefault((seq_id, group), (set(), set()))
        for block in less:
            (gained.discard if block in gained else lost.add)(block)
        for block in more:
            (lost.discard if block in lost else gained.add)(block)

    def take_delta(self) -> LedgerDelta:
        """What changed in the block tables since the last call."""
        now, (before, evicted) = self.counts, self._reported
        evictions = self.num_evictions
        delta = LedgerDelta(
            tuple(
                SequenceDelta(seq_id, tuple(sorted(gained)), tuple(sorted(lost)), group)
                for (seq_id, group), (gained, lost) in self._changes.items()
                if gained or lost
            ),
            now.allocations - before.allocations,
            now.failures - before.failures,
            now.queries - before.queries,
            now.hits - before.hits,
            now.copies - before.copies,
            tuple(pool.num_cached for pool in self.pools),
            evictions - evicted,
        )
        self._changes = {}
        self._reported = (replace(now), evictions)
        return delta

    def check_integrity(self, sequences: SequenceOf[SequenceKV]) -> None:
        """Assert the invariants, given all sequences that hold blocks.

        Raises:
            AssertionError: the bookkeeping is wrong; the message says where.
        """
        for group, pool in enumerate(self.pools):
            pool.check_integrity()
            held: dict[int, int] = {}
            for kv in sequences:
                if not kv.tables:
                    continue
                table, passed = kv.tables[group], kv.passed[group]
                blocks = table[passed:]
                if NULL_BLOCK in blocks or any(block != NULL_BLOCK for block in table[:passed]):
                    raise AssertionError(f"sequence {kv.seq_id}, group {group}: {table}, of which {passed} have passed")
                for block in blocks:
                    held[block] = held.get(block, 0) + 1
            if wrong := [b for b, count in held.items() if pool.references(b) != count]:
                raise AssertionError(f"group {group}: blocks {wrong} are in other tables than the pool knows of")
            if len(held) != pool.num_used:
                raise AssertionError(f"group {group}: {len(held)} blocks in tables, {pool.num_used} used")
