"""Who holds which KV blocks: what the KVBlockActor keeps. Pure and not thread-safe.

The ledger owns the capacity, one pool of blocks per KV cache group, and leases it in extents. Inside its lease an
engine allocates on its own and reports what changed, asynchronously and at most once per step, so that no step waits
for the ledger.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from raytier.errors import EngineDeadError, ResourceNotAvailableError
from raytier.kv.block_pool import BlockPool


@dataclass(frozen=True, slots=True)
class Extent:
    """Blocks start .. start + count - 1."""

    start: int
    count: int


@dataclass(frozen=True, slots=True)
class GroupShape:
    """Capacity of a KV cache group: blocks, the null block included, and bytes of one."""

    num_blocks: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class SequenceDelta:
    """Blocks of a group that one sequence dropped and gained; other sequences may hold them as well."""

    seq_id: int
    allocated: tuple[int, ...] = ()
    freed: tuple[int, ...] = ()
    group: int = 0


@dataclass(frozen=True, slots=True)
class LedgerDelta:
    """What changed in an engine's pools since its last report.

    Attributes:
        allocations: blocks handed out, counting those that came back within the delta; shared ones are not.
        failures: times a sequence found no free block (a preemption or a postponed admission).
        queries, hits: prompt tokens looked up in the prefix cache, and found.
        copies: shared blocks that were copied to be written to.
        cached: per group, blocks that nobody holds and that are found by their content, now.
        evictions: of these, how many were given up.
    """

    sequences: tuple[SequenceDelta, ...] = ()
    allocations: int = 0
    failures: int = 0
    queries: int = 0
    hits: int = 0
    copies: int = 0
    cached: tuple[int, ...] = ()
    evictions: int = 0

    def __bool__(self) -> bool:
        counted = self.allocations or self.failures or self.queries or self.copies or self.evictions
        return bool(self.sequences or counted)


@dataclass(frozen=True, slots=True)
class EngineKVStats:
    """One engine's part: its cap, blocks leased, used and cached, sequences that hold blocks, last report applied.

    `group_blocks`: blocks used, per group.
    """

    epoch: int
    leased_blocks: int
    used_blocks: int
    cached_blocks: int
    active_sequences: int
    last_step: int
    max_blocks: int | None
    group_blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KVStats:
    """The ledger's view, as fresh as the last report; sums over the KV cache groups.

    Attributes:
        total_blocks: all blocks that can be leased (the null blocks are not among them).
        leased_blocks: blocks that some engine may allocate.
        used_blocks: blocks that some sequence holds, shared ones counted once.
        cached_blocks: blocks that none holds and that are found by what they hold.
        free_blocks: total - used.
        allocations, failures, queries, hits, copies, evictions: sums over all reports, plus refused leases among the
            failures.
    """

    block_size: int
    groups: tuple[GroupShape, ...]
    total_blocks: int
    leased_blocks: int
    used_blocks: int
    cached_blocks: int
    free_blocks: int
    total_bytes: int
    used_bytes: int
    cached_bytes: int
    active_sequences: int
    allocations: int
    failures: int
    queries: int
    hits: int
    copies: int
    evictions: int
    engines: Mapping[str, EngineKVStats]

    @property
    def hit_rate(self) -> float:
        """Prompt tokens found over those looked up; 0 where none was."""
        return self.hits / self.queries if self.queries else 0.0


@dataclass(slots=True)
class _Group:
    """An engine's part of a group. `holders` counts the sequences that hold a block; `sequences` are never empty."""

    leased: set[int] = field(default_factory=set)
    holders: dict[int, int] = field(default_factory=dict)
    sequences: dict[int, set[int]] = field(default_factory=dict)


@dataclass(slots=True)
class _Engine:
    epoch: int
    groups: tuple[_Group, ...]
    cached: tuple[int, ...]
    last_step: int = -1


