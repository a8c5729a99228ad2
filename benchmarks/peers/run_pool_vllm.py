"""vLLM's block pool under `block_trace`."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from block_trace import Handler, Pool
from protocol import answer
from vllm.v1.core.block_pool import BlockPool


class VLLMPool:
    def __init__(self, blocks: int) -> None:
        self._pool = BlockPool(blocks, enable_caching=True, hash_block_size=16)

    def lookup(self, hashes: Sequence[bytes]) -> list[Any]:
        """As its `FullAttentionManager.find_longest_cache_hit`."""
        found = []
        for block_hash in hashes:
            if not (cached := self._pool.get_cached_block(block_hash, [0])):
                break
            found.append(cached[0])
        self._pool.touch(found)
        return found

    def allocate(self, count: int) -> list[Any]:
        return self._pool.get_new_blocks(count)

    def register(self, blocks: list[Any], hashes: Sequence[bytes], known: int) -> None:
        request = SimpleNamespace(block_hashes=hashes)
        self._pool.cache_full_blocks(request, blocks, known, len(hashes), 16, 0)

    def free(self, blocks: list[Any]) -> None:
        self._pool.free_blocks(reversed(blocks))


class VLLMHandler(Handler):
    def make(self, blocks: int) -> Pool:
        return VLLMPool(blocks)


if __name__ == "__main__":
    answer(VLLMHandler())
