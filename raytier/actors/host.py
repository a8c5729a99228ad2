"""HostPoolActor: the RAM pool of a node, one memfd that its peers map."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytier.actors.device import ArenaGrant
from raytier.config import MIB
from raytier.errors import ResourceNotAvailableError
from raytier.tiers.aligned import align_up
from raytier.tiers.arena import Arena, RangeAllocator


@dataclass(frozen=True, slots=True)
class HostStatus:
    """Sizes in bytes.

    Attributes:
        capacity: the budget of the pool.
        free: granted to nobody; copies of sleeping models do not count as free, though they give way.
        largest_free: of one range: a larger parameter cannot be granted room now.
        touched: taken from the system; a grant takes pages only as its range is filled.
        owners: model -> bytes granted to its parameters, copies included.
        ranges: number of grants.
        kept: model -> bytes of these that are copies, which give way to other grants.
    """

    name: str
    pid: int
    capacity: int
    free: int
    largest_free: int
    touched: int
    owners: dict[str, int]
    ranges: int
    kept: dict[str, int]


class HostPoolActor:
    """Owns the arena and says which parameter may use which range; never reads or writes a byte of it.

    The arena has the size of the node's host budget and takes memory only as it is filled. It is anonymous
    (memfd): when the node's processes end, however they end, it is gone.

    A grant is held by a model that is awake, or it is a copy that is kept for when the model is needed again: copies
    give way to grants, those that were used longest ago first, unless they are pinned because somebody reads them.

    Invariant: what is kept is a part of what is granted.
    """

    def __init__(self, name: str, capacity: int) -> None:
        """`capacity` in bytes; 0 is a pool that refuses everything.

        Raises:
            TierError: the kernel refuses an arena of that size.
        """
        self._name = name
        self._allocator = RangeAllocator(capacity)
        self._capacity = self._allocator.capacity
        self._arena = Arena.create("raytier-host", self._capacity) if self._capacity else None
        self._grants: dict[str, dict[str, ArenaGrant]] = {}  # model -> parameter -> grant
        self._kept: dict[str, set[str]] = {}  # model -> parameters; the one used last comes last
        self._pinned: set[str] = set()

    def __repr__(self) -> str:
        return f"HostPoolActor({self._capacity / MIB:.0f} MiB)"

    def reserve(self, model_id: str, sizes: Mapping[str, int]) -> dict[str, ArenaGrant]:
        """Grant every parameter of `sizes` (name -> bytes) a range of its own: all of them, or none.

        A parameter whose copy is kept gets the range of that, with its bytes.

        Raises:
            ResourceNotAvailableError: there is no room; says how much is needed, free, and in one piece.
            ValueError: a parameter has a range already, or wants no bytes.
        """
        copies = self._kept.get(model_id, set())
        ours = {name: self._grants[model_id][name] for name in sizes if name in copies}
        if small := [name for name, grant in ours.items() if grant.nbytes < sizes[name]]:  # kept in another form
            self.free(model_id, small)
            ours = {name: grant for name, grant in ours.items() if name not in small}
        granted = self._reserve(model_id, {name: nbytes for name, nbytes in sizes.items() if name not in ours})
        copies.difference_update(ours)
        return {name: (ours | granted)[name] for name in sizes}

    def keep(self, model_id: str, sizes: Mapping[str, int]) -> dict[str, ArenaGrant]:
        """Ranges for copies of parameters, in the order of `sizes`: as many as there is room for.

        Copies of other models that were used longer ago give way; what is held does not. A parameter that has a range
        keeps it, and it is a copy from now on.
        """
        held = self._grants.get(model_id, {})
        kept = self._kept.pop(model_id, set())
        self._kept[model_id] = kept  # the one used last
        grants: dict[str, ArenaGrant] = {}
        for name, nbytes in sizes.items():
            if name not in held:
                try:
                    self._reserve(model_id, {name: nbytes})
                except ResourceNotAvailableError:
                    continue
                held = self._grants[model_id]
            kept.add(name)
            grants[name] = held[name]
        if not kept:
            del self._kept[model_id]
        return grants

    def kept(self, model_id: str) -> dict[str, ArenaGrant]:
        """The copies of a model, which stay until `unpin`."""
        self._pinned.add(model_id)
        return {name: self._grants[model_id][name] for name in self._kept.get(model_id, ())}

    def unpin(self, model_id: str) -> None:
        """Nobody reads the copies of this model any more: they may give way."""
        self._pinned.discard(model_id)

    def _reserve(self, model_id: str, sizes: Mapping[str, int]) -> dict[str, ArenaGrant]:
        held = self._grants.get(model_id, {})
        if double := [name for name in sizes if name in held]:
            raise ValueError(f"{model_id}: {double[0]} has a range of the host pool already; free it first")
        if empty := [name for name, nbytes in sizes.items() if nbytes <= 0]:
            raise ValueError(f"{model_id}: {empty[0]} wants {sizes[empty[0]]} bytes of the host pool")
        if self._arena is None and sizes:
            raise ResourceNotAvailableError(
                f"{model_id}: {sum(sizes.values())} bytes are wanted of a host pool of {self._capacity}; "
                "raise tiers.host.max_mb"
            )
        placed: dict[str, int] = {}
        try:
            # The largest first: what is small finds room in what they leave.
            for name in sorted(sizes, key=lambda name: -sizes[name]):
                placed[name] = self._allocate(model_id, name, sizes[name])
        except ResourceNotAvailableError:
            for name in placed:
                self._allocator.free(_owner(model_id, name))
            needed = sum(align_up(nbytes) for nbytes in sizes.values())
            raise ResourceNotAvailableError(
                f"no room in the host pool for {len(sizes)} parameters of {model_id}: they need {needed} bytes, the "
                f"largest of them {align_up(max(sizes.values()))}; {self._allocator.free_bytes} of {self._capacity} "
                f"are free, {self._allocator.largest_free} of them in one piece. Move or unload something, or raise "
                "tiers.host.max_mb"
            ) from None
        if not placed:
            return {}
        assert self._arena is not None
        handle = self._arena.handle
        grants = {name: ArenaGrant(handle, placed[name], nbytes) for name, nbytes in sizes.items()}
        self._grants.setdefault(model_id, {}).update(grants)
        return grants

    def _allocate(self, model_id: str, name: str, nbytes: int) -> int:
        """Room for one parameter; copies of other models give way to it."""
        while True:
            try:
                return self._allocator.allocate(_owner(model_id, name), nbytes)
            except ResourceNotAvailableError:
                oldest = next((each for each in self._kept if each != model_id and each not in self._pinned), None)
                if oldest is None or align_up(nbytes) > self._capacity:
                    raise
                copies = self._kept[oldest]
                self.free(oldest, [max(copies, key=lambda copy: self._grants[oldest][copy].nbytes)])

    def free(self, model_id: str, names: Sequence[str] | None = None) -> int:
        """Take back the ranges of these parameters (None: all of the model) and give their pages to the system.

        Nobody may use them any more. A name without a range is passed over. Returns the bytes granted until now.
        """
        held = self._grants.get(model_id, {})
        freed = 0
        for name in list(held) if names is None else names:
            if name not in held:
                continue
            assert self._arena is not None
            self._arena.release(*self._allocator.range_of(_owner(model_id, name)))
            self._allocator.free(_owner(model_id, name))
            freed += held.pop(name).nbytes
            if (copies := self._kept.get(model_id)) is not None:
                copies.discard(name)
        if not held:
            self._grants.pop(model_id, None)
        if not self._kept.get(model_id):
            self._kept.pop(model_id, None)
        return freed

    def ping(self) -> str:
        return self._name

    def status(self) -> HostStatus:
        self._allocator.check_integrity()
        return HostStatus(
            name=self._name,
            pid=os.getpid(),
            capacity=self._capacity,
            free=self._allocator.free_bytes,
            largest_free=self._allocator.largest_free,
            touched=0 if self._arena is None else self._arena.touched_bytes,
            owners={model: sum(g.nbytes for g in grants.values()) for model, grants in self._grants.items()},
            ranges=sum(len(grants) for grants in self._grants.values()),
            kept={
                model: sum(self._grants[model][name].nbytes for name in names) for model, names in self._kept.items()
            },
        )


def _owner(model_id: str, name: str) -> str:
    """Owner of a range; quoted, so that no two pairs are the same."""
    return f"{model_id!r} {name!r}"
