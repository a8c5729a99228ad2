"""Who holds which KV blocks: what the KVBlockActor keeps. Pure and not thread-safe.

The ledger owns the capacity and leases it in extents. Inside its lease an engine allocates on its own
and reports what changed, asynchronously and at most once per step, so that no step waits for the ledger.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from raytier.errors import EngineDeadError, ResourceNotAvailableError
from raytier.kv.block_pool import BlockPool


@dataclass(frozen=True, slots=True)
class Extent:
    """Blocks start .. start + count - 1."""

    start: int
    count: int


@dataclass(frozen=True, slots=True)
class SequenceDelta:
    """Blocks that one sequence lost and gained; one that is in both was lost first."""

    seq_id: int
    allocated: tuple[int, ...] = ()
    freed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LedgerDelta:
    """What changed in an engine's pool since its last report.

    Attributes:
        sequences: everything freed is applied before anything allocated, so a block may go from one
            sequence to another within a delta.
        allocations: blocks handed out, counting those that came back within the delta.
        failures: times a sequence found no free block (a preemption or a postponed admission).
    """

    sequences: tuple[SequenceDelta, ...] = ()
    allocations: int = 0
    failures: int = 0

    def __bool__(self) -> bool:
        return bool(self.sequences or self.allocations or self.failures)


@dataclass(frozen=True, slots=True)
class EngineKVStats:
    """One engine's part: blocks leased and used, sequences that hold blocks, last report applied."""

    epoch: int
    leased_blocks: int
    used_blocks: int
    active_sequences: int
    last_step: int


@dataclass(frozen=True, slots=True)
class KVStats:
    """The ledger's view, as fresh as the last report.

    Attributes:
        total_blocks: all blocks that can be leased (the null block is not among them).
        leased_blocks: blocks that some engine may allocate.
        used_blocks: blocks that some sequence holds.
        free_blocks: total - used.
        allocations, failures: sums over all reports, plus refused leases among the failures.
    """

    block_size: int
    block_bytes: int
    total_blocks: int
    leased_blocks: int
    used_blocks: int
    free_blocks: int
    active_sequences: int
    allocations: int
    failures: int
    engines: Mapping[str, EngineKVStats]

    @property
    def total_bytes(self) -> int:
        return self.total_blocks * self.block_bytes

    @property
    def used_bytes(self) -> int:
        return self.used_blocks * self.block_bytes


@dataclass(slots=True)
class _Engine:
    epoch: int
    leased: set[int] = field(default_factory=set)
    owner: dict[int, int] = field(default_factory=dict)  # block -> sequence
    sequences: dict[int, set[int]] = field(default_factory=dict)  # sequence -> its blocks, never empty
    last_step: int = -1


