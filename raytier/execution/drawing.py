"""Drawing tokens from logits.

Every draw uses one uniform number that depends only on (seed, sample, position): Philox, a counter-based
generator (Salmon et al., SC'11), keyed by seed and sample with the position as its counter. The result is
therefore the same whatever else is in the batch, and after preemption or a restart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytier.engine.step import SampleSpec

_MASK64 = 2**64 - 1
#: Nearly every draw falls to one of so many tokens, and to sort a whole vocabulary takes longer than all the rest.
_LIKELY = 256


def uniform(spec: SampleSpec) -> float:
    """The draw of `spec` in [0, 1)."""
    generator = np.random.Philox(
        key=np.array([spec.seed & _MASK64, spec.sample & _MASK64], dtype=np.uint64),
        counter=np.array([spec.position, 0, 0, 0], dtype=np.uint64),
    )
    return float(int(generator.random_raw()) >> 11) * 2.0**-53


def draw(logits: Tensor, specs: Sequence[SampleSpec]) -> list[int]:
    """One token id per row of `logits` `[n, vocab]`.

    Greedy where the temperature is 0 (the lowest id of equal ones), else temperature, then min-p (tokens at least so
    probable as this share of the likeliest), then top-k, then top-p (the smallest set whose probability reaches top_p,
    at least one token), then the inverse of the cumulative distribution. What a row yields depends on no other row.
    """
    tokens = [0] * len(specs)
    logits = logits.float()
    for greedy in (True, False):
        rows = [row for row, spec in enumerate(specs) if (spec.temperature <= 0) is greedy]
        if rows:
            part = logits if len(rows) == len(specs) else logits[rows]
            # max is three times as fast as argmax on a CPU, and gives the same answer.
            chosen = part.max(dim=-1).indices.tolist() if greedy else _draw(part, [specs[row] for row in rows])
            for row, token in zip(rows, chosen, strict=True):
                tokens[row] = token
    return tokens


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest logits of each row, largest first, and their ids, lower ones first among equals."""
    values, ids = torch.topk(logits, count)
    ids, by_id = torch.sort(ids, dim=-1)
    values, by_value = torch.sort(values.gather(-1, by_id), dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, by_value)


def _draw(logits: Tensor, specs: Sequence[SampleSpec]) -> list[int]:
    """The draws of `specs`, whose temperatures are above 0."""
    vocab = logits.shape[1]
    looks = np.array([spec.top_k if 0 < spec.top_k < vocab else min(_LIKELY, vocab) for spec in specs])
    # One more than a row looks at, so that it knows whether its last one is tied with the next.
    top, names = likeliest(logits, min(int(looks.max()) + 1, vocab))
    values, ids = top.cpu().numpy(), names.cpu().numpy()
    point = np.array([uniform(spec) for spec in specs])
    columns = np.arange(values.shape[1])
    temperature = np.array([spec.temperature for spec in specs])
    top_p = np.array([spec.top_p for spec in specs])
    min_p = np.array([spec.min_p for spec in specs])
    with np.errstate(invalid="ignore"):  # rows that hold nothing finite are decided below
        weights = np.exp((values.astype(np.float64) - values[:, :1]) / temperature[:, None])
    kept = (columns < looks[:, None]) & (weights >= min_p[:, None])
    count = kept.sum(axis=1)
    # Nothing else can be drawn than what was looked at.
    whole = (looks == vocab) | (looks == [spec.top_k for spec in specs]) | (count < looks)
    cumulative = np.cumsum(np.where(kept, weights, 0.0), axis=1)
    mass = cumulative[:, -1].copy()
    if not whole.all():
        rows = np.flatnonzero(~whole)
        mass[rows] = _mass(logits if len(rows) == len(specs) else logits[rows], temperature[rows])
    # The token that crosses top_p belongs to the set.
    last = np.where(top_p < 1, (cumulative < (top_p * mass)[:, None]).sum(axis=1), count - 1)
    each = np.arange(len(specs))
    mass = np.where(top_p < 1, cumulative[each, np.clip(last, 0, count - 1)], mass)
    index = (cumulative <= (point * mass)[:, None]).sum(axis=1)
    undecided = (np.maximum(last, index) >= count) & ~whole | ~whole & (min_p > 0)
    index = np.clip(index, 0, np.minimum(last, count - 1))
    tied = values[each, index] == values[each, np.minimum(looks, values.shape[1] - 1)]
    tokens: list[int] = ids[each, index].tolist()
    for row in np.flatnonzero(undecided | tied | ~np.isfinite(values[:, 0])).tolist():
        if not np.isfinite(values[row, 0]):  # certain, or nothing that can be compared
            tokens[row] = int(logits[row].argmax())
        elif undecided[row]:
            tokens[row] = _draw_from_all(logits[row], specs[row], float(point[row]))
        else:
            tokens[row] = _nth(logits[row], values[row], int(index[row]))
    return tokens


def _mass(logits: Tensor, temperature: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over the vocabulary of exp((logit - largest) / temperature), per row."""
    scale = torch.from_numpy(temperature).to(logits.device, logits.dtype)[:, None]
    weights = torch.sub(logits, logits.max(dim=-1, keepdim=True).values).div_(scale).exp_()
    # A single row would be added up by several threads in parts, and the last bit would depend on that.
    masses = weights.expand(max(2, len(weights)), -1) if len(weights) == 1 else weights
    return np.asarray(masses.sum(dim=-1, dtype=torch.float64)[: len(weights)].cpu().numpy())


def _draw_from_all(logits: Tensor, spec: SampleSpec, point: float) -> int:
    """The draw of a row that its likeliest tokens do not decide: from the whole vocabulary, sorted."""
    values: NDArray[np.float32] = np.sort(logits.cpu().numpy())[::-1]
    weights = np.exp((values.astype(np.float64) - float(values[0])) / spec.temperature)
    cumulative = np.cumsum(weights[weights >= spec.min_p])
    last = len(cumulative) - 1
    if spec.top_p < 1:
        last = min(last, int(np.searchsorted(cumulative, spec.top_p * cumulative[-1])))
    index = int(np.searchsorted(cumulative, point * cumulative[last], side="right"))
    return _nth(logits, values, min(index, last))


def _nth(logits: Tensor, values: NDArray[np.float32], index: int) -> int:
    """The id of the value at `index` of the sorted `values`: which of equal ones topk takes is its own affair, here it
    is the lower ids."""
    rank = index - int(np.count_nonzero(values > values[index]))
    return int((logits == float(values[index])).nonzero()[rank, 0])
