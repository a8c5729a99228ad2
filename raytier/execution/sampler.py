"""Drawing tokens where the logits are.

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


def sample(logits: Tensor, specs: Sequence[SampleSpec]) -> list[int]:
    """One token id per row of `logits` `[n, vocab]`.

    Greedy where the temperature is 0 (the lowest id of equal ones), else temperature, then top-k, then top-p (the
    smallest set whose probability reaches top_p, at least one token), then the inverse of the cumulative distribution.
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


def _draw(logits: Tensor, specs: Sequence[SampleSpec]) -> list[int]:
    """The draws of `specs` from rows of `logits`; what a row yields does not depend on the others."""
    vocab = logits.shape[1]
    looks = [spec.top_k if 0 < spec.top_k < vocab else min(_LIKELY, vocab) for spec in specs]
    # One more than a row looks at, so that it knows whether its last one is tied with the next.
    values, ids = torch.topk(logits, min(max(looks) + 1, vocab))
    ids, by_id = torch.sort(ids, dim=-1)
    values, by_value = torch.sort(values.gather(-1, by_id), dim=-1, descending=True, stable=True)
    likeliest, names = values.cpu().numpy(), ids.gather(-1, by_value).cpu().numpy()
    return [
        _draw_row(logits[row], spec, look, likeliest[row, : look + 1], names[row])
        for row, (spec, look) in enumerate(zip(specs, looks, strict=True))
    ]


def _draw_row(
    logits: Tensor, spec: SampleSpec, look: int, values: NDArray[np.float32], ids: NDArray[np.int64] | None
) -> int:
    """The draw of `spec` from one row of logits.

    Args:
        look: the number of likeliest tokens to draw from; more are taken where these do not decide it.
        values: their logits, largest first, and of one more where there is one.
        ids: their ids, lower ones first among equals; None to look an id up when it is known which.
    """
    top = float(values[0])
    if not np.isfinite(top):  # certain, or nothing that can be compared
        return int(logits.argmax())
    whole = look == logits.shape[0] or spec.top_k == look  # nothing else can be drawn
    cumulative = np.cumsum(np.exp((values[:look].astype(np.float64) - top) / spec.temperature))
    mass = float(cumulative[-1])
    if not whole:
        mass = float(torch.exp((logits - top) / spec.temperature).sum(dtype=torch.float64))
    last = look - 1
    if spec.top_p < 1:
        # The token that crosses top_p belongs to the set.
        last = int(np.searchsorted(cumulative, spec.top_p * mass))
        mass = float(cumulative[min(last, look - 1)])
    index = int(np.searchsorted(cumulative, uniform(spec) * mass, side="right"))
    if max(last, index) >= look and not whole:
        everything = np.sort(logits.cpu().numpy())[::-1]
        return _draw_row(logits, spec, len(everything), everything, None)
    index = min(index, last, look - 1)
    if ids is not None and values[index] != values[-1]:
        return int(ids[index])
    # Which of equal ones topk takes is its own affair. Here it is the lower ids.
    rank = index - int(np.count_nonzero(values > values[index]))
    return int((logits == float(values[index])).nonzero()[rank, 0])
