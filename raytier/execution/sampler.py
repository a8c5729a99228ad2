"""Drawing tokens where the logits are.

Every draw uses one uniform number that depends only on (seed, sample, position): Philox, a counter-based
generator (Salmon et al., SC'11), keyed by seed and sample with the position as its counter. The result is
therefore the same whatever else is in the batch, and after preemption or a restart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
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


def sample(logits: Tensor, specs: Sequence[SampleSpec]) -> list[int]:
    """One token id per row of `logits` `[n, vocab]`.

    Greedy where the temperature is 0, else temperature, then top-k, then top-p (the smallest set whose
    probability reaches top_p, at least one token), then the inverse of the cumulative distribution.
    """
    logits = logits.float()
    tokens = torch.argmax(logits, dim=-1).tolist()
    for row, spec in enumerate(specs):
        if spec.temperature > 0:
            tokens[row] = _draw(logits[row], spec)
    return [int(token) for token in tokens]


def _draw(logits: Tensor, spec: SampleSpec, look_at: int = _LIKELY) -> int:
    """The draw of `spec`, from the `look_at` most likely tokens if it is certain to fall to one of them."""
    vocab = logits.shape[0]
    limited = 0 < spec.top_k < vocab
    count = spec.top_k if limited else min(look_at, vocab)
    values, ids = _most_likely(logits, count)
    total = torch.logsumexp((values if limited else logits).double() / spec.temperature, dim=-1)
    cumulative = torch.cumsum(torch.exp(values.double() / spec.temperature - total), dim=-1)
    drawn = uniform(spec)
    if spec.top_p < 1:
        # The token that crosses top_p belongs to the set.
        last = min(int(torch.searchsorted(cumulative, spec.top_p).item()), count - 1)
        mass = float(cumulative[last])
        certain = mass >= spec.top_p
    else:
        last, mass = count - 1, 1.0
        certain = drawn < float(cumulative[last])
    if count < vocab and not limited and not certain:
        return _draw(logits, spec, vocab)
    index = int(torch.searchsorted(cumulative, drawn * mass, right=True).item())
    return int(ids[min(index, last)])


def _most_likely(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values and their ids, largest first, in a stable order: ties fall to the lower id."""
    if count == logits.shape[0]:
        values, ids = torch.sort(logits, descending=True, stable=True)
        return values, ids
    ids = (~(logits < torch.topk(logits, count).values[-1])).nonzero()[:, 0]  # "not less": NaN is no error here
    values, order = torch.sort(logits[ids], descending=True, stable=True)
    return values[:count], ids[order[:count]]
