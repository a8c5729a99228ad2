"""F9: reading and writing KV is exact across scattered blocks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytier.checkpoint.manifest import KVLayerSpec
from raytier.execution.kv_store import KVStore, batch_runs, slot_runs

LAYERS = (KVLayerSpec(2, 8, 8), KVLayerSpec(1, 8, 4))


def make_store(num_blocks: int = 12, block_size: int = 4) -> KVStore:
    return KVStore(LAYERS, num_blocks, block_size, torch.float32, torch.device("cpu"))


@given(st.permutations(range(1, 12)), st.integers(0, 43), st.integers(1, 44))
def test_runs_name_every_token_once(order: list[int], start: int, length: int) -> None:
    table, stop = tuple(order), min(start + length, 44)
    runs = slot_runs(table, 4, start, stop)
    slots = [slot for first, count in runs for slot in range(first, first + count)]
    assert slots == [table[t // 4] * 4 + t % 4 for t in range(start, stop)]
    assert all(a[0] + a[1] != b[0] for a, b in pairwise(runs)), "neighbouring runs must be merged"


def test_consecutive_blocks_are_one_view() -> None:
    store = make_store()
    runs = slot_runs((3, 4, 5), 4, 1, 11)
    keys, values = store.read(0, runs)
    assert len(runs) == 1
    assert keys.data_ptr() == store.keys[0][:, 13].data_ptr() and keys.shape == (2, 10, 8)
    assert values.untyped_storage().data_ptr() == store.values[0].untyped_storage().data_ptr()


@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 60))
def test_consecutive_blocks_are_one_run(first: int, start: int, length: int) -> None:
    runs = slot_runs(tuple(range(first, first + 30)), 4, start, start + length)
    assert runs == ([(first * 4 + start, length)] if length else [])


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 3)), max_size=30))
def test_batches_hold_every_run_once(runs: list[tuple[int, int]]) -> None:
    """Also runs that overlap, as those of sequences with a shared prefix do."""
    batches = batch_runs(runs)
    held = [
        (member, (batch.first + place * batch.stride, batch.length))
        for batch in batches
        for place, member in enumerate(batch.members)
    ]
    assert sorted(held) == list(enumerate(runs))
    lengths = [length for _, length in runs]
    assert all(sum(len(b.members) == 1 for b in batches if b.length == length) <= 1 for length in lengths), (
        "two runs of equal length always go together"
    )


def test_evenly_spaced_runs_are_one_batch() -> None:
    (batch,) = batch_runs([(40, 5), (8, 5), (24, 5), (56, 5)])
    assert (batch.members, batch.first, batch.stride, batch.length) == ((1, 2, 0, 3), 8, 16, 5)


def test_a_batch_is_a_view() -> None:
    store = make_store()
    store.keys[0].copy_(torch.arange(2 * 48 * 8).view(2, 48, 8))
    store.values[0].copy_(-store.keys[0])
    (batch,) = batch_runs([(30, 4), (3, 4), (12, 4), (21, 4)])
    keys, values = store.read_batch(0, batch)
    assert keys.untyped_storage().data_ptr() == store.keys[0].untyped_storage().data_ptr()
    for place, first in enumerate((3, 12, 21, 30)):
        assert torch.equal(keys[place], store.keys[0][:, first : first + 4])
        assert torch.equal(values[place], store.values[0][:, first : first + 4])


def test_table_too_short_is_refused() -> None:
    with pytest.raises(IndexError, match="9 tokens need more than the 2 blocks of 4"):
        slot_runs((1, 2), 4, 0, 9)


@settings(max_examples=40)
@given(st.permutations(range(1, 12)), st.integers(0, 30), st.integers(1, 14), st.sampled_from([0, 1]))
def test_written_tokens_are_read_back(blocks: list[int], start: int, length: int, layer: int) -> None:
    order = tuple(blocks)
    store = make_store()
    for tensor in (*store.keys, *store.values):
        tensor.fill_(-1)
    spec = LAYERS[layer]
    keys = torch.randn(spec.num_kv_heads, length, spec.key_dim)
    values = torch.randn(spec.num_kv_heads, length, spec.value_dim)
    store.write_tokens(layer, order, start, keys, values)
    got_keys, got_values = store.read_tokens(layer, order, start, start + length)
    assert torch.equal(got_keys, keys) and torch.equal(got_values, values)
    written = {order[t // 4] * 4 + t % 4 for t in range(start, start + length)}
    others = [slot for slot in range(48) if slot not in written]
    assert (store.keys[layer][:, others] == -1).all() and (store.values[layer][:, others] == -1).all()
    assert (store.keys[1 - layer] == -1).all()


def test_scattered_write_by_slots() -> None:
    store = make_store()
    slots = torch.tensor([40, 3, 17])
    keys, values = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    store.write(0, slots, keys, values)
    assert torch.equal(store.keys[0][:, slots], keys) and torch.equal(store.values[0][:, slots], values)


def test_bytes() -> None:
    assert make_store().nbytes == 48 * 4 * (2 * 16 + 12)
