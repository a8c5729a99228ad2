"""How many tokens a step with decodes may carry, so that a long prompt does not stop running streams. Pure."""

from __future__ import annotations

from raytier.hardware.rates import Rates
from raytier.planner.cost import StepLoad, Sweep, predict

#: Bounds of what is planned. Below 16 prompt tokens per step linear layers do little more than at one; above 2048
#: they do no better.
LEAST_TOKENS, MOST_TOKENS = 16, 2048
#: Seconds of compute that a step with prompt tokens may take: text that pauses four times a second still reads as
#: flowing, and at this size the linear layers of a CPU are near their best rate already.
TARGET_SECONDS = 0.25
#: Where a decode step alone computes for so long that the target is not to be had, prompts may double it.
DECODE_SHARE = 2.0
#: Prompt tokens that lengthen a step by no more than this are hidden behind its reading.
HIDDEN = 1.05


def step_tokens(sweep: Sweep, rates: Rates, *, sequences: int, context: int, max_num_seqs: int) -> int:
    """Tokens that a step carries at most: the decodes of `sequences` streams, and of a prompt beside them as many as

    - hide behind the reading of a streamed sweep (the step takes hardly longer than without them), or
    - keep the step within 0.25 s, or within twice the compute of the decode step where that is longer,

    whichever is more. At least 16 and at most 2048 of the prompt, and never less than one per sequence that may run, so
    that all of them go on in every step.

    Args:
        sequences: streams that run, each with `context` tokens behind it.
    """
    decode = predict(sweep, rates, StepLoad(sequences, context))
    computing = decode.compute_seconds + decode.attention_seconds + decode.overhead_seconds
    limit = max(HIDDEN * decode.seconds, TARGET_SECONDS, DECODE_SHARE * computing)
    low, high = LEAST_TOKENS, MOST_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        # The end of a prompt of the expected length: its tokens attend to all before them, which takes longest.
        load = StepLoad(sequences, context, middle, max(0, context - middle))
        if predict(sweep, rates, load).seconds <= limit:
            low = middle
        else:
            high = middle - 1
    return max(max_num_seqs, min(MOST_TOKENS, low + sequences))