class LeaseLedger:
    """Leases the blocks of `groups`, all of `block_size` tokens, but for the null block of each.

    Invariants: every block is leased to at most one engine; sequences hold blocks of their engine's leases only.
    """

    def __init__(self, groups: Sequence[GroupShape], block_size: int) -> None:
        self._shapes = tuple(groups)
        self._block_size = block_size
        self._pools = []
        for shape in groups:
            if shape.num_blocks < 2:
                raise ValueError(f"num_blocks must be at least 2 (the null block and one more), got {shape.num_blocks}")
            pool = BlockPool(block_size)
            pool.add_extent(1, shape.num_blocks - 1)
            self._pools.append(pool)
        self._engines: dict[str, _Engine] = {}
        self._caps: dict[str, int] = {}
        self._sums = LedgerDelta()
        self._refused = 0

    def set_cap(self, engine_id: str, max_blocks: int | None) -> None:
        """Let an engine lease at most `max_blocks` blocks over all groups; None lifts the cap. It keeps what it has."""
        if max_blocks is None:
            self._caps.pop(engine_id, None)
        else:
            self._caps[engine_id] = max_blocks

    def lease(self, engine_id: str, epoch: int, count: int, group: int = 0) -> tuple[Extent, ...]:
        """Lease `count` more blocks of a group to an engine. A new epoch is a new life: what its last one held comes
        back.

        Raises:
            EngineDeadError: a later epoch of this engine is known.
            ResourceNotAvailableError: fewer than `count` blocks are unleased, or its cap is lower; nothing was leased.
        """
        known = self._engines.get(engine_id)
        if known is not None and epoch < known.epoch:
            raise EngineDeadError(f"engine {engine_id}: epoch {epoch} ended, {known.epoch} is running")
        if known is not None and epoch > known.epoch:
            self.release(engine_id)
            known = None
        if count < 1:
            raise ValueError(f"a lease is at least 1 block, got {count}")
        pool, bytes_each = self._pools[group], self._shapes[group].block_bytes
        if not pool.can_allocate(count):
            self._refused += 1
            raise ResourceNotAvailableError(
                f"engine {engine_id} wants {count} KV blocks ({count * bytes_each} bytes): "
                f"{pool.num_free} of {pool.num_blocks} are not leased"
            )
        has, cap = 0 if known is None else sum(len(g.leased) for g in known.groups), self._caps.get(engine_id)
        if cap is not None and has + count > cap:
            self._refused += 1
            raise ResourceNotAvailableError(
                f"engine {engine_id} wants {count} KV blocks beside its {has}: it may have {cap}"
            )
        if known is None:
            known = _Engine(epoch, tuple(_Group() for _ in self._pools), (0,) * len(self._pools))
            self._engines[engine_id] = known
        leased = known.groups[group].leased
        # Behind the blocks it has, so that its sequences can stay contiguous over the border.
        blocks = pool.extend([max(leased)] if leased else [], count)
        leased.update(blocks)
        return _extents(blocks)

    def report(self, engine_id: str, epoch: int, step: int, delta: LedgerDelta) -> bool:
        """Apply what an engine's step changed. A report seen before is ignored; returns whether it was new.

        Raises:
            EngineDeadError: the epoch is not the running one (or the engine holds no lease).
            ValueError: the delta contradicts the ledger (a block outside the lease, held already by the sequence that
                gains it, or not held by the one that drops it); nothing was applied.
        """
        engine = self._running(engine_id, epoch)
        if step <= engine.last_step:
            return False
        for change in delta.sequences:
            _check(engine, change)
        for change in delta.sequences:
            _apply(engine.groups[change.group], change)
        engine.last_step = step
        engine.cached = delta.cached or engine.cached
        sums = self._sums
        self._sums = LedgerDelta(
            (),
            sums.allocations + delta.allocations,
            sums.failures + delta.failures,
            sums.queries + delta.queries,
            sums.hits + delta.hits,
            sums.copies + delta.copies,
            (),
            sums.evictions + delta.evictions,
        )
        return True

    def release(self, engine_id: str) -> int:
        """An engine ended or died: its leases and sequences come back. Returns the blocks it had leased."""
        engine = self._engines.pop(engine_id, None)
        if engine is None:
            return 0
        for pool, group in zip(self._pools, engine.groups, strict=True):
            pool.free(sorted(group.leased))
        return sum(len(group.leased) for group in engine.groups)

    def holdings(self, engine_id: str, group: int = 0) -> dict[int, tuple[int, ...]]:
        """Blocks of a group per sequence of an engine, in ascending order; empty when the engine is not known."""
        engine = self._engines.get(engine_id)
        return {s: tuple(sorted(blocks)) for s, blocks in engine.groups[group].sequences.items()} if engine else {}

    def stats(self) -> KVStats:
        engines = {name: self._engine_stats(name, engine) for name, engine in self._engines.items()}
        sizes = [shape.block_bytes for shape in self._shapes]
        used = [sum(len(e.groups[g].holders) for e in self._engines.values()) for g in range(len(self._pools))]
        cached = [sum(e.cached[g] for e in self._engines.values()) for g in range(len(self._pools))]
        total = [pool.num_blocks for pool in self._pools]
        sums = self._sums
        return KVStats(
            block_size=self._block_size,
            groups=self._shapes,
            total_blocks=sum(total),
            leased_blocks=sum(pool.num_used for pool in self._pools),
            used_blocks=sum(used),
            cached_blocks=sum(cached),
            free_blocks=sum(total) - sum(used),
            total_bytes=sum(n * size for n, size in zip(total, sizes, strict=True)),
            used_bytes=sum(n * size for n, size in zip(used, sizes, strict=True)),
            cached_bytes=sum(n * size for n, size in zip(cached, sizes, strict=True)),
            active_sequences=sum(e.active_sequences for e in engines.values()),
            allocations=sums.allocations,
            failures=sums.failures + self._refused,
            queries=sums.queries,
            hits=sums.hits,
            copies=sums.copies,
            evictions=sums.evictions,
            engines=engines,
        )

    def _engine_stats(self, name: str, engine: _Engine) -> EngineKVStats:
        used = tuple(len(group.holders) for group in engine.groups)
        active: set[int] = set()
        for group in engine.groups:
            active |= group.sequences.keys()
        return EngineKVStats(
            engine.epoch,
            sum(len(group.leased) for group in engine.groups),
            sum(used),
            sum(engine.cached),
            len(active),
            engine.last_step,
            self._caps.get(name),
            used,
        )

    def check_integrity(self) -> None:
        """Assert the invariants of the class.

        Raises:
            AssertionError: the bookkeeping is wrong; the message says where.
        """
        for number, pool in enumerate(self._pools):
            pool.check_integrity()
            leased = [block for engine in self._engines.values() for block in engine.groups[number].leased]
            if len(set(leased)) != len(leased) or len(leased) != pool.num_used:
                raise AssertionError(f"{len(leased)} leased, {len(set(leased))} distinct, {pool.num_used} in use")
            for name, engine in self._engines.items():
                group = engine.groups[number]
                held: dict[int, int] = {}
                for blocks in group.sequences.values():
                    for block in blocks:
                        held[block] = held.get(block, 0) + 1
                if held != group.holders or not held.keys() <= group.leased:
                    raise AssertionError(f"engine {name}: sequences hold {held}, counted are {group.holders}")
                if not all(group.sequences.values()):
                    raise AssertionError(f"engine {name}: a sequence without blocks is kept")

    def _running(self, engine_id: str, epoch: int) -> _Engine:
        engine = self._engines.get(engine_id)
        if engine is None or engine.epoch != epoch:
            running = f"{engine.epoch} is running" if engine else "it holds no lease"
            raise EngineDeadError(f"engine {engine_id}: report of epoch {epoch}, but {running}")
        return engine


