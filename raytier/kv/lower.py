"""KV blocks in host memory and on disk: which are there, which go there, and which come back. Pure.

A block that is given up on the device goes to a slot of the host's memory; one that was seen twice (or every one, as
configured) is written from there to the disk. What comes back stays below as well, so that giving it up again costs
nothing. The bytes are moved by the executor: with each step go the orders of its schedule (`take_orders`), and its
result says what became of them (`apply`). Until then the slots concerned are pinned.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from raytier.kv.orders import BlockMove, DiskWrite, KVOrders, KVReport, LowerShape, Moved
from raytier.kv.slots import SlotIndex
from raytier.kv.usage import BelowUse, SlotUse

#: Bytes of writes to the disk that are under way at once, and at least so many blocks.
_WRITE_BYTES, _WRITE_BLOCKS = 32 << 20, 4
#: Hashes of which it is remembered whether they were seen, over the blocks that the lower tiers hold.
_REMEMBERED = 4
#: After a write that failed the disk is left alone for so many steps, twice as many after each further one.
_PAUSE, _LONGEST_PAUSE = 16, 4096


@dataclass(slots=True)
class LowerCounts:
    """Sums over the life of an engine, in blocks.

    Attributes:
        stored: device -> host. loaded: host -> device. disk_loaded: disk -> device. written: host -> disk.
        dropped: given up without a place below. host_evictions, disk_evictions: slots that were taken for others.
        write_failures: blocks that could not be written. lost: loads that failed.
        refused: tokens that were found below and computed again, because that was faster.
        moved: what the executor measured of stores, loads and loads from disk.
    """

    stored: int = 0
    loaded: int = 0
    disk_loaded: int = 0
    written: int = 0
    dropped: int = 0
    host_evictions: int = 0
    disk_evictions: int = 0
    write_failures: int = 0
    lost: int = 0
    refused: int = 0
    store: Moved = field(default_factory=Moved)
    load: Moved = field(default_factory=Moved)
    disk_load: Moved = field(default_factory=Moved)


@dataclass(frozen=True, slots=True)
class Found:
    """Where a block below the device is: a slot in the host's memory, or on disk."""

    slot: int
    on_disk: bool


