"""What an engine hands out: deltas to readers, a report per step, statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

from raytier.engine.step import StepStats, TokenLogprobs
from raytier.kv.ledger import LedgerDelta
from raytier.kv.usage import CacheCounts, GroupUse, Pressure


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """When what happened to a sample of a request; seconds of `time.monotonic()`, None where it never came to it.

    Attributes:
        arrived: the request was submitted.
        scheduled: the first step that carries it was made.
        first_token, last_token: a step that drew one had been booked.
        ended: it was finished, for whatever reason.
    """

    arrived: float
    scheduled: float | None
    first_token: float | None
    last_token: float | None
    ended: float

    @property
    def queue_s(self) -> float:
        """Time in the queue, until the first step or the end."""
        return (self.ended if self.scheduled is None else self.scheduled) - self.arrived

    @property
    def time_to_first_token_s(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrived

    @property
    def prefill_s(self) -> float | None:
        """From the first step to the first token."""
        return None if self.first_token is None or self.scheduled is None else self.first_token - self.scheduled

    @property
    def decode_s(self) -> float | None:
        """From the first token to the last one."""
        return None if self.first_token is None or self.last_token is None else self.last_token - self.first_token

    @property
    def total_s(self) -> float:
        return self.ended - self.arrived


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """New output of one sample of a request since its last delta.

    Attributes:
        index: sample of the request, 0 to n - 1.
        text: new text; empty while characters or a possible stop string are held back.
        token_ids: new tokens, the stop token that ended the sequence included.
        finish_reason: stop, length, abort, timeout or error on the last delta of this sample, else None.
        prompt_tokens: of the request. completion_tokens: of this sample so far.
        error: why, when finish_reason is error.
        done: nothing more comes of the request: this was the last delta of its last sample.
        logprobs: of each of `token_ids`, where the request asks for them.
        prompt_logprobs: of each token of the prompt (None for the first), where the request asks for them: with the
            first delta of sample 0.
        stop_reason: the stop string or the token id that ended the sample; None where it was the model's own end of
            sequence, or something else.
        cached_tokens: prompt tokens whose KV was found and not computed.
        times: on the last delta of this sample.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    error: str | None = None
    done: bool = False
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0
    times: RequestTimes | None = None


#: Receives the deltas of a request, at most one per sample and step, on the engine's thread: it must not block.
Sink = Callable[[OutputDelta], None]


def merge(deltas: Sequence[OutputDelta]) -> OutputDelta:
    """Consecutive deltas of one sample as one."""
    if len(deltas) == 1:
        return deltas[0]
    return replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(each for delta in deltas for each in delta.logprobs),
        prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), None),
        done=any(delta.done for delta in deltas),
    )


@dataclass(frozen=True, slots=True)
class FinishedSample:
    """One sample of a request that has ended, for statistics.

    Attributes:
        n, max_tokens: what the request asked for.
        preemptions: how often it lost its blocks and was recomputed.
    """

    request_id: str
    index: int
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    n: int
    max_tokens: int
    preemptions: int
    times: RequestTimes


@dataclass(frozen=True, slots=True)
class LoopTimes:
    """Where the engine's thread spent a step, in seconds: making it, waiting for the executor, and with its result
    (booking, text, readers). `execute_s` less the executor's own `wall_s` is the way there and back."""

    schedule_s: float = 0.0
    execute_s: float = 0.0
    process_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step, after the fact.

    Attributes:
        step: counts reports, so it is the `step` of `LeaseLedger.report`: one per step of the executor and
            one more whenever something changed without a step (an abort just before the engine goes idle).
        stats: what the step cost; None in a report without a step.
        kv: changes of the block tables.
        times: of the engine's thread; zeros in a report without a step.
        first_tokens: time to first token of each sample that got it in this step, in seconds.
        token_gaps: of each other sample that got a token, the time since its last one.
        finished: samples that ended since the last report.
    """

    epoch: int
    step: int
    num_running: int
    num_waiting: int
    stats: StepStats | None
    kv: LedgerDelta
    times: LoopTimes = LoopTimes()
    first_tokens: tuple[float, ...] = ()
    token_gaps: tuple[float, ...] = ()
    finished: tuple[FinishedSample, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceUse:
    """KV of a running sequence: its tokens, those with KV, its blocks over all groups, and of them those that other
    sequences use as well."""

    request_id: str
    index: int
    num_tokens: int
    num_computed: int
    num_blocks: int
    shared_blocks: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine started, and its present load.

    Attributes:
        running, waiting: sequences (samples of requests) now.
        steps: steps executed.
        prompt_tokens: prompt tokens of the samples whose prompts have been read.
        generated_tokens: tokens drawn.
        finished: samples by finish reason.
        kv_blocks_total, kv_blocks_used, kv_blocks_free: over all KV cache groups; shared blocks count once.
        kv_blocks_cached: of the free ones, those that are found by what they hold.
        kv_evictions: how many of these were taken for something else.
        loop: sums over all steps of where the engine's thread spent them.
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
    kv_blocks_cached: int
    kv_evictions: int
    kv_pressure: Pressure
    kv_groups: tuple[GroupUse, ...]
    kv: CacheCounts
    last_step: StepStats | None
    total: StepStats
    loop: LoopTimes
    dead: str | None


Sums = TypeVar("Sums", StepStats, LoopTimes)


def add(total: Sums, more: Sums) -> Sums:
    """Field-wise sum."""
    return type(total)(**{f.name: getattr(total, f.name) + getattr(more, f.name) for f in fields(total)})
