"""How many leading blocks of a sequence are there, on the device and below it, and how many of those are worth it."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from raytier.kv.block_pool import BlockPool
from raytier.kv.costs import KVCosts
from raytier.kv.lower import LowerTiers
from raytier.kv.tables import Missing


class PrefixFinder:
    """Looks blocks up in the pools of all KV cache groups, and in `lower` where there is something below the device."""

    def __init__(
        self,
        pools: SequenceOf[BlockPool],
        windows: SequenceOf[int | None],
        lower: LowerTiers | None = None,
        costs: KVCosts | None = None,
    ) -> None:
        self._pools = pools
        self._windows = windows
        self._block_size = pools[0].block_size
        self._lower = lower
        self._costs = costs

    def first_block(self, group: int, num_computed: int) -> int:
        """The first block that the token behind `num_computed` ones sees."""
        window = self._windows[group]
        return 0 if window is None else max(0, num_computed - window + 1) // self._block_size

    def longest(self, hashes: SequenceOf[bytes], known: int) -> tuple[int, int]:
        """(leading blocks that a sequence of `known` tokens begins with, further ones that are found and not worth
        loading)."""
        count = self._agreed(hashes, len(hashes), below=False)
        if self._lower is None or (most := self._agreed(hashes, len(hashes), below=True)) <= count:
            return count, 0
        best = self._cheapest(self._lower, hashes, count, most, known)
        return best, most - best

    def sources(self, missing: SequenceOf[Missing]) -> tuple[int, int]:
        """Tokens that come from the host, and from the disk."""
        if self._lower is None or not missing:
            return 0, 0
        on_disk: dict[int, bool] = {}
        for each in missing:
            found = self._lower.find(each.group, each.digest)
            on_disk[each.index] = on_disk.get(each.index, False) or (found is not None and found.on_disk)
        disk = sum(on_disk.values())
        return (len(on_disk) - disk) * self._block_size, disk * self._block_size

    def _agreed(self, hashes: SequenceOf[bytes], most: int, *, below: bool) -> int:
        """The largest number of blocks, at most `most`, that all groups have as far as the next token sees them; with
        what is below the device, or without."""
        while True:  # it shrinks until all agree
            agreed = most
            for group in range(len(self._pools)):
                most = self._hit(group, hashes, most, below)
            if most == agreed:
                return most

    def _hit(self, group: int, hashes: SequenceOf[bytes], most: int, below: bool) -> int:
        """The largest number of blocks, at most `most`, behind which a token has what it sees in this group."""
        pool, window, lower = self._pools[group], self._windows[group], self._lower if below else None
        if window is None:
            for index in range(most):
                if pool.find(hashes[index]) is None and (lower is None or lower.find(group, hashes[index]) is None):
                    return index
            return most
        last = most  # the end that is tried: what is between it and the loop's index is there
        for index in range(most - 1, -1, -1):
            if index < (last * self._block_size - window + 1) // self._block_size:
                break
            if pool.find(hashes[index]) is None and (lower is None or lower.find(group, hashes[index]) is None):
                last = index
        return last

    def _cheapest(self, lower: LowerTiers, hashes: SequenceOf[bytes], least: int, most: int, known: int) -> int:
        """How many of the leading blocks a sequence of `known` tokens begins with: `least` are on the device, what
        follows is loaded as far as that is faster than to compute it.

        What lies in one tier is loaded as a whole or not at all. Where groups have windows, all is or nothing.
        """
        if (costs := self._costs) is None:
            return most
        nbytes = [0, 0]  # from the host and from the disk, so far
        seconds = {least: costs.compute(known, least * self._block_size)}
        for group in range(len(self._pools)):
            for index in range(self.first_block(group, most * self._block_size), most):
                if self._pools[group].find(hashes[index]) is not None:
                    continue
                found = lower.find(group, hashes[index])
                assert found is not None, "all groups were said to have it"
                if found.on_disk and not nbytes[1] and len(self._pools) == 1 and self._windows[0] is None:
                    seconds[index] = costs.compute(known, index * self._block_size) + costs.load(*nbytes)
                nbytes[found.on_disk] += lower.shape.block_bytes[group]
        seconds[most] = costs.compute(known, most * self._block_size) + costs.load(*nbytes)
        return min(seconds, key=lambda end: (seconds[end], end))
