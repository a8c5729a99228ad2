"""KVBlockActor: owns the capacity of KV blocks, leases them to engines and keeps the ledger."""

from __future__ import annotations

from collections.abc import Sequence

from raytier.errors import EngineDeadError
from raytier.kv.ledger import Extent, GroupShape, KVStats, LeaseLedger, LedgerDelta


class KVBlockActor:
    """A shell over a `LeaseLedger` per model. Engines allocate inside their lease and report asynchronously."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._ledgers: dict[str, LeaseLedger] = {}

    def __repr__(self) -> str:
        if not self._ledgers:
            return "KVBlockActor(no model)"
        blocks = {model: ledger.stats().total_blocks for model, ledger in self._ledgers.items()}
        return f"KVBlockActor({', '.join(f'{model}: {count} blocks' for model, count in blocks.items())})"

    def open(self, model_id: str, groups: Sequence[GroupShape], block_size: int) -> None:
        """Begin anew with the blocks of a model, of `block_size` tokens."""
        self._ledgers[model_id] = LeaseLedger(groups, block_size)

    def close(self, model_id: str) -> None:
        """The model is gone, or asleep, and its blocks with it."""
        self._ledgers.pop(model_id, None)

    def lease(self, engine_id: str, epoch: int, count: int, group: int = 0) -> tuple[Extent, ...]:
        """Lease `count` blocks of a group to the engine of a model; see `LeaseLedger.lease`."""
        ledger = self._ledgers.get(engine_id)
        if ledger is None:
            raise EngineDeadError(f"{self._name} has no blocks to lease to {engine_id}: that model is not loaded")
        return ledger.lease(engine_id, epoch, count, group)

    def report(self, engine_id: str, epoch: int, step: int, delta: LedgerDelta) -> None:
        """What an engine allocated and freed in one step; idempotent by (epoch, step)."""
        ledger = self._ledgers.get(engine_id)
        if ledger is not None:  # the last report of an engine may come after its end
            ledger.report(engine_id, epoch, step, delta)

    def ping(self) -> str:
        return self._name

    def stats(self) -> dict[str, KVStats]:
        """The ledger's view, by model; of those that are loaded and awake."""
        for ledger in self._ledgers.values():
            ledger.check_integrity()
        return {model: ledger.stats() for model, ledger in self._ledgers.items()}
