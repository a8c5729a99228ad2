"""What the executor does with KV blocks below the device, and what became of it. Plain picklable data.

A *slot* of a tier holds one block of a KV cache group: slots are numbered per group, in the host's memory and in the
disk tier's files alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class BlockMove:
    """A device block of a group, and a slot of a lower tier."""

    group: int
    block: int
    slot: int


@dataclass(frozen=True, slots=True)
class DiskWrite:
    """The host slot `source` is written to the slot `target` of the disk, where it is found as `digest`."""

    group: int
    source: int
    target: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class KVOrders:
    """What comes with a step, in this order, and before any of its tokens are written or seen.

    Attributes:
        stores: device -> host. loads: host -> device, after all stores. disk_loads: disk -> device, likewise.
        writes: host -> disk, behind the steps; the host slots stay as they are until the report.
        settle: the step ends when all writes have ended, those of earlier steps included.
    """

    stores: tuple[BlockMove, ...] = ()
    loads: tuple[BlockMove, ...] = ()
    disk_loads: tuple[BlockMove, ...] = ()
    writes: tuple[DiskWrite, ...] = ()
    settle: bool = False


@dataclass(frozen=True, slots=True)
class Moved:
    """Blocks that moved from one tier to another, their bytes, and the seconds that took."""

    blocks: int = 0
    nbytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.blocks + other.blocks, self.nbytes + other.nbytes, self.seconds + other.seconds)


@dataclass(frozen=True, slots=True)
class KVReport:
    """What became of orders.

    Attributes:
        written, failed: writes that have ended since the last report. why: of the last one that failed.
        lost: loads of this step whose bytes could not be had: what was computed on them is worthless.
        stored, loaded, disk_loaded: what this step moved.
    """

    written: tuple[DiskWrite, ...] = ()
    failed: tuple[DiskWrite, ...] = ()
    why: str | None = None
    lost: tuple[BlockMove, ...] = ()
    stored: Moved = field(default_factory=Moved)
    loaded: Moved = field(default_factory=Moved)
    disk_loaded: Moved = field(default_factory=Moved)


@dataclass(frozen=True, slots=True)
class LowerShape:
    """Where KV goes below the device, as planned. No tier: no slots.

    Attributes:
        block_bytes: of a block, per KV cache group.
        host_slots, disk_slots: per group.
        directories: of the disk tier's files. name: of these files, from what their content depends on.
        persist: the files are kept, and found again by the next process.
    """

    block_bytes: tuple[int, ...]
    host_slots: int = 0
    disk_slots: int = 0
    directories: tuple[str, ...] = ()
    name: str = ""
    persist: bool = False
