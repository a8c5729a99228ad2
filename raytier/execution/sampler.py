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


def _draw(logits: Tensor, spec: SampleSpec) -> int:
    count = spec.top_k if 0 < spec.top_k < logits.shape[0] else logits.shape[0]
    # A stable order makes ties fall to the lower id on every device.
    values, ids = torch.sort(logits, descending=True, stable=True)
    probabilities = torch.softmax(values[:count].double() / spec.temperature, dim=-1)
    cumulative = torch.cumsum(probabilities, dim=-1)
    if spec.top_p < 1:
        # The token that crosses top_p belongs to the set.
        kept = int(torch.searchsorted(cumulative, spec.top_p).item()) + 1
        cumulative = cumulative[: min(kept, count)]
    target = uniform(spec) * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, target, right=True).item())
    return int(ids[min(index, cumulative.shape[0] - 1)])
