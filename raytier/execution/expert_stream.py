"""Routed experts that lie in files: fetched when the router has chosen them, into memory of their own.

Nothing is read ahead here, so prefetches of the layers can neither wait for this memory nor take it: it is beside the
ring. It is cut into slots of the largest expert; as many of the chosen experts as there are slots are under way
together, in the order in which they compute, and each slot that has been computed with takes the next one.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from raytier.checkpoint.manifest import ModelManifest, Parameter
from raytier.execution.binding import Bindings, members
from raytier.execution.bus import Bus
from raytier.execution.formed import Weight, plain
from raytier.execution.layout import StreamUnit, assemble, build_unit, whole
from raytier.execution.reader import ReaderPool, Urgency
from raytier.execution.stream import StreamStats
from raytier.execution.ticket import ReadTicket
from raytier.planner.plan import FILE_TIERS, Tier
from raytier.tiers.aligned import AlignedBuffer

#: Name of a bank, and the number of an expert in it.
Key = tuple[str, int]

#: After so many experts, what was counted before is worth half: what is chosen often changes with the text.
_AGEING = 1 << 14


@dataclass(frozen=True)
class ExpertPlan:
    """What is fetched for each expert that has streamed parameters, and `slots` of `slot_bytes` for it.

    Attributes:
        ramdisk_bytes: parameter bytes of each unit that come from the ramdisk.
    """

    units: Mapping[Key, StreamUnit] = field(default_factory=dict)
    ramdisk_bytes: Mapping[Key, int] = field(default_factory=dict)
    slots: int = 0
    slot_bytes: int = 0

    @classmethod
    def of(
        cls,
        manifest: ModelManifest,
        tier_of: Mapping[str, Tier],
        planned_bytes: int,
        streamed_tiers: Collection[Tier] = FILE_TIERS,
    ) -> ExpertPlan:
        """For a placement. Where nothing was planned for them, the experts of one token fit."""
        parts = {
            key: streamed
            for key, parameters in parameters_of_experts(manifest).items()
            if (streamed := [p for p in parameters if tier_of[p.name] in streamed_tiers])
        }
        if not parts:
            return cls()
        units = {
            (bank, expert): build_unit(f"expert {expert} of {bank}", [whole(p) for p in streamed], manifest.files)
            for (bank, expert), streamed in parts.items()
        }
        slot_bytes = max(unit.nbytes for unit in units.values())
        per_bank = Counter(bank for bank, _ in units)
        least = max(min(bank.per_token, per_bank[bank.name]) for bank in manifest.experts)
        ramdisk = {
            key: sum(p.nbytes for p in streamed if tier_of[p.name] is Tier.RAMDISK) for key, streamed in parts.items()
        }
        return cls(units, ramdisk, min(len(units), planned_bytes // slot_bytes or least), slot_bytes)

    @property
    def nbytes(self) -> int:
        return self.slots * self.slot_bytes


def parameters_of_experts(manifest: ModelManifest) -> dict[Key, list[Parameter]]:
    """The parameters of every routed expert."""
    found: dict[Key, list[Parameter]] = {}
    for p in manifest.parameters:
        if p.expert is not None:
            found.setdefault((p.expert.bank, p.expert.expert), []).append(p)
    return found


@dataclass(slots=True, eq=False)
class _Slot:
    """Memory for one expert: that of `key`, complete if there is no `ticket`. What is pinned is not given away."""

    view: memoryview
    key: Key | None = None
    ticket: ReadTicket | None = None
    weights: dict[str, Weight] = field(default_factory=dict)
    pinned: bool = False


class ExpertStream:
    """Fetches experts by an `ExpertPlan`. What was fetched stays until its slot is needed, and is then not read again.

    Of the experts in the slots, the one that was chosen least often goes first: a step goes through the layers in a
    circle, so the one that was used longest ago is the one that is needed next.

    Invariants: a key is in one slot at most; at most as many slots are pinned as there are; a slot that is not pinned
    has no ticket. Used by the thread that computes, or while it does not.

    Args:
        stats: totals, shared with the stream of the layers; what is not read again counts as `bytes_found` alone.

    Attributes:
        bytes_ramdisk: of what was fetched, the bytes from the ramdisk.
    """

    def __init__(self, pool: ReaderPool, bus: Bus | None, stats: StreamStats) -> None:
        self._pool = pool
        self._bus = bus
        self._stats = stats
        self._plan = ExpertPlan()
        self._manifest: ModelManifest | None = None
        self._buffer: AlignedBuffer | None = None
        self._slots: list[_Slot] = []
        self._slot_of: dict[Key, _Slot] = {}
        self._chosen: Counter[Key] = Counter()
        self._chosen_since = 0
        self.bytes_ramdisk = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the slots."""
        return self._buffer.nbytes if self._buffer is not None else 0

    def start(self, plan: ExpertPlan, manifest: ModelManifest) -> None:
        """Fetch by `plan` from now on; slots whose expert lies where it lay keep it."""
        before, self._plan, self._manifest = self._plan, plan, manifest
        self.cancel()
        if (before.slots, before.slot_bytes) != (plan.slots, plan.slot_bytes):
            self._resize()
            return
        for key, slot in list(self._slot_of.items()):
            if before.units[key] != plan.units.get(key):
                self._empty(slot)

    def fetch(self, bank: str, experts: Sequence[int]) -> Iterator[tuple[int, dict[str, Weight]]]:
        """Each of `experts` with its streamed parameters by name, views that are valid until the next one is asked for.

        Raises:
            TierError: a read failed; `cancel` makes the stream usable again.
        """
        upcoming = deque((bank, expert) for expert in experts if (bank, expert) in self._plan.units)
        held: dict[Key, _Slot] = {}
        for expert in experts:
            while upcoming and len(held) < len(self._slots):
                key = upcoming.popleft()
                held[key] = self._admit(key)
            slot = held.get((bank, expert))
            if slot is None:
                yield expert, {}
                continue
            self._arrive(slot)
            yield expert, slot.weights
            slot.pinned = False
            del held[bank, expert]

    def cancel(self) -> None:
        """Give up what is under way, and return when no read writes to a slot."""
        for slot in reversed(self._slots):
            slot.pinned = False
            if slot.ticket is not None:
                slot.ticket.cancel()
                self._stats.bytes_read += slot.ticket.bytes_read
                self._empty(slot)

    def close(self) -> None:
        """As `cancel`; all memory is let go of."""
        self.cancel()
        self._plan = ExpertPlan()
        self._resize()

    def check_integrity(self) -> None:
        """AssertionError unless the invariants hold."""
        assert {id(s) for s in self._slot_of.values()} == {id(s) for s in self._slots if s.key is not None}
        assert all(slot.key == key for key, slot in self._slot_of.items())
        assert all(slot.pinned or slot.ticket is None for slot in self._slots)

    def _admit(self, key: Key) -> _Slot:
        """A pinned slot in which the expert is, or will be."""
        self._chosen[key] += 1
        self._chosen_since += 1
        if self._chosen_since >= _AGEING:
            self._chosen = Counter({k: count // 2 for k, count in self._chosen.items() if count > 1})
            self._chosen_since = 0
        unit, slot = self._plan.units[key], self._slot_of.get(key)
        if slot is not None:
            self._stats.bytes_found += unit.wanted_bytes
        else:
            slot = min((s for s in self._slots if not s.pinned), key=self._worth)
            self._empty(slot)
            self._slot_of[key], slot.key = slot, key
            slot.ticket = self._pool.submit(unit.reads, slot.view, Urgency.URGENT)
        slot.pinned = True
        return slot

    def _worth(self, slot: _Slot) -> int:
        return -1 if slot.key is None else self._chosen[slot.key]

    def _arrive(self, slot: _Slot) -> None:
        """Return when the slot's expert is there."""
        if slot.ticket is None:
            return
        assert slot.key is not None and self._manifest is not None
        unit = self._plan.units[slot.key]
        began = time.perf_counter()
        slot.ticket.wait()
        assemble(unit, slot.view)
        self._stats.io_wait_s += time.perf_counter() - began
        self._stats.units += 1
        self._stats.bytes_consumed += unit.wanted_bytes
        self._stats.bytes_read += slot.ticket.bytes_read
        self.bytes_ramdisk += self._plan.ramdisk_bytes[slot.key]
        slot.weights, slot.ticket = members(unit, slot.view, self._manifest), None

    def _empty(self, slot: _Slot) -> None:
        if slot.key is not None:
            del self._slot_of[slot.key]
        slot.key, slot.ticket, slot.weights = None, None, {}

    def _resize(self) -> None:
        if self._buffer is not None and self._bus is not None:
            self._bus.unpin(self._buffer.address)
        self._slots, self._slot_of, self._buffer = [], {}, None
        if self._plan.nbytes:
            self._buffer = AlignedBuffer(self._plan.nbytes)
            if self._bus is not None:
                self._bus.pin_range(self._buffer.address, self._buffer.nbytes)
            size = self._plan.slot_bytes
            self._slots = [_Slot(self._buffer.view[n * size : (n + 1) * size]) for n in range(self._plan.slots)]


class RoutedExperts:
    """Binds what a bank computes with, expert by expert, when the router has chosen them.

    Args:
        host: parameters in host memory by name, which a device with a bus does not compute with in place.
    """

    def __init__(
        self,
        manifest: ModelManifest,
        bindings: Bindings,
        stream: ExpertStream,
        host: Mapping[str, Weight],
        bus: Bus | None,
    ) -> None:
        self._names = {key: [p.name for p in found] for key, found in parameters_of_experts(manifest).items()}
        self._bindings = bindings
        self._stream = stream
        self._host = host
        self._bus = bus
        self._bound: list[str] = []

    def arriving(self, bank: str, experts: Sequence[int]) -> Iterator[int]:
        """Each of `experts`, bound until the next one is asked for; see `ExpertStream.fetch`."""
        for expert, weights in self._stream.fetch(bank, experts):
            if self._bus is not None:
                there = weights | {n: self._host[n] for n in self._names[bank, expert] if n in self._host}
                weights = {**self._bus.upload({name: plain(weight) for name, weight in there.items()})} if there else {}
            for name, weight in weights.items():
                self._bindings.bind(name, weight)
                self._bound.append(name)
            yield expert
            self.unbind()

    def unbind(self) -> None:
        """Let go of the expert that computes."""
        self._bindings.unbind(self._bound)
        self._bound.clear()
