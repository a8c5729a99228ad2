"""raytier's block pool under `block_trace`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from block_trace import Handler, Pool
from protocol import answer

from raytier.kv.block_pool import BlockPool


class RaytierPool:
    def __init__(self, blocks: int) -> None:
        self._pool = BlockPool(16)
        self._pool.add_extent(1, blocks - 1)

    def lookup(self, hashes: Sequence[bytes]) -> list[Any]:
        found = self._pool.find_prefix(hashes)
        self._pool.share(found)
        return found

    def allocate(self, count: int) -> list[Any]:
        return self._pool.allocate(count)

    def register(self, blocks: list[Any], hashes: Sequence[bytes], known: int) -> None:
        for index in range(known, len(hashes)):
            self._pool.register(blocks[index], hashes[index])

    def free(self, blocks: list[Any]) -> None:
        self._pool.free(blocks)


class RaytierHandler(Handler):
    def make(self, blocks: int) -> Pool:
        return RaytierPool(blocks)


if __name__ == "__main__":
    answer(RaytierHandler())