def _check(engine: _Engine, change: SequenceDelta) -> None:
    """Refuse what contradicts the ledger; a sequence is named once per group in a delta."""
    group = engine.groups[change.group]
    has = group.sequences.get(change.seq_id, set())
    for named in (change.freed, change.allocated):
        if len(set(named)) != len(named):
            raise ValueError(f"sequence {change.seq_id} names a block twice: {named}")
    for block in change.freed:
        if block not in has:
            raise ValueError(f"sequence {change.seq_id} frees block {block}, which it does not hold")
    for block in change.allocated:
        if block not in group.leased:
            raise ValueError(f"sequence {change.seq_id} allocates block {block}, which is outside the lease")
        if block in has and block not in change.freed:
            raise ValueError(f"sequence {change.seq_id} allocates block {block}, which it holds already")


def _apply(group: _Group, change: SequenceDelta) -> None:
    has, holders = group.sequences.setdefault(change.seq_id, set()), group.holders
    for block in change.freed:
        has.remove(block)
        if holders[block] == 1:
            del holders[block]
        else:
            holders[block] -= 1
    for block in change.allocated:
        has.add(block)
        holders[block] = holders.get(block, 0) + 1
    if not has:
        del group.sequences[change.seq_id]


def _extents(blocks: Iterable[int]) -> tuple[Extent, ...]:
    extents: list[Extent] = []
    for block in blocks:
        if extents and extents[-1].start + extents[-1].count == block:
            extents[-1] = Extent(extents[-1].start, extents[-1].count + 1)
        else:
            extents.append(Extent(block, 1))
    return tuple(extents)
