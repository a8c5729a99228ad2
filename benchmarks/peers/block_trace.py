"""What both sides of `block_pool.py` replay: requests, as the hashes of their blocks.

Run by the Python of every environment, so nothing but the standard library.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol


class Pool(Protocol):
    """One system's pool behind the same four verbs; blocks are what the system hands out."""

    def lookup(self, hashes: Sequence[bytes]) -> list[Any]:
        """Blocks of the leading hashes, with a reference added to each."""
        ...

    def allocate(self, count: int) -> list[Any]: ...

    def register(self, blocks: list[Any], hashes: Sequence[bytes], known: int) -> None:
        """Blocks from `known` on are full."""
        ...

    def free(self, blocks: list[Any]) -> None: ...


def requests(count: int, seed: int) -> list[list[bytes]]:
    """Hashes of the blocks of each: 8 to 64 blocks, of which a part is shared with an earlier request."""
    rng = random.Random(seed)
    made: deque[list[bytes]] = deque(maxlen=200)
    out = []
    for _ in range(count):
        length = rng.randint(8, 64)
        shared = rng.choice(made)[: rng.randint(0, length - 1)] if made and rng.random() < 0.5 else []
        hashes = shared + [rng.randbytes(16) for _ in range(length - len(shared))]
        made.append(hashes)
        out.append(hashes)
    return out


def replay(pool: Pool, trace: Sequence[Sequence[bytes]], running: int) -> dict[str, float]:
    """Serve the trace, `running` requests at a time; blocks looked up + allocated + freed, hits, and seconds."""
    live: deque[list[Any]] = deque()
    operations = hits = 0
    began = time.perf_counter()
    for hashes in trace:
        if len(live) == running:
            pool.free(live.popleft())
        blocks = pool.lookup(hashes)
        known = len(blocks)
        hits += known
        blocks = blocks + pool.allocate(len(hashes) - known)
        pool.register(blocks, hashes, known)
        live.append(blocks)
        operations += len(hashes) + (len(hashes) - known) + len(hashes)
    while live:
        pool.free(live.popleft())
    return {"operations": operations, "hits": hits, "seconds": time.perf_counter() - began}


class Handler:
    """What `protocol.answer` calls: a pool of `blocks` blocks per replay."""

    def make(self, blocks: int) -> Pool:
        raise NotImplementedError

    def replay(self, blocks: int, count: int, running: int, seed: int) -> dict[str, float]:
        return replay(self.make(blocks), requests(count, seed), running)
