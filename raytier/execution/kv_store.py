"""KV tensors of one device: layer-first, head-major over the whole pool.

Keys of a layer are one tensor `[num_kv_heads, num_blocks * block_size, key_dim]`, values likewise, so
that the tokens of a run of consecutive blocks are a view that attention reads without a copy. A token
lives in slot `block * block_size + offset`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytier.checkpoint.manifest import KVLayerSpec, kv_windows
from raytier.kv.tables import BlockCopy


def slot_runs(block_table: tuple[int, ...], block_size: int, start: int, stop: int) -> list[tuple[int, int]]:
    """Slots of tokens start..stop-1 as (first slot, count) runs, consecutive blocks merged.

    Raises:
        IndexError: the table does not cover `stop` tokens.
    """
    if stop > len(block_table) * block_size:
        raise IndexError(f"{stop} tokens need more than the {len(block_table)} blocks of {block_size} in the table")
    if start >= stop:
        return []
    first, last = start // block_size, (stop - 1) // block_size
    if block_table[first : last + 1] == tuple(range(block_table[first], block_table[first] + last - first + 1)):
        return [(block_table[first] * block_size + start % block_size, stop - start)]  # nearly always, and cheap
    runs: list[tuple[int, int]] = []
    position = start
    while position < stop:
        index, offset = divmod(position, block_size)
        slot = block_table[index] * block_size + offset
        count = min(block_size - offset, stop - position)
        if runs and runs[-1][0] + runs[-1][1] == slot:
            runs[-1] = (runs[-1][0], runs[-1][1] + count)
        else:
            runs.append((slot, count))
        position += count
    return runs


@dataclass(frozen=True, slots=True)
class RunBatch:
    """Runs of `length` slots, the first slot of each `stride` behind that of the one before: all in one strided view.

    `members` are the indices of the runs, in the order of the view.
    """

    members: tuple[int, ...]
    first: int
    stride: int
    length: int


def batch_runs(runs: Sequence[tuple[int, int]]) -> list[RunBatch]:
    """Put runs of equal length and spacing into as few batches as a search from the lowest slot upwards finds.

    Two runs of equal length always make one. Many do when sequences are admitted together, since the block pool
    spreads them evenly, and when a sliding window makes them equally long.
    """
    by_length: dict[int, list[tuple[int, int]]] = {}
    for index, (first, count) in enumerate(runs):
        by_length.setdefault(count, []).append((first, index))
    batches = []
    for length, same in by_length.items():
        same.sort()
        start = 0
        while start < len(same):
            stop = start + 1
            stride = same[stop][0] - same[start][0] if stop < len(same) else 0
            while stop < len(same) and same[stop][0] - same[stop - 1][0] == stride:
                stop += 1
            batches.append(RunBatch(tuple(index for _, index in same[start:stop]), same[start][0], stride, length))
            start = stop
    return batches


class KVStore:
    """Keys and values of all layers, for `num_blocks` blocks in every KV cache group.

    A block of a group lies in the layers of that group alone (`group_of`, by layer).

    The memory is reserved, not touched: pages cost nothing until a token is written to them.

    Attributes:
        windows: per layer, tokens that a query sees, itself included; 0: all.
    """

    def __init__(
        self, layers: Sequence[KVLayerSpec], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.dtype = dtype
        windows = kv_windows(layers)
        self.group_of = tuple(windows.index(layer.sliding_window) for layer in layers)
        self.num_groups = len(windows)
        self.windows = [s.sliding_window or 0 for s in layers]
        slots = num_blocks * block_size
        self.keys = [torch.empty(s.num_kv_heads, slots, s.key_dim, dtype=dtype, device=device) for s in layers]
        self.values = [torch.empty(s.num_kv_heads, slots, s.value_dim, dtype=dtype, device=device) for s in layers]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store new tokens. slots `[T]` int64, keys `[num_kv_heads, T, key_dim]`, values `[.., T, value_dim]`."""
        self.keys[layer].index_copy_(1, slots, keys)
        self.values[layer].index_copy_(1, slots, values)

    def read(self, layer: int, runs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Keys and values `[num_kv_heads, tokens, dim]` of `runs`: views when there is one run, else copies."""
        keys, values = self.keys[layer], self.values[layer]
        if len(runs) == 1:
            first, count = runs[0]
            return keys[:, first : first + count], values[:, first : first + count]
        return (
            torch.cat([keys[:, first : first + count] for first, count in runs], dim=1),
            torch.cat([values[:, first : first + count] for first, count in runs], dim=1),
        )

    def read_batch(self, layer: int, batch: RunBatch) -> tuple[Tensor, Tensor]:
        """Keys and values `[runs, num_kv_heads, length, dim]` of a batch of runs: always views."""
        return _strided(self.keys[layer], batch), _strided(self.values[layer], batch)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks; every source is read before any target is written."""
        for group in {copy.group for copy in copies}:
            pairs = [(copy.source, copy.target) for copy in copies if copy.group == group]
            sources, targets = torch.tensor(pairs, device=self.keys[0].device).unbind(1)
            for layer, owner in enumerate(self.group_of):
                if owner == group:
                    for pool in (self.keys[layer], self.values[layer]):
                        blocks = pool.view(pool.shape[0], self.num_blocks, -1)
                        blocks.index_copy_(1, targets, blocks.index_select(1, sources))

    def read_tokens(self, layer: int, block_table: tuple[int, ...], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Copies of keys and values of tokens start..stop-1 of a sequence, exact across scattered blocks (F9)."""
        keys, values = self.read(layer, slot_runs(block_table, self.block_size, start, stop))
        return keys.clone(), values.clone()

    def write_tokens(self, layer: int, block_table: tuple[int, ...], start: int, keys: Tensor, values: Tensor) -> None:
        """Overwrite tokens start.. of a sequence with `keys`, `values` `[num_kv_heads, tokens, dim]` (F9)."""
        stop = start + keys.shape[1]
        position = 0
        for first, count in slot_runs(block_table, self.block_size, start, stop):
            self.keys[layer][:, first : first + count] = keys[:, position : position + count]
            self.values[layer][:, first : first + count] = values[:, position : position + count]
            position += count


def _strided(pool: Tensor, batch: RunBatch) -> Tensor:
    heads, slots, dim = pool.shape
    shape = (len(batch.members), heads, batch.length, dim)
    return pool.as_strided(shape, (batch.stride * dim, slots * dim, dim, 1), batch.first * dim)
