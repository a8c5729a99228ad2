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
        queries, hits: tokens looked up when sequences began or began again, and those that were found on the device.
        copies: blocks copied because several sequences shared them. forks: sequences that began with another's blocks.
    """

    allocations: int = 0
    failures: int = 0
    queries: int = 0
    hits: int = 0
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
class Collection:
    """What a garbage collection gave up, and how long that took."""

    blocks: int
    seconds: float
