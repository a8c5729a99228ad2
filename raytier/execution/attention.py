"""Attention over paged KV, registered with transformers as `raytier`.

transformers' modules call `attention_forward` with the new tokens' queries, keys and values of a packed
batch (`[1, heads, T, dim]`, RoPE applied, KV heads not repeated). It writes keys and values to their
slots and attends over what the block tables name: single tokens by a kernel of our own where there is one, else those
whose keys lie regularly in one call; the rest sequence by sequence.

*Folded* queries are `[n, Hkv, M, D]`: the query heads that share a KV head become further queries of it, token
by token, M = tokens * Hq / Hkv. On a CPU that is twice as fast as enable_gqa for a single token and three times for
four; from some 64 tokens on there is no difference, and a mask for folded queries would be large.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from raytier.checkpoint.architecture import ATTENTION_NAME, NEUTRAL
from raytier.engine.step import SequenceChunk
from raytier.errors import UnsupportedModelError
from raytier.execution import cpu_kernels
from raytier.execution.kv_store import KVStore, RunBatch, batch_runs, slot_runs


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence of the packed batch: queries q_start..q_stop-1 are its tokens start..stop-1.

    `block_tables`: one per KV cache group.
    """

    q_start: int
    q_stop: int
    start: int
    stop: int
    block_tables: tuple[tuple[int, ...], ...]

    @property
    def num_queries(self) -> int:
        return self.q_stop - self.q_start


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one step attends, for one window: results come in the order of `batches`, then `rest`.

    Attributes:
        batches: single tokens whose keys are one run each; `members` are indices into `rows`.
        rows: places in the packed batch of the tokens of `batches`, in their order.
        rest: the other spans, by index.
        inverse: for every token of the packed batch its place in the results; None where that is the same.
    """

    batches: tuple[RunBatch, ...]
    rows: Tensor
    rest: tuple[int, ...]
    inverse: Tensor | None


@dataclass
class ForwardContext:
    """What attention needs to know about the running step; shared by all layers.

    Runs, plans and masks depend on the window and the KV cache group, not on the layer, so they are made once per step
    for each.

    Attributes:
        slots: where the step's tokens are written, per group.
    """

    store: KVStore
    spans: tuple[SequenceSpan, ...]
    slots: tuple[Tensor, ...]
    _calls: int = 0
    _runs: dict[tuple[int, int], list[list[tuple[int, int]]]] = field(default_factory=dict)
    _plans: dict[tuple[int, int], _Plan] = field(default_factory=dict)
    _singles: dict[tuple[int, int], tuple[cpu_kernels.Spans, tuple[int, ...]]] = field(default_factory=dict)
    _masks: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)

    @classmethod
    def build(cls, store: KVStore, chunks: Sequence[SequenceChunk], device: torch.device) -> ForwardContext:
        spans = []
        slots: list[list[int]] = [[] for _ in range(store.num_groups)]
        q_start = 0
        for chunk in chunks:
            stop, tables = chunk.stop, chunk.block_tables
            spans.append(SequenceSpan(q_start, q_start + len(chunk.token_ids), chunk.start, stop, tables))
            for group_slots, table in zip(slots, tables, strict=True):
                for first, count in slot_runs(table, store.block_size, chunk.start, stop):
                    group_slots.extend(range(first, first + count))
            q_start += len(chunk.token_ids)
        return cls(store, tuple(spans), tuple(torch.tensor(s, dtype=torch.int64, device=device) for s in slots))

    @property
    def device(self) -> torch.device:
        return self.slots[0].device

    @property
    def layer(self) -> int:
        """The KV layer of the next attention call: they are numbered in the order of the calls of a forward pass."""
        return self._calls % len(self.store.keys)

    @property
    def window(self) -> int:
        """Tokens that a query of that call sees, itself included; 0: all."""
        return self.store.windows[self.layer]

    def next_layer(self) -> int:
        """The same, for a call that is made now."""
        layer = self.layer
        self._calls += 1
        return layer

    def first_key(self, span: SequenceSpan, window: int) -> int:
        """First token that the first query of `span` may see; `window` 0 means no window."""
        return max(0, span.start - window + 1) if window else 0

    def runs(self, window: int, group: int = 0) -> list[list[tuple[int, int]]]:
        """Slots of the keys that each span may see, in the layers of `group`."""
        if (window, group) not in self._runs:
            size = self.store.block_size
            self._runs[window, group] = [
                slot_runs(span.block_tables[group], size, self.first_key(span, window), span.stop)
                for span in self.spans
            ]
        return self._runs[window, group]

    def plan(self, window: int, group: int = 0) -> _Plan:
        """Which spans are answered together."""
        if (window, group) not in self._plans:
            runs = self.runs(window, group)
            single = [i for i, span in enumerate(self.spans) if span.num_queries == 1 and len(runs[i]) == 1]
            rest = [i for i, span in enumerate(self.spans) if span.num_queries > 1 or len(runs[i]) > 1]
            batches = batch_runs([runs[i][0] for i in single])
            rows = [self.spans[single[member]].q_start for batch in batches for member in batch.members]
            order = rows + [row for i in rest for row in range(self.spans[i].q_start, self.spans[i].q_stop)]
            device = self.device
            inverse = None
            if order != list(range(len(order))):
                inverse = torch.argsort(torch.tensor(order, device=device))
            self._plans[window, group] = _Plan(tuple(batches), torch.tensor(rows, device=device), tuple(rest), inverse)
        return self._plans[window, group]

    def singles(self, window: int, group: int = 0) -> tuple[cpu_kernels.Spans, tuple[int, ...]]:
        """What the single tokens see, and which spans are longer."""
        if (window, group) not in self._singles:
            runs = self.runs(window, group)
            single = [(span.q_start, runs[i]) for i, span in enumerate(self.spans) if span.num_queries == 1]
            longer = tuple(i for i, span in enumerate(self.spans) if span.num_queries > 1)
            self._singles[window, group] = cpu_kernels.Spans.of(single), longer
        return self._singles[window, group]

    def mask(self, index: int, window: int) -> Tensor | None:
        """What to add to the scores `[queries, keys]`: 0 or -inf; None where causality alone decides from token 0."""
        key = (index, window)
        if key not in self._masks:
            span = self.spans[index]
            first = self.first_key(span, window)
            if span.start == 0 and (not window or span.stop <= window):
                self._masks[key] = None
            else:
                device = self.device
                queries = torch.arange(span.start, span.stop, device=device)[:, None]
                keys = torch.arange(first, span.stop, device=device)[None, :]
                hidden = keys > queries
                if window:
                    hidden |= keys <= queries - window
                # As numbers, and in the dtype of the queries: a boolean mask would be converted in every layer.
                mask = torch.zeros(hidden.shape, dtype=self.store.dtype, device=device)
                self._masks[key] = mask.masked_fill_(hidden, -torch.inf)
        return self._masks[key]

    def explicit_mask(self, index: int, window: int) -> Tensor | None:
        """The same with causality from token 0 written out; None for a single token, which sees every key."""
        count = self.spans[index].num_queries
        if count == 1:
            return None
        mask = self.mask(index, window)
        if mask is None:
            mask = torch.full((count, count), -torch.inf, dtype=self.store.dtype, device=self.device).triu_(1)
            self._masks[index, window] = mask
        return mask


class _Current(threading.local):
    context: ForwardContext | None = None


_current = _Current()


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Make `context` the one that attention uses in this thread; does not nest."""
    if _current.context is not None:
        raise RuntimeError("a forward pass is already running in this thread")
    _current.context = context
    try:
        yield
    finally:
        _current.context = None


