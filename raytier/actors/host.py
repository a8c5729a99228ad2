"""HostPoolActor: the RAM pool of a node, one memfd that its peers map."""

from __future__ import annotations

import os
from dataclasses import dataclass

from raytier.actors.device import ArenaGrant
from raytier.errors import ResourceNotAvailableError
from raytier.tiers.arena import Arena, RangeAllocator


@dataclass(frozen=True, slots=True)
class HostStatus:
    """Sizes in bytes; `owners` maps who holds ranges to how much."""

    name: str
    pid: int
    capacity: int
    free: int
    owners: dict[str, int]


class HostPoolActor:
    """Owns the arena and says who may use which range; never reads or writes a byte of it.

    The arena is anonymous (memfd): when the node's processes end, however they end, it is gone.
    """

    def __init__(self, name: str, capacity: int) -> None:
        self._name = name
        self._capacity = capacity
        self._arena = Arena.create("raytier-host", capacity) if capacity else None
        self._allocator = RangeAllocator(capacity)
        self._owners: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"HostPoolActor({self._capacity / 2**20:.0f} MiB)"

    def allocate(self, owner: str, nbytes: int) -> ArenaGrant:
        """Grant `owner` a range; ResourceNotAvailableError with the numbers when there is none."""
        if self._arena is None:
            raise ResourceNotAvailableError(
                f"{owner} wants {nbytes} bytes of a host pool of 0; raise tiers.host.max_mb"
            )
        offset = self._allocator.allocate(owner, nbytes)
        self._owners[owner] = nbytes
        return ArenaGrant(self._arena.handle, offset, nbytes)

    def ping(self) -> str:
        return self._name

    def status(self) -> HostStatus:
        self._allocator.check_integrity()
        return HostStatus(self._name, os.getpid(), self._capacity, self._allocator.free_bytes, dict(self._owners))