class LeaseLedger:
    """Leases `num_blocks` blocks, the null block 0 included, of `block_size` tokens and `block_bytes` bytes.

    Invariants: every block is leased to at most one engine; within it at most one sequence holds it.
    """

    def __init__(self, num_blocks: int, block_size: int, block_bytes: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2 (the null block and one more), got {num_blocks}")
        self._pool = BlockPool(block_size)
        self._pool.add_extent(1, num_blocks - 1)
        self._block_bytes = block_bytes
        self._engines: dict[str, _Engine] = {}
        self._allocations = 0
        self._failures = 0

    def lease(self, engine_id: str, epoch: int, count: int) -> tuple[Extent, ...]:
        """Lease `count` more blocks to an engine. A new epoch is a new life: what its last one held comes back.

        Raises:
            EngineDeadError: a later epoch of this engine is known.
            ResourceNotAvailableError: fewer than `count` blocks are unleased; nothing was leased.
        """
        known = self._engines.get(engine_id)
        if known is not None and epoch < known.epoch:
            raise EngineDeadError(f"engine {engine_id}: epoch {epoch} ended, {known.epoch} is running")
        if known is not None and epoch > known.epoch:
            self.release(engine_id)
            known = None
        if count < 1:
            raise ValueError(f"a lease is at least 1 block, got {count}")
        if not self._pool.can_allocate(count):
            self._failures += 1
            raise ResourceNotAvailableError(
                f"engine {engine_id} wants {count} KV blocks ({count * self._block_bytes} bytes): "
                f"{self._pool.num_free} of {self._pool.num_blocks} are not leased"
            )
        engine = self._engines.setdefault(engine_id, _Engine(epoch))
        # Behind the blocks it has, so that its sequences can stay contiguous over the border.
        blocks = self._pool.extend([max(engine.leased)] if engine.leased else [], count)
        engine.leased.update(blocks)
        return _extents(blocks)

    def report(self, engine_id: str, epoch: int, step: int, delta: LedgerDelta) -> bool:
        """Apply what an engine's step changed. A report seen before is ignored; returns whether it was new.

        Raises:
            EngineDeadError: the epoch is not the running one (or the engine holds no lease).
            ValueError: the delta contradicts the ledger (a block outside the lease, held by another
                sequence, or freed by one that does not hold it); nothing was applied.
        """
        engine = self._running(engine_id, epoch)
        if step <= engine.last_step:
            return False
        owner = _apply(engine, delta)
        for change in delta.sequences:
            blocks = engine.sequences.setdefault(change.seq_id, set())
            blocks.difference_update(change.freed)
            blocks.update(change.allocated)
            if not blocks:
                del engine.sequences[change.seq_id]
        for block, holder in owner.items():
            if holder is None:
                engine.owner.pop(block, None)
            else:
                engine.owner[block] = holder
        engine.last_step = step
        self._allocations += delta.allocations
        self._failures += delta.failures
        return True

    def release(self, engine_id: str) -> int:
        """An engine ended or died: its leases and sequences come back. Returns the blocks it had leased."""
        engine = self._engines.pop(engine_id, None)
        if engine is None:
            return 0
        self._pool.free(sorted(engine.leased))
        return len(engine.leased)

    def holdings(self, engine_id: str) -> dict[int, tuple[int, ...]]:
        """Blocks per sequence of an engine, in ascending order; empty when the engine is not known."""
        engine = self._engines.get(engine_id)
        return {s: tuple(sorted(blocks)) for s, blocks in engine.sequences.items()} if engine else {}

    def stats(self) -> KVStats:
        engines = {
            name: EngineKVStats(e.epoch, len(e.leased), len(e.owner), len(e.sequences), e.last_step)
            for name, e in self._engines.items()
        }
        used = sum(e.used_blocks for e in engines.values())
        return KVStats(
            block_size=self._pool.block_size,
            block_bytes=self._block_bytes,
            total_blocks=self._pool.num_blocks,
            leased_blocks=self._pool.num_used,
            used_blocks=used,
            free_blocks=self._pool.num_blocks - used,
            active_sequences=sum(e.active_sequences for e in engines.values()),
            allocations=self._allocations,
            failures=self._failures,
            engines=engines,
        )

    def check_integrity(self) -> None:
        """Assert the invariants of the class.

        Raises:
            AssertionError: the bookkeeping is wrong; the message says where.
        """
        self._pool.check_integrity()
        leased = [block for engine in self._engines.values() for block in engine.leased]
        if len(set(leased)) != len(leased) or len(leased) != self._pool.num_used:
            raise AssertionError(f"{len(leased)} leased, {len(set(leased))} distinct, {self._pool.num_used} in use")
        for name, engine in self._engines.items():
            held = {block: s for s, blocks in engine.sequences.items() for block in blocks}
            if held != engine.owner or not held.keys() <= engine.leased:
                raise AssertionError(f"engine {name}: sequences hold {held}, owners are {engine.owner}")
            if not all(engine.sequences.values()):
                raise AssertionError(f"engine {name}: a sequence without blocks is kept")

    def _running(self, engine_id: str, epoch: int) -> _Engine:
        engine = self._engines.get(engine_id)
        if engine is None or engine.epoch != epoch:
            running = f"{engine.epoch} is running" if engine else "it holds no lease"
            raise EngineDeadError(f"engine {engine_id}: report of epoch {epoch}, but {running}")
        return engine


def _apply(engine: _Engine, delta: LedgerDelta) -> dict[int, int | None]:
    """The owner after `delta` of every block that it names; the engine itself is not changed."""
    owner: dict[int, int | None] = {}
    for change in delta.sequences:
        for block in change.freed:
            if owner.get(block, engine.owner.get(block)) != change.seq_id:
                raise ValueError(f"sequence {change.seq_id} frees block {block}, which it does not hold")
            owner[block] = None
    for change in delta.sequences:
        for block in change.allocated:
            holder = owner[block] if block in owner else engine.owner.get(block)
            if holder is not None or block not in engine.leased:
                where = f"held by sequence {holder}" if holder is not None else "outside the lease"
                raise ValueError(f"sequence {change.seq_id} allocates block {block}, which is {where}")
            owner[block] = change.seq_id
    return owner


def _extents(blocks: Iterable[int]) -> tuple[Extent, ...]:
    extents: list[Extent] = []
    for block in blocks:
        if extents and extents[-1].start + extents[-1].count == block:
            extents[-1] = Extent(extents[-1].start, extents[-1].count + 1)
        else:
            extents.append(Extent(block, 1))
    return tuple(extents)
