"""The streamed part of one model: the units that a sweep brings and their ring, both anew after a move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from raytier.checkpoint.manifest import ModelManifest
from raytier.execution.binding import members
from raytier.execution.bus import Bus
from raytier.execution.expert_stream import ExpertPlan, ExpertStream
from raytier.execution.formed import Weight
from raytier.execution.layout import StreamUnit, row_bytes, sweep_units
from raytier.execution.reader import ReaderPool
from raytier.execution.stream import StreamStats, WeightStream
from raytier.planner.plan import DevicePlan, Tier
from raytier.planner.sizing import HEAD_CHUNK_ALONE, chunk_rows, rows_together
from raytier.tiers.aligned import AlignedBuffer

#: Units of a ring that no plan has sized: one computes, two arrive.
_RING_UNITS = 3


@dataclass(frozen=True)
class SweepPlan:
    """What every sweep streams: its units in order, and the ring's bytes for them (0 without units); and the experts
    that it may go through."""

    manifest: ModelManifest
    units: tuple[StreamUnit, ...]
    ring_bytes: int
    ramdisk_bytes: tuple[int, ...]  # parameter bytes of each unit that come from the ramdisk
    experts: ExpertPlan

    @classmethod
    def of(cls, manifest: ModelManifest, tier_of: Mapping[str, Tier], share: DevicePlan) -> SweepPlan:
        """For a placement; the ring is as `share` has it, or larger where a unit needs that."""
        head = manifest.by_name[manifest.head]
        wanted = min(HEAD_CHUNK_ALONE, head.nbytes // 8) // row_bytes(head)
        rows = share.head_chunk_rows or chunk_rows(wanted, rows_together(head))
        units = sweep_units(manifest, tier_of, rows)
        largest = max((unit.nbytes for unit in units), default=0)
        fits = share.ring_bytes >= min(2, len(units)) * largest
        ring = share.ring_bytes if fits else min(_RING_UNITS, len(units)) * largest
        ramdisk = (sum(m.nbytes for m in unit.members if tier_of[m.name] is Tier.RAMDISK) for unit in units)
        experts = ExpertPlan.of(manifest, tier_of, share.expert_bytes)
        return cls(manifest, units, ring if units else 0, tuple(ramdisk), experts)

    @property
    def nbytes(self) -> int:
        """Bytes of the ring and of the experts' slots."""
        return self.ring_bytes + self.experts.nbytes


class StreamedWeights:
    """Streams what a `SweepPlan` says, sweep after sweep; used by the thread that computes, or while it does not.

    Attributes:
        stats: totals over all plans.
        experts: the part that comes when the router has chosen it.
    """

    def __init__(self, pool: ReaderPool, window: int, bus: Bus | None) -> None:
        self._pool = pool
        self._window = max(window, _RING_UNITS - 1)
        self._bus = bus
        self._plan: SweepPlan | None = None
        self._unit_of: dict[int, int] = {}
        self._ring: AlignedBuffer | None = None
        self._stream: WeightStream | None = None
        self.stats = StreamStats()
        self.experts = ExpertStream(pool, bus, self.stats)
        self._bytes_ramdisk = 0

    def start(self, plan: SweepPlan) -> None:
        """Begin to stream by `plan`, in place of what was streamed before; prefetches that it shares are kept."""
        before, self._plan = self._plan, plan
        self.experts.start(plan.experts, plan.manifest)
        if before is not None and (before.units, before.ring_bytes) == (plan.units, plan.ring_bytes):
            return
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if (self._ring.nbytes if self._ring is not None else 0) != plan.ring_bytes:
            if self._ring is not None and self._bus is not None:
                self._bus.unpin(self._ring.address)
            self._ring = None  # before the new one is made: both together may be more than there is room for
            self._ring = AlignedBuffer(plan.ring_bytes) if plan.ring_bytes else None
            if self._ring is not None and self._bus is not None:
                self._bus.pin_range(self._ring.address, self._ring.nbytes)
        self._unit_of = {unit.layer: index for index, unit in enumerate(plan.units) if unit.layer is not None}
        if self._ring is not None:
            self._stream = WeightStream(plan.units, self._pool, self._ring, self._window, self.stats)
            self._stream.start()

    @property
    def nbytes(self) -> int:
        """Bytes of the ring and of the experts' slots."""
        return (self._ring.nbytes if self._ring is not None else 0) + self.experts.nbytes

    @property
    def bytes_ramdisk(self) -> int:
        """Of what was consumed, the bytes from the ramdisk."""
        return self._bytes_ramdisk + self.experts.bytes_ramdisk

    def unit_of(self, layer: int) -> int | None:
        """Index of the unit that brings parameters of a decoder layer; None when all of it is in memory."""
        return self._unit_of.get(layer)

    def head_units(self) -> Iterator[int]:
        """Indices of the units that bring the output head, in the order of its rows."""
        assert self._plan is not None
        return (index for index, unit in enumerate(self._plan.units) if unit.rows is not None)

    def acquire(self, index: int) -> dict[str, Weight]:
        """The parameters of a unit by name, as views into the ring, until its `release`; see `WeightStream.acquire`."""
        assert self._stream is not None and self._plan is not None
        tensors = members(self._plan.units[index], self._stream.acquire(index), self._plan.manifest)
        self._bytes_ramdisk += self._plan.ramdisk_bytes[index]
        return tensors

    def release(self, index: int) -> None:
        assert self._stream is not None
        self._stream.release(index)

    def cancel(self) -> None:
        """Drop what the ring holds and experts under way; the next sweep starts anew."""
        self.experts.cancel()
        if self._stream is not None:
            self._stream.cancel()

    def close(self) -> None:
        self.experts.close()
        if self._stream is not None:
            self._stream.close()
        self._ring = self._stream = None