class LowerTiers:
    """The blocks of all KV cache groups below the device.

    Args:
        shape: slots and block sizes.
        disk_once: whether a block that was seen once goes to the disk.
        restored: per group, (slot, hash) of what the disk holds from before.

    Invariants: a block is found on disk only when it has been written; slots in orders that were not reported on are
    pinned.
    """

    def __init__(
        self, shape: LowerShape, *, disk_once: bool = False, restored: Iterable[Iterable[tuple[int, bytes]]] = ()
    ) -> None:
        groups = range(len(shape.block_bytes))
        self.shape = shape
        self.host = tuple(SlotIndex(shape.host_slots) for _ in groups)
        self.disk = tuple(SlotIndex(shape.disk_slots) for _ in groups)
        for index, entries in zip(self.disk, restored, strict=False):
            index.restore(entries)
        self.counts = LowerCounts()
        self._least = 1 if disk_once else 2
        self._seen: OrderedDict[bytes, int] = OrderedDict()
        self._remembered = max(4096, _REMEMBERED * len(groups) * (shape.host_slots + shape.disk_slots))
        self._to_write: OrderedDict[tuple[int, bytes], None] = OrderedDict()
        self._writing: dict[tuple[int, int], DiskWrite] = {}  # (group, disk slot) -> the write under way
        self._unwritten: set[tuple[int, bytes]] = set()  # has a disk slot that is being written
        self._stores: list[tuple[BlockMove, bytes]] = []  # of the next orders, as the two below
        self._loads: list[tuple[BlockMove, bytes]] = []
        self._disk_loads: list[tuple[BlockMove, bytes]] = []
        self._in_flight: tuple[list[tuple[BlockMove, bytes]], ...] = ([], [], [])
        self._pause = self._paused = 0

    @property
    def has_writes(self) -> bool:
        """Whether blocks wait to be written to the disk, or are being written."""
        return bool(self._writing or (self._to_write and not self._paused))

    def use(self) -> BelowUse:
        counts = self.counts
        return BelowUse(
            self._use(self.host, counts.host_evictions, counts.loaded),
            self._use(self.disk, counts.disk_evictions, counts.disk_loaded),
            counts.dropped,
            counts.write_failures,
            counts.lost,
            counts.refused,
        )

    def _use(self, indices: tuple[SlotIndex, ...], evictions: int, loaded: int) -> SlotUse:
        sizes = self.shape.block_bytes
        return SlotUse(
            sum(index.num_slots for index in indices),
            sum(map(len, indices)),
            evictions,
            sum(index.num_slots * size for index, size in zip(indices, sizes, strict=True)),
            sum(len(index) * size for index, size in zip(indices, sizes, strict=True)),
            loaded,
        )

    def note_seen(self, digest: bytes) -> None:
        """A sequence had the content of this block."""
        seen = self._seen
        count = seen.pop(digest, 0) + 1
        seen[digest] = count
        if len(seen) > self._remembered:
            seen.popitem(last=False)
        if count == self._least:
            for group in range(len(self.host)):
                self._consider(group, digest)

    def _consider(self, group: int, digest: bytes) -> None:
        """Let a block of the host be written to the disk, if it is worth that."""
        if (
            self.disk[group].num_slots
            and self._seen.get(digest, 0) >= self._least
            and self.host[group].find(digest) is not None
            and self.disk[group].find(digest) is None
        ):
            self._to_write[group, digest] = None

    def find(self, group: int, digest: bytes) -> Found | None:
        if (slot := self.host[group].find(digest)) is not None:
            return Found(slot, on_disk=False)
        slot = self.disk[group].find(digest)
        return None if slot is None or (group, digest) in self._unwritten else Found(slot, on_disk=True)

    def evicted(self, group: int, block: int, digest: bytes) -> None:
        """A device block is given up: its content goes to the host if it is not there, and there is a slot."""
        host = self.host[group]
        if host.find(digest) is not None:
            host.touch(digest)
            return
        placed = host.put(digest)
        if placed is None:
            self.counts.dropped += host.num_slots > 0 and self.disk[group].find(digest) is None
            return
        slot, gone = placed
        if gone is not None:
            self.counts.dropped += self._to_write.pop((group, gone), gone) is None
            self.counts.host_evictions += 1
        host.pin(digest)
        self._stores.append((BlockMove(group, block, slot), digest))
        self.counts.stored += 1
        self._consider(group, digest)

    def pin(self, group: int, digest: bytes) -> Found:
        """What was found will be loaded: it stays where it is until `load` and the report on that."""
        found = self.find(group, digest)
        assert found is not None, "nothing happens between finding a block and pinning it"
        index = (self.disk if found.on_disk else self.host)[group]
        index.touch(digest)
        index.pin(digest)
        return found

    def load(self, group: int, digest: bytes, found: Found, block: int) -> None:
        """Order a pinned block to a device block."""
        move = (BlockMove(group, block, found.slot), digest)
        if found.on_disk:
            self._disk_loads.append(move)
            self.counts.disk_loaded += 1
        else:
            self._loads.append(move)
            self.counts.loaded += 1

    def take_orders(self, *, settle: bool = False) -> KVOrders | None:
        """What the next step has to do; None where that is nothing."""
        writes = self._next_writes()
        # A host with hardly a slot to spare would drop what the next step gives up.
        settle = bool(self._writing) and (settle or any(host.num_open < host.num_slots // 4 for host in self.host))
        self._paused = max(0, self._paused - 1)
        self._in_flight = (self._stores, self._loads, self._disk_loads)
        self._stores, self._loads, self._disk_loads = [], [], []
        stores, loads, disk_loads = (tuple(move for move, _ in moves) for moves in self._in_flight)
        if not (stores or loads or disk_loads or writes or settle):
            return None
        return KVOrders(stores, loads, disk_loads, writes, settle)

    def _next_writes(self) -> tuple[DiskWrite, ...]:
        writes = []
        under_way = sum(self.shape.block_bytes[write.group] for write in self._writing.values())
        while self._to_write and not self._paused:
            (group, digest), _ = next(iter(self._to_write.items()))
            nbytes = self.shape.block_bytes[group]
            if under_way + nbytes > _WRITE_BYTES and len(self._writing) >= _WRITE_BLOCKS:
                break
            del self._to_write[group, digest]
            source = self.host[group].find(digest)
            if source is None or self.disk[group].find(digest) is not None:
                continue
            placed = self.disk[group].put(digest)
            if placed is None:
                continue
            self.counts.disk_evictions += placed[1] is not None
            write = DiskWrite(group, source, placed[0], digest)
            self.host[group].pin(digest)
            self.disk[group].pin(digest)
            self._writing[group, write.target] = write
            self._unwritten.add((group, digest))
            under_way += nbytes
            writes.append(write)
        return tuple(writes)

    def apply(self, report: KVReport) -> None:
        """The step with the last orders has ended."""
        stores, loads, disk_loads = self._in_flight
        self._in_flight = ([], [], [])
        for move, digest in (*stores, *loads):
            self.host[move.group].unpin(digest)
        for move, digest in disk_loads:
            self.disk[move.group].unpin(digest)
        for write in report.written:
            self._end(write)
            self.counts.written += 1
        for write in report.failed:
            self._end(write)
            self.disk[write.group].drop(write.digest)
            self.counts.write_failures += 1
        if report.failed:
            self._pause = min(_LONGEST_PAUSE, max(_PAUSE, 2 * self._pause))
            self._paused = self._pause
        elif report.written:
            self._pause = 0
        lost = {(move.group, move.block) for move in report.lost}
        for move, digest in disk_loads:
            index = self.disk[move.group]
            if (move.group, move.block) in lost and index.find(digest) is not None:
                index.drop(digest)
        self.counts.lost += len(lost)
        self.counts.store += report.stored
        self.counts.load += report.loaded
        self.counts.disk_load += report.disk_loaded

    def _end(self, write: DiskWrite) -> None:
        del self._writing[write.group, write.target]
        self._unwritten.discard((write.group, write.digest))
        self.host[write.group].unpin(write.digest)
        self.disk[write.group].unpin(write.digest)

    def clear(self) -> int:
        """Forget everything that is not being moved; returns how many blocks."""
        self._seen.clear()
        self._to_write.clear()
        return sum(index.clear() for index in (*self.host, *self.disk))

    def check_integrity(self) -> None:
        """Assert the invariants, between steps.

        Raises:
            AssertionError: the bookkeeping is wrong; the message says where.
        """
        for index in (*self.host, *self.disk):
            index.check_integrity()
        for group, index in enumerate(self.disk):
            writing = {write.digest for (g, _), write in self._writing.items() if g == group}
            if {digest for g, digest in self._unwritten if g == group} != writing:
                raise AssertionError(f"group {group}: blocks that are being written are not those without content")
            if not any(self._in_flight) and not (self._stores or self._loads or self._disk_loads):
                pinned = index.num_pinned, self.host[group].num_pinned
                if pinned != (len(writing), len(writing)):
                    raise AssertionError(f"group {group}: {pinned} slots pinned for {len(writing)} writes")
