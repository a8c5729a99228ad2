"""Log-probabilities of tokens as the model itself gave them, in pieces of rows so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytier.engine.step import TokenLogprobs
from raytier.execution.drawing import likeliest

#: Bytes of fp32 logits that are worked on at once; three such pieces exist at a time.
PIECE_BYTES = 16 << 20


def token_logprobs(
    logits: Tensor, rows: Sequence[int], token_ids: Sequence[int], tops: Sequence[int]
) -> list[TokenLogprobs]:
    """Log-softmax in fp32 of some rows of `logits` `[n, vocab]`, of any dtype.

    Args:
        rows: which of them; the results are in this order.
        token_ids: the token of each that is asked for.
        tops: how many of the likeliest tokens to add to each.
    """
    results: list[TokenLogprobs] = []
    piece = max(1, PIECE_BYTES // (4 * logits.shape[1]))
    for start in range(0, len(rows), piece):
        stop = start + piece
        results += _piece(logits[list(rows[start:stop])].float(), token_ids[start:stop], tops[start:stop])
    return results


def _piece(logits: Tensor, token_ids: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs]:
    normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
    ids = torch.tensor(token_ids, device=logits.device)[:, None]
    chosen = logits.gather(-1, ids)
    ranks = 1 + (logits > chosen).sum(dim=-1)
    logprobs = (chosen - normaliser)[:, 0].tolist()
    most = min(max(tops), logits.shape[1])
    values, names = likeliest(logits, most) if most else (logits[:, :0], ids[:, :0])
    values = values - normaliser
    return [
        TokenLogprobs(token, logprob, rank, tuple(zip(best[:top], scores[:top], strict=True)))
        for token, logprob, rank, best, scores, top in zip(
            token_ids, logprobs, ranks.tolist(), names.tolist(), values.tolist(), tops, strict=True
        )
    ]