def current_context() -> ForwardContext | None:
    """That of the step which runs in this thread."""
    return _current.context


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attend over paged KV.

    Args:
        query: `[1, Hq, T, Dk]`; key `[1, Hkv, T, Dk]`; value `[1, Hkv, T, Dv]`: the new tokens only.
        attention_mask: must be None, since `raytier` registers no mask function.
        softcap: `softcap * tanh(scores / softcap)` before the softmax (Gemma 2).
        s_aux: attention sinks `[Hq]`: one extra logit per head that takes probability and gives no value.

    Returns:
        `[1, T, Hq, Dv]` and None in place of the attention weights.

    Raises:
        UnsupportedModelError: the model passes something that would be silently ignored.
    """
    context = _current.context
    if context is None:
        raise RuntimeError("attention called outside of a raytier step")
    if attention_mask is not None:
        raise UnsupportedModelError(f"{type(module).__name__} builds its own attention mask; raytier cannot page that")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(f"{type(module).__name__} attends in both directions; raytier runs causal models")
    unknown = [name for name, v in kwargs.items() if isinstance(v, Tensor) and name not in NEUTRAL]
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {unknown} to attention; raytier does not know them"
        )

    layer = context.next_layer()
    window = context.store.windows[layer]
    scores = _Scores(scaling if scaling is not None else query.shape[-1] ** -0.5, softcap, s_aux)
    if softcap is None and cpu_kernels.fits_attend(query, key, value, context.store.keys[layer]):
        return _attend_by_kernel(context, layer, query, key, value, window, scores), None
    context.store.write(layer, context.slots[context.store.group_of[layer]], key[0], value[0])
    return _attend(context, layer, query[0], window, scores), None


def _attend_by_kernel(
    context: ForwardContext, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int, scores: _Scores
) -> Tensor:
    """`[1, T, Hq, D]`: single tokens at once, wherever their keys lie; longer spans one by one."""
    store, group = context.store, context.store.group_of[layer]
    singles, longer = context.singles(window, group)
    tokens = query[0].transpose(0, 1).contiguous()
    pool = store.keys[layer], store.values[layer]
    sinks = scores.sinks.to(tokens.dtype).contiguous() if scores.sinks is not None else None
    result = cpu_kernels.attend(tokens, key, value, context.slots[group], pool, singles, scores.scale, sinks)
    for index in longer:
        span = context.spans[index]
        result[span.q_start : span.q_stop] = _attend_span(context, layer, index, query[0], window, scores)
    return result[None]


def _attend(context: ForwardContext, layer: int, query: Tensor, window: int, scores: _Scores) -> Tensor:
    """The same by torch's operations: query `[Hq, T, Dk]` -> `[1, T, Hq, Dv]`."""
    store = context.store
    plan = context.plan(window, store.group_of[layer])
    count, heads, kv_heads = query.shape[1], query.shape[0], store.keys[layer].shape[0]
    results = []  # each [tokens, Hq, Dv]
    if plan.batches:
        singles = query.transpose(0, 1).reshape(count, kv_heads, heads // kv_heads, query.shape[-1])
        if plan.inverse is not None:
            singles = singles.index_select(0, plan.rows)
        done = 0
        for batch in plan.batches:
            members = len(batch.members)
            keys, values = store.read_batch(layer, batch)
            results.append(folded_attention(singles[done : done + members], keys, values, scores).flatten(1, 2))
            done += members
    results += [_attend_span(context, layer, index, query, window, scores) for index in plan.rest]
    result = results[0] if len(results) == 1 else torch.cat(results)
    if plan.inverse is not None:
        result = result.index_select(0, plan.inverse)
    return result[None]


def _attend_span(
    context: ForwardContext, layer: int, index: int, query: Tensor, window: int, scores: _Scores
) -> Tensor:
    """What the tokens of one span see: query `[Hq, T, Dk]` of the whole batch -> `[tokens, Hq, Dv]`."""
    span = context.spans[index]
    keys, values = context.store.read(layer, context.runs(window, context.store.group_of[layer])[index])
    chunk = query[:, span.q_start : span.q_stop]
    if scores.plain and span.num_queries > _FOLD_TOKENS:
        return _sdpa(chunk, keys, values, scores.scale, context.mask(index, window)).transpose(0, 1)
    group = query.shape[0] // keys.shape[0]
    tokens = chunk.transpose(0, 1).reshape(span.num_queries, keys.shape[0], group, query.shape[-1])
    return _attend_folded(tokens, keys, values, scores, context.explicit_mask(index, window)).flatten(1, 2)


#: Up to so many tokens of one sequence are folded.
_FOLD_TOKENS = 16
#: Scores that the written-out attention holds at a time, in elements of fp32.
_SCORES = 1 << 22


@dataclass(frozen=True, slots=True)
class _Scores:
    """How scores are made of queries and keys; see `attention_forward`."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None


def _attend_folded(tokens: Tensor, keys: Tensor, values: Tensor, scores: _Scores, mask: Tensor | None) -> Tensor:
    """Attention of one sequence, folded, in parts that bound the scores held.

    tokens `[T, Hkv, G, D]`, keys and values `[Hkv, L, D]`, mask `[T, L]` is added; returns `[T, Hkv, G, Dv]`.
    """
    count, heads, group, dim = tokens.shape
    step = max(1, _SCORES // (heads * group * keys.shape[1]))
    results = []
    for start in range(0, count, step):
        part = tokens[start : start + step]
        folded = part.transpose(0, 1).reshape(1, heads, -1, dim)
        rows = None if mask is None else mask[start : start + step].repeat_interleave(group, dim=0)
        result = folded_attention(folded, keys[None], values[None], scores, rows)[0]
        results.append(result.view(heads, -1, group, values.shape[-1]).transpose(0, 1))
    return results[0] if len(results) == 1 else torch.cat(results)


def folded_attention(
    query: Tensor, keys: Tensor, values: Tensor, scores: _Scores, mask: Tensor | None = None
) -> Tensor:
    """Attention of folded queries `[n, Hkv, M, D]` over keys and values `[n, Hkv, L, D]`; mask `[M, L]` is added."""
    if scores.plain:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scores.scale)
    if scores.softcap is not None or query.device.type != "cpu" or query.shape[-1] != values.shape[-1]:
        return reference_attention(query, keys, values, scores, mask)
    # A sink only takes probability: what it leaves is a factor on the result without it.
    result, logsumexp = torch._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, False, attn_mask=mask, scale=scores.scale
    )
    return (result * torch.sigmoid(logsumexp - _folded_sinks(scores, query))[..., None]).to(query.dtype)


def _folded_sinks(scores: _Scores, query: Tensor) -> Tensor:
    """Sinks `[Hq]` for folded queries: `[Hkv, M]` in fp32."""
    assert scores.sinks is not None
    heads = query.shape[1]
    by_head = scores.sinks.float().view(heads, -1)
    return by_head.repeat(1, query.shape[2] // by_head.shape[1])


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """torch's fused attention for one sequence: query `[Hq, T, D]`, keys and values `[Hkv, L, D]` -> `[Hq, T, Dv]`."""
    return scaled_dot_product_attention(
        query[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[0] != keys.shape[0],
    )[0]


def reference_attention(
    query: Tensor, keys: Tensor, values: Tensor, scores: _Scores, mask: Tensor | None = None
) -> Tensor:
    """Folded attention written out: the path for soft caps, and for whatever the fused one cannot do.

    query `[n, Hkv, M, D]`, keys and values `[n, Hkv, L, D]`, mask `[M, L]` is added; returns `[n, Hkv, M, Dv]` in the
    query's dtype, softmax in fp32 as transformers' eager attention does.
    """
    products = torch.matmul(query, keys.transpose(-1, -2)) * scores.scale
    if scores.softcap is not None:
        products = torch.tanh(products / scores.softcap) * scores.softcap
    products = products.float() if mask is None else products.float() + mask
    if scores.sinks is not None:
        column = _folded_sinks(scores, query)[None, ..., None].expand(*products.shape[:-1], 1)
        weights = torch.softmax(torch.cat([products, column], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(products, dim=-1)
    return torch.matmul(weights.to(query.dtype), values)


AttentionInterface.register(ATTENTION_NAME, attention_forward)
