"""The blocks of one sequence, and what is said about some of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from raytier.kv.block_pool import NULL_BLOCK


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Before the step's tokens are written, the block `target` of a group becomes a copy of `source`."""

    group: int
    source: int
    target: int


@dataclass(slots=True)
class SequenceKV:
    """The blocks of one sequence.

    Invariants: there are no tables, or all cover the tokens with KV; what a group's window has passed is the null
    block; a block is written to only while it is this sequence's alone and nobody can find it (`KVCache.grow`).

    Attributes:
        root: parent of the first block's hash.
        tables: block ids, one table per group.
        hashes: of the leading full blocks, as far as they were needed.
        registered: leading blocks that may be found by their hashes.
        passed: per group, leading blocks that the window has passed.
        era: that of the cache (`KVCache.clear`) when the sequence got its first blocks.
    """

    seq_id: int
    root: bytes = b""
    tables: list[list[int]] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    registered: int = 0
    passed: list[int] = field(default_factory=list)
    era: int = 0

    @property
    def num_blocks(self) -> int:
        """Blocks that it refers to, over all groups."""
        return sum(len(table) - table.count(NULL_BLOCK) for table in self.tables)

    def chunk_tables(self) -> tuple[tuple[int, ...], ...]:
        return tuple(map(tuple, self.tables))


@dataclass(frozen=True, slots=True)
class Prefix:
    """Tokens whose KV is there: `tables` begin a sequence's own, `idle` says how many of their blocks are free now.

    `forked`: they are another sequence's, the last block perhaps not full.
    """

    num_tokens: int
    tables: tuple[tuple[int, ...], ...]
    idle: tuple[int, ...]
    forked: bool = False
