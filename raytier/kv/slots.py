"""Which slot of a tier holds which block, least recently used first. Integers and hashes only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator


class SlotIndex:
    """Slots 0 .. num_slots - 1, each free or with the block of one hash.

    What is *pinned* is being read or written: it is neither given up nor dropped. Every operation is O(1), `put` over
    the pinned blocks that it passes (each goes to the end, so it is passed once).

    Invariants: no slot is free and taken, or taken twice; pins are counted, and of blocks that are there.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._slot: OrderedDict[bytes, int] = OrderedDict()
        self._next = 0  # slots from here on were never used
        self._free: list[int] = []
        self._pins: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._slot)

    def __iter__(self) -> Iterator[bytes]:
        """Hashes, least recently used first."""
        return iter(self._slot)

    @property
    def num_open(self) -> int:
        """Slots that a new block may have."""
        return self.num_slots - len(self._pins)

    @property
    def num_pinned(self) -> int:
        return len(self._pins)

    def find(self, digest: bytes) -> int | None:
        return self._slot.get(digest)

    def touch(self, digest: bytes) -> None:
        """It has been used now."""
        self._slot.move_to_end(digest)

    def put(self, digest: bytes) -> tuple[int, bytes | None] | None:
        """A slot for a block that is not there yet, and the hash of the one that had to go for it; None where all are
        pinned."""
        if digest in self._slot:
            raise ValueError("the block has a slot already")
        evicted = None
        if self._free:
            slot = self._free.pop()
        elif self._next < self.num_slots:
            slot, self._next = self._next, self._next + 1
        elif self.num_open <= 0:
            return None
        else:
            while (oldest := next(iter(self._slot))) in self._pins:
                self._slot.move_to_end(oldest)
            evicted, slot = oldest, self._slot.pop(oldest)
        self._slot[digest] = slot
        return slot, evicted

    def restore(self, entries: Iterable[tuple[int, bytes]]) -> None:
        """Begin with (slot, hash) of blocks that are there, the least recently used first."""
        if self._slot:
            raise ValueError("restored into an index that is in use")
        for slot, digest in entries:
            self._slot[digest] = slot
        taken = set(self._slot.values())
        self._free = [slot for slot in range(self.num_slots - 1, -1, -1) if slot not in taken]
        self._next = self.num_slots

    def pin(self, digest: bytes) -> None:
        self._pins[digest] = self._pins.get(digest, 0) + 1

    def unpin(self, digest: bytes) -> None:
        if self._pins[digest] == 1:
            del self._pins[digest]
        else:
            self._pins[digest] -= 1

    def drop(self, digest: bytes) -> None:
        """Its slot is free."""
        if digest in self._pins:
            raise ValueError("the block is being read or written")
        self._free.append(self._slot.pop(digest))

    def clear(self) -> int:
        """Drop all that is not pinned; returns how many."""
        gone = [digest for digest in self._slot if digest not in self._pins]
        for digest in gone:
            self.drop(digest)
        return len(gone)

    def check_integrity(self) -> None:
        """Assert the invariants of the class.

        Raises:
            AssertionError: the bookkeeping is wrong; the message says where.
        """
        taken = list(self._slot.values())
        if sorted(taken + self._free) != list(range(self._next)):
            raise AssertionError(f"{len(taken)} slots taken, {len(self._free)} free, of {self._next}")
        if self._next > self.num_slots:
            raise AssertionError(f"{self._next} slots of {self.num_slots} were used")
        if lost := [digest.hex() for digest, count in self._pins.items() if digest not in self._slot or count < 1]:
            raise AssertionError(f"pinned, and not there: {lost}")
