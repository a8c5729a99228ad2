"""What an engine counts: for `stats()`, and for the report of each step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from raytier.engine.outputs import EngineStats, FinishedSample, LoopTimes, OutputDelta, SequenceUse, StepReport, add
from raytier.engine.requests import Request, Sample
from raytier.engine.step import StepStats
from raytier.kv.cache import KVCache
from raytier.kv.ledger import LedgerDelta


def sequence_use(request: Request, sample: Sample, kv: KVCache) -> SequenceUse:
    """What a running sample has of the KV."""
    sequence = sample.sequence
    return SequenceUse(
        request.request_id,
        sequence.spec.sample,
        len(sequence.tokens),
        sequence.num_computed,
        sequence.kv.num_blocks,
        kv.shared_blocks(sequence.kv),
    )


class Statistics:
    """Counters of one engine; not thread-safe, its lock is held around them."""

    def __init__(self) -> None:
        self.steps = 0
        self._reports = self._prompt_tokens = self._generated_tokens = 0
        self._finished: Counter[str] = Counter()
        self._last_step: StepStats | None = None
        self._total = StepStats()
        self._loop = LoopTimes()
        # Since the last report:
        self._first_tokens: list[float] = []
        self._token_gaps: list[float] = []
        self._ended: list[FinishedSample] = []

    def note_token(self, request: Request, sample: Sample, now: float) -> None:
        """A sample gets a token, which is not noted in its times yet."""
        self._generated_tokens += 1
        if sample.last_token is None:
            self._first_tokens.append(now - request.arrived)
        else:
            self._token_gaps.append(now - sample.last_token)

    def note_prompt(self, tokens: int) -> None:
        """The prompt of a sample has been read."""
        self._prompt_tokens += tokens

    def note_end(self, request: Request, sample: Sample, delta: OutputDelta) -> None:
        """A sample ended with `delta`."""
        assert delta.finish_reason is not None and delta.times is not None
        self._finished[delta.finish_reason] += 1
        self._ended.append(
            FinishedSample(
                delta.request_id,
                delta.index,
                delta.finish_reason,
                delta.prompt_tokens,
                delta.completion_tokens,
                request.params.n,
                request.params.max_tokens,
                sample.sequence.preemptions,
                delta.times,
            )
        )

    def note_step(self, stats: StepStats) -> None:
        """A step has been run."""
        self.steps += 1
        self._last_step = stats
        self._total = add(self._total, stats)

    def report(
        self, epoch: int, running: int, waiting: int, kv: LedgerDelta, stats: StepStats | None, times: LoopTimes
    ) -> StepReport | None:
        """What happened since the last report, which took the engine's thread `times`; None where nothing did."""
        self._loop = add(self._loop, times)
        ended, self._ended = tuple(self._ended), []
        first_tokens, self._first_tokens = tuple(self._first_tokens), []
        token_gaps, self._token_gaps = tuple(self._token_gaps), []
        if stats is None and not kv and not ended:
            return None
        self._reports += 1
        return StepReport(epoch, self._reports, running, waiting, stats, kv, times, first_tokens, token_gaps, ended)

    def snapshot(self, running: int, waiting: int, preemptions: int, kv: KVCache, dead: str | None) -> EngineStats:
        """The counters, and the load as it is now."""
        return EngineStats(
            running=running,
            waiting=waiting,
            steps=self.steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            finished=dict(self._finished),
            preemptions=preemptions,
            kv_blocks_total=kv.num_blocks,
            kv_blocks_used=kv.num_used,
            kv_blocks_free=kv.num_blocks - kv.num_used,
            kv_blocks_cached=kv.num_cached,
            kv_evictions=kv.num_evictions,
            kv_pressure=kv.pressure,
            kv_groups=kv.use(),
            kv=replace(kv.counts),
            last_step=self._last_step,
            total=self._total,
            loop=self._loop,
            dead=dead,
        )
