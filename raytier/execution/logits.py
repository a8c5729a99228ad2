"""What a request does to the logits before a token is chosen: masks, biases, penalties, for a whole batch at once.

The order is vLLM's (v1/sample/sampler.py): allowed tokens (and grammar), bad words, min_tokens, logit bias, repetition,
frequency and presence penalty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytier.engine.step import SequenceSpec

Bits = NDArray[np.uint8]
_NEVER = float("-inf")


def bits_of(token_ids: Sequence[int], vocab: int) -> Bits:
    """A mask with the bits of `token_ids` set: eight tokens to a byte, lowest bit first, whole 32-bit words."""
    flags = np.zeros((vocab + 31) // 32 * 32, dtype=np.uint8)
    flags[list(token_ids)] = 1
    return np.packbits(flags, bitorder="little")


class TokenCounts:
    """Which tokens a sequence has, and how often each was generated; grows by one at a time."""

    def __init__(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        distinct = list(dict.fromkeys([*prompt, *output]))
        self._place = {token: place for place, token in enumerate(distinct)}
        self._ids = np.array(distinct, dtype=np.int64)
        self._counts = np.zeros(len(distinct), dtype=np.float32)
        for token, count in Counter(output).items():
            self._counts[self._place[token]] = count

    def add(self, token: int) -> None:
        """One more of `token` has been generated."""
        place = self._place.setdefault(token, len(self._place))
        if place >= len(self._ids):
            more = max(16, len(self._ids))
            self._ids = np.concatenate([self._ids, np.zeros(more, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(more, dtype=np.float32)])
        self._ids[place] = token
        self._counts[place] += 1

    @property
    def ids(self) -> NDArray[np.int64]:
        """Distinct tokens of prompt and output `[k]`."""
        return self._ids[: len(self._place)]

    @property
    def generated(self) -> NDArray[np.float32]:
        """How often each of `ids` is in the output `[k]`."""
        return self._counts[: len(self._place)]


class LogitRules:
    """What one sequence does to its logits; knows the output as far as that matters.

    Args:
        vocab: width of the logits.
        tokens: prompt and generated ids, needed where `spec.needs_tokens`.
    """

    def __init__(self, spec: SequenceSpec, vocab: int, prompt_len: int, tokens: Sequence[int]) -> None:
        self.spec = spec
        self.counts = TokenCounts(tokens[:prompt_len], tokens[prompt_len:]) if spec.counts_tokens else None
        self._output = list(tokens[prompt_len:]) if spec.bad_words else []
        self.allowed = None if spec.allowed_token_ids is None else bits_of(spec.allowed_token_ids, vocab)
        self.bias_ids = np.array([token for token, _ in spec.logit_bias], dtype=np.int64)
        self.bias = np.array([bias for _, bias in spec.logit_bias], dtype=np.float32)
        asks = spec.bad_words or spec.logit_bias or spec.counts_tokens or spec.grammar is not None
        self._always = bool(asks) or self.allowed is not None

    def acts(self, position: int) -> bool:
        """Whether the logits of output token `position` are changed at all."""
        return self._always or position < self.spec.min_tokens

    def banned(self, position: int) -> list[int]:
        """Tokens that may not come at `position`, by bad words and min_tokens."""
        ids = []
        for word in self.spec.bad_words:
            before = len(word) - 1
            if not before or tuple(self._output[-before:]) == word[:-1]:
                ids.append(word[-1])
        # Where a grammar has an end, its mask has seen to the stop tokens.
        if position < self.spec.min_tokens and self.spec.grammar is None:
            ids += self.spec.stop_ids
        return ids

    def add(self, token: int) -> None:
        """`token` has been drawn."""
        if self.counts is not None:
            self.counts.add(token)
        if self.spec.bad_words:
            self._output.append(token)


def adjust(logits: Tensor, rules: Sequence[LogitRules], positions: Sequence[int], masks: Sequence[Bits | None]) -> None:
    """Change fp32 `logits` `[n, vocab]` in place, row by row as `rules` say.

    Args:
        positions: number of the output token that each row is for.
        masks: bits of the tokens that a grammar allows, where there is one.
    """
    _keep(logits, [_both(rule.allowed, mask) for rule, mask in zip(rules, masks, strict=True)])
    banned = [rule.banned(position) for rule, position in zip(rules, positions, strict=True)]
    if any(banned):
        rows, ids = _places(logits, [np.array(each, dtype=np.int64) for each in banned])
        logits[rows, ids] = _NEVER
    if any(len(rule.bias) for rule in rules):
        rows, ids = _places(logits, [rule.bias_ids for rule in rules])
        logits[rows, ids] += _tensor(np.concatenate([rule.bias for rule in rules]), logits)
    _penalise(logits, [(row, rule) for row, rule in enumerate(rules) if rule.counts is not None])


def _both(first: Bits | None, second: Bits | None) -> Bits | None:
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _keep(logits: Tensor, masks: Sequence[Bits | None]) -> None:
    """Leave only the tokens whose bits are set, in rows that have a mask."""
    rows = [row for row, mask in enumerate(masks) if mask is not None]
    if not rows:
        return
    packed = np.stack([mask for mask in masks if mask is not None])
    flags = np.unpackbits(packed, axis=1, count=logits.shape[1], bitorder="little")
    forbidden = torch.from_numpy(flags == 0).to(logits.device)
    if len(rows) == len(logits):
        logits.masked_fill_(forbidden, _NEVER)
    else:
        logits[rows] = logits[rows].masked_fill_(forbidden, _NEVER)


def _penalise(logits: Tensor, rules: Sequence[tuple[int, LogitRules]]) -> None:
    """Penalties of the rows that have some: gathered, changed and put back in one go."""
    if not rules:
        return
    counts = [rule.counts for _, rule in rules if rule.counts is not None]
    sizes = [len(each.ids) for each in counts]
    rows = _tensor(np.repeat([row for row, _ in rules], sizes), logits)
    ids = _tensor(np.concatenate([each.ids for each in counts]), logits)
    generated = _tensor(np.concatenate([each.generated for each in counts]), logits)

    def each(name: str) -> Tensor:
        return _tensor(np.repeat(np.array([getattr(rule.spec, name) for _, rule in rules], np.float32), sizes), logits)

    values, repetition = logits[rows, ids], each("repetition_penalty")
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= each("frequency_penalty") * generated
    values -= each("presence_penalty") * (generated > 0)
    logits[rows, ids] = values


def _places(logits: Tensor, ids: Sequence[NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
    """Row and column of every id of every row."""
    rows = np.repeat(np.arange(len(ids)), [len(each) for each in ids])
    return _tensor(rows, logits), _tensor(np.concatenate(ids), logits)


def _tensor(values: NDArray[np.int64] | NDArray[np.float32], like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)
