"""Which KV blocks are free. Integers only: a block is an id, its bytes live in the device's KV store.

Attention reads consecutive blocks of a sequence as one view, so the pool keeps free blocks as maximal
*runs* of consecutive ids and hands them out so that sequences stay contiguous while they grow:

- a sequence grows into the block behind its last one whenever that one is free;
- a new sequence starts in the largest free run, in its middle when the run begins behind a block in use,
  so that the neighbour in front keeps half of the gap for its own growth.

Block 0 is the null block: never handed out. Not thread-safe; its owner serialises the calls.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

from raytier.errors import ResourceNotAvailableError

#: Placeholder id that no sequence ever owns.
NULL_BLOCK = 0


class BlockPool:
    """Allocates blocks of `block_size` tokens. A block costs O(1), a run of blocks O(log runs).

    Invariants: free and used blocks are disjoint and together are exactly the blocks of all extents;
    `_length` and `_start` describe the same runs; no two free runs touch.
    """

    def __init__(self, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1 token, got {block_size}")
        self.block_size = block_size
        self._extents: list[tuple[int, int]] = []
        self._length: dict[int, int] = {}  # first block of a free run -> blocks in it
        self._start: dict[int, int] = {}  # last block of a free run -> its first block
        self._by_length: list[tuple[int, int]] = []  # heap of (-length, first); stale entries are skipped
        self._used: set[int] = set()
        self._num_blocks = 0

    @property
    def num_blocks(self) -> int:
        """All blocks of the pool, free and used."""
        return self._num_blocks

    @property
    def num_used(self) -> int:
        return len(self._used)

    @property
    def num_free(self) -> int:
        return self._num_blocks - len(self._used)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def add_extent(self, start: int, count: int) -> None:
        """Add the blocks start .. start + count - 1 (a lease) to the pool.

        Raises:
            ValueError: the extent is empty, contains the null block or overlaps one that was added before.
        """
        if start <= NULL_BLOCK or count < 1:
            raise ValueError(f"an extent starts at block 1 or later and is not empty, got start {start} count {count}")
        for other, length in self._extents:
            if start < other + length and other < start + count:
                raise ValueError(f"extent {start}+{count} overlaps {other}+{length}")
        self._extents.append((start, count))
        self._num_blocks += count
        self._put(start, count)

    def can_allocate(self, n: int) -> bool:
        return n <= self.num_free

    def allocate(self, n: int) -> list[int]:
        """Take `n` blocks for a new sequence, in as few runs as possible.

        Raises:
            ResourceNotAvailableError: fewer than `n` blocks are free; nothing was taken.
        """
        return self.extend([], n)

    def extend(self, table: list[int], n: int) -> list[int]:
        """Append `n` blocks to a sequence's block table and return them, the ones behind its last block first.

        Raises:
            ResourceNotAvailableError: fewer than `n` blocks are free; nothing was taken, `table` is unchanged.
        """
        if n < 0:
            raise ValueError(f"cannot allocate {n} blocks")
        if n > self.num_free:
            raise ResourceNotAvailableError(
                f"KV block pool: {n} blocks wanted, {self.num_free} of {self.num_blocks} free"
            )
        taken: list[int] = []
        if table and n and (behind := self._length.get(table[-1] + 1)):
            taken += self._take(table[-1] + 1, table[-1] + 1, min(n, behind))
        while len(taken) < n:
            run, length = self._largest_run()
            count = min(n - len(taken), length)
            gap = (length - count) // 2 if run - 1 in self._used else 0
            taken += self._take(run, run + gap, count)
        table += taken
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        """Give blocks back.

        Raises:
            ValueError: a block is not in use (freed twice, or never of this pool); nothing was freed.
        """
        wrong = [b for b in blocks if b not in self._used]
        if wrong or len(set(blocks)) != len(blocks):
            raise ValueError(f"blocks {wrong or list(blocks)} are freed but not in use, or named twice")
        self._used.difference_update(blocks)
        position = 0
        while position < len(blocks):
            end = position + 1
            while end < len(blocks) and blocks[end] == blocks[end - 1] + 1:
                end += 1
            self._put(blocks[position], end - position)
            position = end

    def _put(self, first: int, length: int) -> None:
        """Make blocks first .. first + length - 1 free, merged with the free runs they touch."""
        before = self._start.pop(first - 1, None)
        if before is not None:
            length += self._length.pop(before)
            first = before
        behind = self._length.pop(first + length, None)
        if behind is not None:
            length += behind  # its `_start` entry is overwritten: the merged run has the same last block
        self._insert(first, length)

    def _insert(self, first: int, length: int) -> None:
        self._length[first] = length
        self._start[first + length - 1] = first
        heapq.heappush(self._by_length, (-length, first))
        # Growth in place makes entries stale without ever looking at the heap.
        if len(self._by_length) > 64 + 4 * len(self._length):
            self._by_length = [(-n, start) for start, n in self._length.items()]
            heapq.heapify(self._by_length)

    def _take(self, run: int, first: int, count: int) -> range:
        """Take blocks first .. first + count - 1 out of the free run that starts at `run`."""
        end = run + self._length.pop(run)
        del self._start[end - 1]
        if first > run:
            self._insert(run, first - run)
        if first + count < end:
            self._insert(first + count, end - first - count)
        taken = range(first, first + count)
        self._used.update(taken)
        return taken

    def _largest_run(self) -> tuple[int, int]:
        """(first, length) of the longest free run, the lowest one among equals."""
        while True:
            length, first = self._by_length[0]
            if self._length.get(first) == -length:
                return first, -length
            heapq.heappop(self._by_length)

    def check_integrity(self) -> None:
        """Assert the invariants of the class; O(blocks in use + runs).

        Raises:
            AssertionError: the bookkeeping is wrong; the message says where.
        """
        runs = sorted(self._length.items())
        used = [(block, 1) for block in self._used]
        free = sum(length for _, length in runs)
        if free != self.num_free:
            raise AssertionError(f"{free} blocks in free runs, {self.num_free} expected")
        if {first + length - 1: first for first, length in runs} != self._start:
            raise AssertionError("free runs by first and by last block differ")
        for (first, length), (following, _) in pairwise(runs):
            if first + length >= following:
                raise AssertionError(f"free runs {first}+{length} and {following} overlap or touch")
        for (first, length), (following, _) in pairwise(sorted(runs + used)):
            if first + length > following:
                raise AssertionError(f"block {following} is both free and used")
        owned = sorted(self._extents)
        for first, length in runs + used:
            if not _covered(owned, first, length):
                raise AssertionError(f"blocks {first}+{length} are not of this pool")


def _covered(extents: list[tuple[int, int]], first: int, length: int) -> bool:
    """Whether the sorted disjoint `extents` hold all of first .. first + length - 1."""
    position = first
    for start, count in extents:
        if start <= position < start + count:
            position = start + count
    return position >= first + length
