"""The step loop of one model: `schedule -> executor.step -> postprocess`, in a thread of its own."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as SequenceOf
from contextlib import suppress
from functools import partial
from queue import SimpleQueue

from raytier.checkpoint.manifest import GenerationDefaults
from raytier.engine.config import EngineConfig
from raytier.engine.outputs import EngineStats, LoopTimes, OutputDelta, SequenceUse, Sink, StepReport, merge
from raytier.engine.requests import CheckedParams, Request, Sample, build_request, check_prompt, check_terms, specify
from raytier.engine.sampling_params import SamplingParams
from raytier.engine.scheduler import Scheduler, SchedulerLimits
from raytier.engine.sequence import FinishReason
from raytier.engine.statistics import Statistics, sequence_use
from raytier.engine.step import StepBatch, StepExecutor, StepResult, StepStats, TokenLogprobs
from raytier.engine.streams import Mailboxes, StreamReader
from raytier.engine.tokenizer import Tokenizer
from raytier.errors import EngineDeadError, GenerationError, InvalidRequestError, QueueFullError, RaytierError
from raytier.kv.cache import KVCache

logger = logging.getLogger(__name__)

CLOSED = "it was closed"
NO_TIME = LoopTimes()


class Engine:
    """Serves one model: any thread or event loop submits, the engine's thread steps.

    One lock guards scheduler and requests; it is held for bookkeeping only, never while the executor runs
    a step or a sink is called. So submitting and aborting take effect during a long step: an abort frees its
    blocks at once, or when the step in flight has ended if that step writes to them.

    Args:
        kv: the blocks this engine may use; its own from now on, and others read its policy alone.
        on_step: called on the engine's thread after every step; must not block. `observe` adds further ones.
    """

    def __init__(
        self,
        model_id: str,
        executor: StepExecutor,
        tokenizer: Tokenizer,
        kv: KVCache,
        defaults: GenerationDefaults,
        config: EngineConfig,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> None:
        self.model_id = model_id
        self.tokenizer = tokenizer
        self.defaults = defaults
        self.config = config
        section = config.scheduler
        limits = SchedulerLimits(
            section.max_num_seqs,
            config.max_num_batched_tokens,
            config.max_mixed_tokens,
            section.max_queue,
            config.max_context,
        )
        self._executor = executor
        self.kv = kv
        self._observers: tuple[Callable[[StepReport], None], ...] = () if on_step is None else (on_step,)
        self._scheduler = Scheduler(model_id, kv, limits, epoch=config.epoch)
        self._changed = threading.Condition()
        self._requests: dict[str, Request] = {}
        self._by_sequence: dict[int, tuple[Request, Sample]] = {}
        self._deadlines: dict[str, float] = {}
        self._outbox: list[tuple[Sink, OutputDelta]] = []
        self._mailboxes = Mailboxes()
        self._ids = itertools.count(1)
        self._dead: str | None = None
        self.failure: BaseException | None = None  # what a step raised
        self._error: str | None = None
        self._closing = False
        self._statistics = Statistics()
        self._schedule_s = 0.0
        self._thread = threading.Thread(target=self._run, name=f"engine-{model_id}", daemon=True)
        self._thread.start()

    # ---- callers' side: any thread -------------------------------------------------------------
    def observe(self, on_step: Callable[[StepReport], None]) -> None:
        """Have `on_step` called on the engine's thread after every step from now on; it must not block."""
        with self._changed:
            self._observers = (*self._observers, on_step)

    def check(self, params: SamplingParams) -> CheckedParams:
        """What `params` mean to this model. A new grammar may take a second to compile, and many bad words as long to
        encode: call this where waiting does no harm, and submit its result on an event loop.

        Raises:
            InvalidRequestError: the message says what, and where.
        """
        return specify(params, self.tokenizer, self.defaults, self.config.vocab_size)

    def submit(
        self,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams | CheckedParams,
        sink: Sink,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> str:
        """Queue a request and return its id; `sink` gets its deltas, the last one of each sample with a finish_reason,
        the very last one `done`.

        Args:
            params: as `check` returns them, or to be checked here.
            priority: lower ones go first, where `scheduler.policy` is priority.
            timeout_s: from now on; what is there by then is the output, with finish_reason timeout.

        Raises:
            InvalidRequestError: the prompt is empty, holds unknown ids or can never fit; the model cannot do what
                `params` say.
            QueueFullError: too many requests wait.
            EngineDeadError: the engine died or was closed.
        """
        arrived = time.monotonic()
        check_prompt(prompt_token_ids, self.config.vocab_size, self.config.max_context)
        check_terms(priority, timeout_s, self.config.scheduler.policy)
        first = next(self._ids)
        request = build_request(
            prompt_token_ids,
            params if isinstance(params, CheckedParams) else self.check(params),
            sink,
            f"{self.model_id}-{self.config.epoch}-{first}",
            itertools.chain([first], self._ids),
            arrived=arrived,
            priority=priority,
            tokenizer=self.tokenizer,
            max_context=self.config.max_context,
        )
        with self._changed:
            self._check_alive()
            self._scheduler.add(*(sample.sequence for sample in request.samples))
            self._requests[request.request_id] = request
            self._by_sequence |= {sample.sequence.seq_id: (request, sample) for sample in request.samples}
            if timeout_s is not None:
                self._deadlines[request.request_id] = arrived + timeout_s
            self._changed.notify_all()
        return request.request_id

    def abort(self, request_id: str) -> bool:
        """End a request in any state; False when it is not known or has ended. Its sink gets the last deltas."""
        with self._changed:
            return self._end(request_id, FinishReason.ABORT)

    def _end(self, request_id: str, reason: FinishReason) -> bool:
        """End what is left of a request, under the lock."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        for sample in request.samples:
            if self._scheduler.finish(sample.sequence, reason):
                self._emit(request, sample, sample.detokenizer.flush()[0])
        self._changed.notify_all()
        return True

    async def stream(
        self,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams | CheckedParams,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[OutputDelta]:
        """Deltas of a request: the first as soon as it exists, then all that is ready whenever the reader asks.

        Closing the generator (a client that went away) aborts the request.

        Raises:
            InvalidRequestError, QueueFullError, EngineDeadError: as `submit`, at the first `anext`;
                EngineDeadError also when the engine dies on the way.
            GenerationError: no token is left to draw.
        """
        reader = StreamReader()
        with self._mailboxes.reading() as mailbox:
            sink = partial(mailbox.post, reader)
            request_id = self.submit(prompt_token_ids, params, sink, priority=priority, timeout_s=timeout_s)
            try:
                done = False
                while not done:
                    for delta in await reader.get():
                        self._raise_error(delta)
                        yield delta
                        done = delta.done
            finally:
                self.abort(request_id)

    def generate(
        self, prompts: SequenceOf[SequenceOf[int]], params: SamplingParams | SequenceOf[SamplingParams]
    ) -> list[OutputDelta]:
        """Run prompts to their end, blocking; one merged delta per prompt and sample, in order. Not for the engine's
        sinks.

        More prompts than the queue holds are fed as places become free.

        Raises:
            InvalidRequestError: a prompt is refused (none of them is left running then).
            EngineDeadError: the engine died. GenerationError: no token is left to draw.
        """
        if isinstance(params, SamplingParams):
            each = [self.check(params)] * len(prompts)
        else:
            each = [self.check(one) for one in params]
        if len(each) != len(prompts):
            raise InvalidRequestError(f"{len(prompts)} prompts but {len(each)} sampling params", param="params")
        arrived: SimpleQueue[tuple[int, OutputDelta]] = SimpleQueue()
        outputs: list[list[list[OutputDelta]]] = [[[] for _ in range(one.params.n)] for one in each]
        request_ids: list[str] = []
        running = 0
        try:
            while len(request_ids) < len(prompts) or running:
                position = len(request_ids)
                if position < len(prompts):
                    try:
                        sink = partial(_put, arrived, position)
                        request_ids.append(self.submit(prompts[position], each[position], sink))
                        running += 1
                        continue
                    except QueueFullError:
                        if not running:
                            raise
                index, delta = arrived.get()
                self._raise_error(delta)
                outputs[index][delta.index].append(delta)
                running -= delta.done
        finally:
            for request_id in request_ids:
                self.abort(request_id)
        return [merge(deltas) for samples in outputs for deltas in samples]

    def stats(self) -> EngineStats:
        with self._changed:
            load = self._scheduler.num_running, self._scheduler.num_waiting, self._scheduler.num_preemptions
            return self._statistics.snapshot(*load, self.kv, self._dead)

    def kv_sequences(self) -> list[SequenceUse]:
        """The running sequences and their blocks."""
        with self._changed:
            return [sequence_use(*each, self.kv) for each in self._by_sequence.values() if each[1].sequence.kv.tables]

    def clear_prefix_cache(self) -> int:
        """Have later requests compute their prompts anew, because the weights are not what they were; returns how many
        blocks are not found any more. Running requests keep their KV and share it with nobody."""
        with self._changed:
            return self.kv.clear()

    @property
    def dead(self) -> str | None:
        """Why the engine does not work any more; None while it does."""
        return self._dead

    def close(self, error: str | None = None) -> None:
        """Abort everything and end the thread; returns after the step in flight. May be called again.

        Args:
            error: why the engine ends before its requests do; their readers get it as an error instead of an abort.
        """
        with self._changed:
            self._closing = True
            self._error = self._error or error
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # ---- the engine's thread -------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (batch := self._next_batch()) is not None:
                began = time.perf_counter()
                result = self._executor.step(batch)
                self._postprocess(batch, result, time.perf_counter() - began)
            if self._error is None:
                self._end_all(FinishReason.ABORT, CLOSED)
            else:
                self._end_all(FinishReason.ERROR, self._error)
        except BaseException as error:
            logger.exception("engine of %s died", self.model_id)
            self.failure = error
            self._end_all(FinishReason.ERROR, _reason(error))

    def _next_batch(self) -> StepBatch | None:
        """The next step, waiting for work; None when the engine closes."""
        while not self._closing:
            began = time.perf_counter()
            with self._changed:
                self._expire()
                batch = self._scheduler.schedule()
                if batch is not None:
                    now = time.monotonic()
                    for arrival in batch.arrivals:
                        sample = self._by_sequence[arrival.seq_id][1]
                        sample.scheduled = now if sample.scheduled is None else sample.scheduled
            self._schedule_s = time.perf_counter() - began
            self._deliver()  # what aborts between the steps left
            if batch is not None:
                return batch
            self._rest()
        return None

    def _expire(self) -> None:
        """End the requests whose time is over."""
        if self._deadlines:
            now = time.monotonic()
            for request_id in [each for each, deadline in self._deadlines.items() if deadline <= now]:
                self._end(request_id, FinishReason.TIMEOUT)

    def _rest(self) -> None:
        """Nothing to run: check the books, report blocks that came back without a step, sleep until needed."""
        with self._changed:
            if not self._idle():
                return
            self._scheduler.check_integrity()
        self._report(None)
        with self._changed:
            self._changed.wait_for(lambda: not self._idle())

    def _idle(self) -> bool:
        return not (self._closing or self._outbox or self._scheduler.has_work)

    def _postprocess(self, batch: StepBatch, result: StepResult, execute_s: float) -> None:
        """Book the result, turn new tokens into deltas, end what is finished, tell the readers."""
        began, now = time.perf_counter(), time.monotonic()
        with self._changed:
            news = self._scheduler.apply(result)
            for seq_id, logprobs in result.prompt_logprobs.items():
                if seq_id in self._by_sequence:
                    self._by_sequence[seq_id][0].take_prompt_logprobs(logprobs)
            for sequence, token in news:
                self._take(*self._by_sequence[sequence.seq_id], token, result, now)
            self._statistics.note_step(result.stats)
        self._deliver()
        self._report(result.stats, LoopTimes(self._schedule_s, execute_s, time.perf_counter() - began))

    def _take(self, request: Request, sample: Sample, token: int | None, result: StepResult, now: float) -> None:
        """A new token of a sample, or its end without one."""
        sequence = sample.sequence
        if token is not None:
            self._statistics.note_token(request, sample, now)
        if sequence.num_output == (token is not None):
            self._statistics.note_prompt(sequence.prompt_len)
        text, hit = request.take(sample, token, now)
        if hit:
            self._scheduler.finish(sequence, FinishReason.STOP)
            sequence.finish_reason = FinishReason.STOP  # also where the length was reached with the same token
        seq_id = sequence.seq_id
        self._emit(request, sample, text, token, result.logprobs.get(seq_id), result.failed.get(seq_id))

    def _emit(
        self,
        request: Request,
        sample: Sample,
        text: str,
        token: int | None = None,
        logprobs: TokenLogprobs | None = None,
        error: str | None = None,
    ) -> None:
        delta = request.delta(sample, text, token, logprobs, time.monotonic(), error)
        self._outbox.append((request.sink, delta))
        if delta.finish_reason is None:
            return
        self._statistics.note_end(request, sample, delta)
        del self._by_sequence[sample.sequence.seq_id]
        if delta.done:
            del self._requests[request.request_id]
            self._deadlines.pop(request.request_id, None)

    def _deliver(self) -> None:
        """Hand the deltas to their sinks, in order, without the lock: a sink may submit or abort."""
        with self._changed:
            outbox, self._outbox = self._outbox, []
        for sink, delta in outbox:
            try:
                sink(delta)
            except Exception:
                logger.exception("sink of request %s failed; the request is aborted", delta.request_id)
                self.abort(delta.request_id)
        for request_id in self._mailboxes.flush():
            self.abort(request_id)

    def _report(self, stats: StepStats | None, times: LoopTimes = NO_TIME) -> None:
        scheduler = self._scheduler
        with self._changed:
            report = self._statistics.report(
                self.config.epoch, scheduler.num_running, scheduler.num_waiting, scheduler.take_delta(), stats, times
            )
            observers = self._observers
        if report is None:
            return
        for observer in observers:
            try:
                observer(report)
            except Exception:
                logger.exception("on_step of the engine of %s failed; its report is lost", self.model_id)

    def _end_all(self, reason: FinishReason, why: str) -> None:
        """Finish every request and refuse new ones."""
        with self._changed:
            self._dead = why
            # A block pool in disorder may be the cause of death; the readers are told all the same.
            with suppress(ValueError):
                self._scheduler.drop_in_flight()
            for request, sample in list(self._by_sequence.values()):
                with suppress(ValueError):
                    self._scheduler.finish(sample.sequence, reason)
                self._emit(request, sample, "", error=why if reason is FinishReason.ERROR else None)
        self._deliver()
        self._report(None)

    def _raise_error(self, delta: OutputDelta) -> None:
        if delta.error is not None:
            raise EngineDeadError(delta.error) if self._dead is not None else GenerationError(delta.error)

    def _check_alive(self) -> None:
        if self._dead is not None or self._closing:
            raise EngineDeadError(f"the engine of {self.model_id} does not run: {self._dead or self._error or CLOSED}")


def _put(arrived: SimpleQueue[tuple[int, OutputDelta]], position: int, delta: OutputDelta) -> None:
    arrived.put((position, delta))


def _reason(error: BaseException) -> str:
    return error.message if isinstance(error, RaytierError) else f"{type(error).__name__}: {error}"
