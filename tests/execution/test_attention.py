"""Attention over paged KV against attention written out over the whole sequence (issue 3 item 7)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from raytier.checkpoint.manifest import KVLayerSpec
from raytier.engine.step import SequenceChunk
from raytier.errors import UnsupportedModelError
from raytier.execution import attention
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
    store = KVStore([KVLayerSpec(KV_HEADS, DIM, value_dim, window)], 24, 4, torch.float32, torch.device("cpu"))
    lengths = [21, 6, 13]
    tables = [(5, 6, 7, 2, 23, 9), (1, 20), (11, 12, 13, 4)]
    queries = [torch.randn(HEADS, n, DIM) for n in lengths]
    keys = [torch.randn(KV_HEADS, n, DIM) for n in lengths]
    values = [torch.randn(KV_HEADS, n, value_dim) for n in lengths]
    sink_logits = torch.randn(HEADS) if sinks else None
    done = [0, 0, 0]
    for plan in ([7, 1, 0], [1, 4, 12], [12, 1, 1], [1, 0, 0]):
        taken = [(i, n) for i, n in enumerate(plan) if n]
        chunks = [SequenceChunk(i, tuple(range(n)), done[i], tables[i], False) for i, n in taken]
        cut = [(i, slice(done[i], done[i] + n)) for i, n in taken]
        packed = [torch.cat([source[i][:, part] for i, part in cut], dim=1)[None] for source in (queries, keys, values)]
        with forward_context(ForwardContext.build(store, chunks, torch.device("cpu"))):
            out, weights = attention_forward(
                Attention(), *packed, None, scaling=0.3, softcap=softcap, s_aux=sink_logits
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


def fill(store: KVStore, chunk: SequenceChunk, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random KV for the tokens before `chunk`; its queries `[heads, T, D]`, and all keys and values, its own too."""
    stop = chunk.start + len(chunk.token_ids)
    spec_heads, _, dim = store.keys[0].shape
    keys = torch.randn(spec_heads, stop, dim, dtype=store.dtype)
    values = torch.randn(spec_heads, stop, store.values[0].shape[2], dtype=store.dtype)
    store.write_tokens(0, chunk.block_table, 0, keys[:, : chunk.start], values[:, : chunk.start])
    return torch.randn(heads, len(chunk.token_ids), dim, dtype=store.dtype), keys, values


def attend(store: KVStore, chunks: list[SequenceChunk], **options: object) -> tuple[list[Tensor], list[Tensor]]:
    """Results of one step per sequence, and what the oracle says: fp64, `[T, Hq, Dv]`."""
    cases = [fill(store, chunk, HEADS) for chunk in chunks]
    new = [(q, k[:, c.start :], v[:, c.start :]) for c, (q, k, v) in zip(chunks, cases, strict=True)]
    packed = [torch.cat([case[part] for case in new], dim=1)[None] for part in range(3)]
    with forward_context(ForwardContext.build(store, chunks, torch.device("cpu"))):
        out, _ = attention_forward(Attention(), *packed, None, scaling=0.3, **options)  # type: ignore[arg-type]
    results = list(out[0].double().split([len(chunk.token_ids) for chunk in chunks]))
    window, softcap, sinks = store.windows[0] or None, options.get("softcap"), options.get("s_aux")
    return results, [oracle(q, k, v, window, softcap, sinks) for q, k, v in cases]  # type: ignore[arg-type]


def consecutive(first: int, count: int) -> tuple[int, ...]:
    return tuple(range(first, first + count))


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
def test_single_tokens_are_answered_together(window: int | None, kind: str) -> None:
    """Equal lengths equally spaced, a pair, a loner, a scattered one and a shared first block, in any order."""
    torch.manual_seed(0)
    store = KVStore([KVLayerSpec(KV_HEADS, DIM, DIM, window)], 80, 4, torch.float32, torch.device("cpu"))
    chunks = [
        SequenceChunk(0, (0,), 11, consecutive(60, 3), False),
        SequenceChunk(1, (0,), 11, consecutive(20, 3), False),
        SequenceChunk(2, (0,), 17, consecutive(27, 5), False),
        SequenceChunk(3, (0, 0, 0), 6, consecutive(70, 3), False),
        SequenceChunk(4, (0,), 11, consecutive(40, 3), False),
        SequenceChunk(5, (0,), 17, consecutive(1, 5), False),
        SequenceChunk(6, (0,), 11, (8, 12, 13), False),
        SequenceChunk(7, (0,), 1, (16,), False),
        SequenceChunk(8, (0,), 0, (17,), False),
    ]
    options: dict[str, object] = {}
    if kind == "softcap":
        options["softcap"] = 1.5
    if kind == "sinks":
        options["s_aux"] = torch.randn(HEADS)
    results, expected = attend(store, chunks, **options)
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right, atol=2e-6, rtol=2e-5)
    context = ForwardContext.build(store, chunks, torch.device("cpu"))
    sizes = sorted(len(batch.members) for batch in context.plan(0).batches)
    assert sizes == [1, 1, 2, 3], "three at 20, 40, 60; a pair of 18 tokens; two loners"
    assert context.plan(0).rest == (3, 6)


def test_a_batch_leaves_no_trace_in_the_results() -> None:
    """A sequence's result is the same bits alone, in a pair, or among many."""
    store = KVStore([KVLayerSpec(KV_HEADS, DIM, DIM)], 40, 4, torch.bfloat16, torch.device("cpu"))
    torch.manual_seed(0)
    chunks = [SequenceChunk(i, (0,), 10, consecutive(1 + 5 * i, 3), False) for i in range(6)]
    together, _ = attend(store, chunks)
    for part in (chunks[:1], chunks[:2], chunks[:5]):
        torch.manual_seed(0)
        for alone, result in zip(attend(store, part)[0], together, strict=False):
            assert torch.equal(alone, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize(("start", "count"), [(0, 5), (0, 40), (30, 4), (30, 16), (30, 17), (33, 60)])
def test_chunks_behind_a_prefix(
    start: int, count: int, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few and many new tokens, with and without a prefix, windows and grouping, in parts that hold few scores."""
    monkeypatch.setattr(attention, "_SCORES", 2048)
    torch.manual_seed(1)
    store = KVStore([KVLayerSpec(KV_HEADS, DIM, DIM)], 60, 4, dtype, torch.device("cpu"))
    chunks = [
        SequenceChunk(0, (0,) * count, start, (*consecutive(30, 15), *consecutive(2, 15)), False),
        SequenceChunk(1, (0,), 20, consecutive(50, 6), False),
    ]
    for window in (0, 7, 50):
        store.windows[0] = window
        options: dict[str, object] = {}
        if kind == "softcap":
            options["softcap"] = 1.5
        if kind == "sinks":
            options["s_aux"] = torch.randn(HEADS)
        results, expected = attend(store, chunks, **options)
        for result, right in zip(results, expected, strict=True):
            # bf16: weights and result are rounded to 8 bits; scores too, where they are written out.
            tolerance = 2e-6 if dtype is torch.float32 else 4e-2
            torch.testing.assert_close(result, right, atol=tolerance, rtol=1e-5)


def call(**kwargs: object) -> None:
    store = KVStore([KVLayerSpec(KV_HEADS, DIM, DIM)], 4, 4, torch.float32, torch.device("cpu"))
    chunk = SequenceChunk(0, (1, 2), 0, (1,), False)
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
