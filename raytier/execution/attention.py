"""Attention over paged KV, registered with transformers as `raytier`.

transformers' modules call `attention_forward` with the new tokens' queries, keys and values of a packed
batch (`[1, heads, T, dim]`, RoPE applied, KV heads not repeated). It writes keys and values to their
slots and attends, sequence by sequence, over what the block tables name.
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

from raytier.checkpoint.architecture import ATTENTION_NAME
from raytier.engine.step import SequenceChunk
from raytier.errors import UnsupportedModelError
from raytier.execution.kv_store import KVStore, slot_runs


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence of the packed batch: queries q_start..q_stop-1 are its tokens start..stop-1."""

    q_start: int
    q_stop: int
    start: int
    stop: int
    block_table: tuple[int, ...]

    @property
    def num_queries(self) -> int:
        return self.q_stop - self.q_start


@dataclass
class ForwardContext:
    """What attention needs to know about the running step; shared by all layers.

    Runs and masks depend on the window, not on the layer, so they are made once per step and window.
    """

    store: KVStore
    spans: tuple[SequenceSpan, ...]
    slots: Tensor
    _runs: dict[int, list[list[tuple[int, int]]]] = field(default_factory=dict)
    _masks: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)

    @classmethod
    def build(cls, store: KVStore, chunks: Sequence[SequenceChunk], device: torch.device) -> ForwardContext:
        spans = []
        slots: list[int] = []
        q_start = 0
        for chunk in chunks:
            stop = chunk.start + len(chunk.token_ids)
            spans.append(SequenceSpan(q_start, q_start + len(chunk.token_ids), chunk.start, stop, chunk.block_table))
            for first, count in slot_runs(chunk.block_table, store.block_size, chunk.start, stop):
                slots.extend(range(first, first + count))
            q_start += len(chunk.token_ids)
        return cls(store, tuple(spans), torch.tensor(slots, dtype=torch.int64, device=device))

    def first_key(self, span: SequenceSpan, window: int) -> int:
        """First token that the first query of `span` may see; `window` 0 means no window."""
        return max(0, span.start - window + 1) if window else 0

    def runs(self, window: int) -> list[list[tuple[int, int]]]:
        """Slots of the keys that each span may see."""
        if window not in self._runs:
            size = self.store.block_size
            self._runs[window] = [
                slot_runs(span.block_table, size, self.first_key(span, window), span.stop) for span in self.spans
            ]
        return self._runs[window]

    def mask(self, index: int, window: int) -> Tensor | None:
        """Boolean `[queries, keys]`, True = may attend; None where causality alone decides from token 0."""
        key = (index, window)
        if key not in self._masks:
            span = self.spans[index]
            first = self.first_key(span, window)
            if span.start == 0 and (not window or span.stop <= window):
                self._masks[key] = None
            else:
                device = self.slots.device
                queries = torch.arange(span.start, span.stop, device=device)[:, None]
                keys = torch.arange(first, span.stop, device=device)[None, :]
                allowed = keys <= queries
                if window:
                    allowed &= keys > queries - window
                self._masks[key] = allowed
        return self._masks[key]


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


#: Keyword arguments that reach the function and do not change its result in inference.
_NEUTRAL = {"dropout", "position_ids", "use_cache", "output_attentions", "output_router_logits", "output_hidden_states"}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attend over paged KV.

    Args:
        query: `[1, Hq, T, Dk]`; key `[1, Hkv, T, Dk]`; value `[1, Hkv, T, Dv]`: the new tokens only.
        attention_mask: must be None, since `raytier` registers no mask function.
        sliding_window: tokens a query sees, itself included; None = all.
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
    unknown = [name for name, v in kwargs.items() if isinstance(v, Tensor) and name not in _NEUTRAL]
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {unknown} to attention; raytier does not know them"
        )

    layer = int(module.layer_idx)  # type: ignore[arg-type]
    store = context.store
    query, key, value = query[0], key[0], value[0]
    store.write(layer, context.slots, key, value)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = int(sliding_window or 0)
    fused = softcap is None and s_aux is None
    groups = (key.shape[0], query.shape[0] // key.shape[0])
    # Of a single token, the query heads that share a KV head become its queries: several times faster than
    # enable_gqa, and no mask is needed since the last token sees every key. Made for all tokens at once, since
    # with many short sequences it is operations per sequence that cost.
    single = query.transpose(0, 1).reshape(query.shape[1], 1, *groups, query.shape[-1]).unbind(0)
    results = []  # per span [tokens, Hkv, Hq / Hkv, Dv]
    for index, (span, runs) in enumerate(zip(context.spans, context.runs(window), strict=True)):
        keys, values = store.read(layer, runs)
        if fused and span.num_queries == 1:
            results.append(scaled_dot_product_attention(single[span.q_start], keys[None], values[None], scale=scale))
            continue
        chunk = query[:, span.q_start : span.q_stop]
        mask = context.mask(index, window) if span.num_queries > 1 else None
        if fused:
            result = _sdpa(chunk, keys, values, scale, mask)
        else:
            result = reference_attention(chunk, keys, values, scale, _explicit(mask, chunk, keys), softcap, s_aux)
        results.append(result.transpose(0, 1).reshape(-1, *groups, value.shape[-1]))
    return torch.cat(results).reshape(1, query.shape[1], query.shape[0], value.shape[-1]), None


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


def _explicit(mask: Tensor | None, query: Tensor, keys: Tensor) -> Tensor:
    """A mask where `None` stood for plain causality."""
    if mask is not None:
        return mask
    tokens, length = query.shape[1], keys.shape[1]
    return torch.ones(tokens, length, dtype=torch.bool, device=query.device).tril(length - tokens)


def reference_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    mask: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention written out, the oracle for the fused path and the path for soft caps and sinks.

    query `[Hq, T, D]`, keys and values `[Hkv, L, D]`, mask boolean `[T, L]`; returns `[Hq, T, Dv]` in the
    query's dtype, softmax in fp32 as transformers' eager attention does.
    """
    group = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
    scores = torch.matmul(query, keys.transpose(1, 2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float().masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.float().view(-1, 1, 1).expand(-1, scores.shape[1], 1)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return torch.matmul(weights.to(query.dtype), values)


AttentionInterface.register(ATTENTION_NAME, attention_forward)
