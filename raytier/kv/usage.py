"""How much of the KV is in use, and what happened to it: plain figures."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Pressure(StrEnum):
    """How much of the KV is free: `low` is good news."""

    LOW = "low"
    HIGH = "high"
    CRITICAL = "critical"


@dataclass(slots=True)
class CacheCounts:
    """Sums over the life of an engine.

    Attributes:
        allocations: blocks handed out. failures: times there were none.
        queries, hits: tokens looked up when sequences began or began again, and those that were found, on any tier.
        host_hits, disk_hits: of these, tokens that had to be loaded from there.
        copies: blocks copied because several sequences shared them. forks: sequences that began with another's blocks.
    """

    allocations: int = 0
    failures: int = 0
    queries: int = 0
    hits: int = 0
    host_hits: int = 0
    disk_hits: int = 0
    copies: int = 0
    forks: int = 0


@dataclass(frozen=True, slots=True)
class GroupUse:
    """Blocks of a KV cache group now: all, those that sequences use, and the free ones that are found by what they
    hold. `window`: of its layers, in tokens; None = full attention."""

    window: int | None
    num_blocks: int
    used: int
    cached: int


@dataclass(frozen=True, slots=True)
class SlotUse:
    """Slots of a tier below the device over all groups: all, those with a block, and how many blocks went for others;
    bytes of the first two; blocks that came to the device from there."""

    slots: int
    cached: int
    evictions: int
    nbytes: int
    cached_bytes: int
    loaded: int


@dataclass(frozen=True, slots=True)
class BelowUse:
    """What is below the device, and what went wrong there, in blocks.

    Attributes:
        dropped: given up although they were worth keeping. write_failures: could not be written to the disk.
        lost: could not be loaded. refused: tokens that were found and computed again, because that was faster.
    """

    host: SlotUse
    disk: SlotUse
    dropped: int
    write_failures: int
    lost: int
    refused: int


@dataclass(frozen=True, slots=True)
class Collection:
    """What a garbage collection gave up, and how long that took."""

    blocks: int
    seconds: float
