"""KVBlockActor: owns the capacity of KV blocks, leases them to engines and keeps the ledger."""

from __future__ import annotations

from collections.abc import Sequence

from raytier.errors import EngineDeadError
from raytier.kv.ledger import Extent, GroupShape, KVStats, LeaseLedger, LedgerDelta


class KVBlockActor:
    """A shell over `LeaseLedger`. Engines allocate inside their lease and report asynchronously."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._shape = "no model"
        self._ledger: LeaseLedger | None = None

    def __repr__(self) -> str:
        return f"KVBlockActor({self._shape})"

    def open(self, groups: Sequence[GroupShape], block_size: int) -> None:
        """Begin anew with the blocks of a model, of `block_size` tokens."""
        self._ledger = LeaseLedger(groups, block_size)
        self._shape = f"{sum(group.num_blocks for group in groups)} blocks of {block_size} tokens"

    def close(self) -> None:
        """The model is gone, and its blocks with it."""
        self._ledger = None
        self._shape = "no model"

    def lease(self, engine_id: str, epoch: int, count: int, group: int = 0) -> tuple[Extent, ...]:
        """Lease `count` blocks of a group; see `LeaseLedger.lease`."""
        if self._ledger is None:
            raise EngineDeadError(f"{self._name} has no blocks to lease to {engine_id}: no model is loaded")
        return self._ledger.lease(engine_id, epoch, count, group)

    def report(self, engine_id: str, epoch: int, step: int, delta: LedgerDelta) -> None:
        """What an engine allocated and freed in one step; idempotent by (epoch, step)."""
        if self._ledger is not None:  # the last report of an engine may come after its end
            self._ledger.report(engine_id, epoch, step, delta)

    def ping(self) -> str:
        return self._name

    def stats(self) -> KVStats | None:
        """The ledger's view; None while no model is loaded."""
        if self._ledger is None:
            return None
        self._ledger.check_integrity()
        return self._ledger.stats()
