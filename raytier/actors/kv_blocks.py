"""KVBlockActor: owns the capacity of KV blocks, leases them to engines and keeps the ledger."""

from __future__ import annotations

from raytier.kv.ledger import Extent, KVStats, LeaseLedger, LedgerDelta


class KVBlockActor:
    """A shell over `LeaseLedger`. Engines allocate inside their lease and report asynchronously."""

    def __init__(self, name: str, num_blocks: int, block_size: int, block_bytes: int) -> None:
        self._name = name
        self._shape = f"{num_blocks} blocks of {block_size} tokens"
        self._ledger = LeaseLedger(num_blocks, block_size, block_bytes)

    def __repr__(self) -> str:
        return f"KVBlockActor({self._shape})"

    def lease(self, engine_id: str, epoch: int, count: int) -> tuple[Extent, ...]:
        """Lease `count` blocks; see `LeaseLedger.lease`."""
        return self._ledger.lease(engine_id, epoch, count)

    def report(self, engine_id: str, epoch: int, step: int, delta: LedgerDelta) -> None:
        """What an engine allocated and freed in one step; idempotent by (epoch, step)."""
        self._ledger.report(engine_id, epoch, step, delta)

    def ping(self) -> str:
        return self._name

    def stats(self) -> KVStats:
        self._ledger.check_integrity()
        return self._ledger.stats()
