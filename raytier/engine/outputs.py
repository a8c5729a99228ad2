"""What an engine hands out: deltas to readers, a report per step, statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from raytier.engine.step import StepStats
from raytier.kv.ledger import LedgerDelta


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """New output of one request since its last delta.

    Attributes:
        index: sample of the request (0 while requests have one sample).
        text: new text; empty while characters or a possible stop string are held back.
        token_ids: new tokens, the stop token that ended the sequence included.
        finish_reason: stop, length, abort or error on the last delta, else None.
        prompt_tokens, completion_tokens: totals of the request so far.
        error: why, when finish_reason is error.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    error: str | None = None


#: Receives the deltas of a request, at most one per step, on the engine's thread: it must not block.
Sink = Callable[[OutputDelta], None]


def merge(deltas: Sequence[OutputDelta]) -> OutputDelta:
    """Consecutive deltas of one request as one."""
    if len(deltas) == 1:
        return deltas[0]
    return replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
    )


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step, after the fact.

    Attributes:
        step: counts reports, so it is the `step` of `LeaseLedger.report`: one per step of the executor and
            one more whenever blocks came back without a step (an abort just before the engine goes idle).
        stats: what the step cost; None in a report without a step.
        kv: changes of the block tables.
    """

    epoch: int
    step: int
    num_running: int
    num_waiting: int
    stats: StepStats | None
    kv: LedgerDelta


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine started, and its present load.

    Attributes:
        running, waiting: sequences now.
        steps: steps executed.
        prompt_tokens: prompt tokens of the requests that produced their first token.
        generated_tokens: tokens drawn.
        finished: requests by finish reason.
        last_step, total: what the last step cost and the sums over all steps (last_step None before the first).
        dead: why the engine does not work any more, None while it does.
    """

    running: int
    waiting: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    finished: Mapping[str, int]
    preemptions: int
    kv_blocks_total: int
    kv_blocks_used: int
    kv_blocks_free: int
    last_step: StepStats | None
    total: StepStats
    dead: str | None

    @property
    def aborted(self) -> int:
        return self.finished.get("abort", 0)


def add_stats(total: StepStats, step: StepStats) -> StepStats:
    """Field-wise sum."""
    return StepStats(**{f.name: getattr(total, f.name) + getattr(step, f.name) for f in fields(StepStats)})
