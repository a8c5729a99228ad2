"""Attention over paged KV against attention written out over the whole sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from raytier.checkpoint.manifest import KVLayerSpec
from raytier.engine.step import SequenceChunk
from raytier.errors import UnsupportedModelError
from raytier.execution.attention import ForwardContext, attention_forward, forward_context
from raytier.execution.kv_store import KVStore

HEADS, KV_HEADS, DIM = 4, 2, 16


class Attention(nn.Module):
    layer_idx = 0
    is_causal = True


def oracle(
    query: Tensor, keys: Tensor, values: Tensor, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Token by token, head by head, in float64: `[T, Hq, Dv]` for queries at the end of `keys`."""
    tokens, length = query.shape[1], keys.shape[1]
    out = torch.zeros(tokens, HEADS, values.shape[-1], dtype=torch.float64)
    for t in range(tokens):
        position = length - tokens + t
        first = 0 if window is None else max(0, position - window + 1)
        for h in range(HEADS):
            k = keys[h // (HEADS // KV_HEADS), first : position + 1].double()
            v = values[h // (HEADS // KV_HEADS), first : position + 1].double()
            scores = (k @ query[h, t].double()) * 0.3
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                weights = torch.softmax(torch.cat([scores, sinks[h : h + 1].double()]), dim=0)[:-1]
            else:
                weights = torch.softmax(scores, dim=0)
            out[t, h] = weights @ v
    return out


@pytest.mark.parametrize("value_dim", [16, 8])
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"),
    [(None, None, False), (5, None, False), (None, 2.0, False), (7, None, True), (3, 1.5, False), (64, None, False)],
)
def test_mixed_batch_in_chunks(window: int | None, softcap: float | None, sinks: bool, value_dim: int) -> None:
    """Three sequences in scattered blocks, fed in uneven chunks, decodes beside prefills."""
    torch.manual_seed(0)
    store = KVStore([KVLayerSpec(KV_HEADS, DIM, value_dim)], 24, 4, torch.float32, torch.device("cpu"))
    lengths = [21, 6, 13]
    tables = [(5, 6, 7, 2, 23, 9), (1, 20), (11, 12, 13, 4)]
    queries = [torch.randn(HEADS, n, DIM) for n in lengths]
    keys = [torch.randn(KV_HEADS, n, DIM) for n in lengths]
    values = [torch.randn(KV_HEADS, n, value_dim) for n in lengths]
    sink_logits = torch.randn(HEADS) if sinks else None
    done = [0, 0, 0]
    for plan in ([7, 1, 0], [1, 4, 12], [12, 1, 1], [1, 0, 0]):
        taken = [(i, n) for i, n in enumerate(plan) if n]
        chunks = [SequenceChunk(i, tuple(range(n)), done[i], tables[i], None) for i, n in taken]
        cut = [(i, slice(done[i], done[i] + n)) for i, n in taken]
        packed = [torch.cat([source[i][:, part] for i, part in cut], dim=1)[None] for source in (queries, keys, values)]
        with forward_context(ForwardContext.build(store, chunks, torch.device("cpu"))):
            out, weights = attention_forward(
                Attention(), *packed, None, scaling=0.3, sliding_window=window, softcap=softcap, s_aux=sink_logits
            )
        assert weights is None
        position = 0
        for i, n in taken:
            done[i] += n
            expected = oracle(
                queries[i][:, done[i] - n : done[i]],
                keys[i][:, : done[i]],
                values[i][:, : done[i]],
                window,
                softcap,
                sink_logits,
            )
            torch.testing.assert_close(out[0, position : position + n].double(), expected, atol=2e-6, rtol=2e-5)
            position += n
    assert done == lengths


def call(**kwargs: object) -> None:
    store = KVStore([KVLayerSpec(KV_HEADS, DIM, DIM)], 4, 4, torch.float32, torch.device("cpu"))
    chunk = SequenceChunk(0, (1, 2), 0, (1,), None)
    q, k = torch.randn(1, HEADS, 2, DIM), torch.randn(1, KV_HEADS, 2, DIM)
    mask = kwargs.pop("mask", None)
    with forward_context(ForwardContext.build(store, [chunk], torch.device("cpu"))):
        attention_forward(Attention(), q, k, k, mask, **kwargs)  # type: ignore[arg-type]


def test_what_would_be_ignored_is_refused() -> None:
    call(position_ids=torch.tensor([[0, 1]]), use_cache=False)
    with pytest.raises(UnsupportedModelError, match="own attention mask"):
        call(mask=torch.zeros(1, 1, 2, 2))
    with pytest.raises(UnsupportedModelError, match="block_indices"):
        call(block_indices=torch.zeros(1))
    with pytest.raises(UnsupportedModelError, match="both directions"):
        call(is_causal=False)


def test_context_neither_nests_nor_lingers() -> None:
    store = KVStore([KVLayerSpec(1, 4, 4)], 2, 4, torch.float32, torch.device("cpu"))
    context = ForwardContext.build(store, [], torch.device("cpu"))
    with forward_context(context), pytest.raises(RuntimeError, match="already running"), forward_context(context):
        pass
    with pytest.raises(RuntimeError, match="outside"):
        attention_forward(Attention(), *(torch.zeros(1, 1, 1, 4),) * 3, None)
