"""The step loop of one model: `schedule -> executor.step -> postprocess`, in a thread of its own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as SequenceOf
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

from raytier.checkpoint.manifest import GenerationDefaults
from raytier.config import Scheduler as SchedulerConfig
from raytier.engine.detokenizer import Detokenizer
from raytier.engine.outputs import EngineStats, OutputDelta, Sink, StepReport, add_stats, merge
from raytier.engine.sampling_params import SamplingParams
from raytier.engine.scheduler import Scheduler, SchedulerLimits
from raytier.engine.sequence import FinishReason, Sequence
from raytier.engine.step import StepBatch, StepExecutor, StepResult, StepStats
from raytier.engine.streams import LoopMailbox, StreamReader
from raytier.engine.tokenizer import Tokenizer
from raytier.errors import EngineDeadError, InvalidRequestError, QueueFullError, RaytierError
from raytier.kv.block_pool import BlockPool

logger = logging.getLogger(__name__)

CLOSED = "it was closed"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        scheduler: the application's `scheduler` section.
        max_num_batched_tokens, max_mixed_tokens: tokens that a step carries at most, as planned (`DevicePlan`).
        max_context: longest sequence in tokens, prompt included.
        vocab_size: of the model; prompts with other ids are refused before they reach the executor.
        epoch: which life of the engine this is; carried by every step and report.
    """

    scheduler: SchedulerConfig
    max_num_batched_tokens: int
    max_mixed_tokens: int
    max_context: int
    vocab_size: int
    epoch: int = 0


@dataclass(slots=True, eq=False)
class _Request:
    request_id: str
    sequence: Sequence
    detokenizer: Detokenizer
    sink: Sink


class Engine:
    """Serves one model: any thread or event loop submits, the engine's thread steps.

    One lock guards scheduler and requests; it is held for bookkeeping only, never while the executor runs
    a step or a sink is called. So submitting and aborting take effect during a long step: an abort frees its
    blocks at once, or when the step in flight has ended if that step writes to them.

    Args:
        block_pool: the blocks this engine may use; its own from now on.
        on_step: called on the engine's thread after every step; must not block.
    """

    def __init__(
        self,
        model_id: str,
        executor: StepExecutor,
        tokenizer: Tokenizer,
        block_pool: BlockPool,
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
        self._pool = block_pool
        self._on_step = on_step
        self._scheduler = Scheduler(model_id, block_pool, limits, epoch=config.epoch)
        self._changed = threading.Condition()
        self._requests: dict[str, _Request] = {}
        self._by_sequence: dict[int, _Request] = {}
        self._outbox: list[tuple[Sink, OutputDelta]] = []
        self._mailboxes: dict[asyncio.AbstractEventLoop, LoopMailbox] = {}
        self._ids = itertools.count(1)
        self._dead: str | None = None
        self._error: str | None = None
        self._closing = False
        self._steps = self._reports = self._prompt_tokens = self._generated_tokens = 0
        self._finished: Counter[str] = Counter()
        self._last_step: StepStats | None = None
        self._total = StepStats()
        self._thread = threading.Thread(target=self._run, name=f"engine-{model_id}", daemon=True)
        self._thread.start()

    # ---- callers' side: any thread -------------------------------------------------------------

    def submit(self, prompt_token_ids: SequenceOf[int], params: SamplingParams, sink: Sink) -> str:
        """Queue a request and return its id; `sink` gets its deltas, the last one with a finish_reason.

        Raises:
            InvalidRequestError: the prompt is empty, holds unknown ids or can never fit.
            QueueFullError: too many requests wait.
            EngineDeadError: the engine died or was closed.
        """
        tokens = list(prompt_token_ids)
        self._check_prompt(tokens)
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= frozenset(self.defaults.stop_token_ids)
        detokenizer = Detokenizer(
            self.tokenizer,
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
        )
        seed = secrets.randbits(63) if params.seed is None else params.seed
        longest = min(len(tokens) + params.max_tokens, self.config.max_context)
        with self._changed:
            self._check_alive()
            seq_id = next(self._ids)
            sequence = Sequence(seq_id, tokens, len(tokens), longest, params, seed, stop_ids)
            self._scheduler.add(sequence)
            request = _Request(f"{self.model_id}-{self.config.epoch}-{seq_id}", sequence, detokenizer, sink)
            self._requests[request.request_id] = request
            self._by_sequence[seq_id] = request
            self._changed.notify_all()
        return request.request_id

    def abort(self, request_id: str) -> bool:
        """End a request in any state; False when it is not known or has ended. Its sink gets a last delta."""
        with self._changed:
            request = self._requests.get(request_id)
            if request is None:
                return False
            self._scheduler.finish(request.sequence, FinishReason.ABORT)
            self._emit(request, request.detokenizer.flush()[0], ())
            self._changed.notify_all()
            return True

    async def stream(self, prompt_token_ids: SequenceOf[int], params: SamplingParams) -> AsyncIterator[OutputDelta]:
        """Deltas of a request: the first as soon as it exists, then all that is ready whenever the reader asks.

        Closing the generator (a client that went away) aborts the request.

        Raises:
            InvalidRequestError, QueueFullError, EngineDeadError: as `submit`, at the first `anext`;
                EngineDeadError also when the engine dies on the way.
        """
        loop = asyncio.get_running_loop()
        reader = StreamReader()
        with self._changed:
            mailbox = self._mailboxes.setdefault(loop, LoopMailbox(loop))
            mailbox.readers += 1
        try:
            request_id = self.submit(prompt_token_ids, params, partial(mailbox.post, reader))
            try:
                while True:
                    delta = await reader.get()
                    if delta.error is not None:
                        raise EngineDeadError(delta.error)
                    yield delta
                    if delta.finish_reason is not None:
                        return
            finally:
                self.abort(request_id)
        finally:
            with self._changed:
                mailbox.readers -= 1
                if not mailbox.readers:
                    self._mailboxes.pop(loop, None)

    def generate(
        self, prompts: SequenceOf[SequenceOf[int]], params: SamplingParams | SequenceOf[SamplingParams]
    ) -> list[OutputDelta]:
        """Run prompts to their end, blocking; one merged delta per prompt, in order. Not for the engine's sinks.

        More prompts than the queue holds are fed as places become free.

        Raises:
            InvalidRequestError: a prompt is refused (none of them is left running then).
            EngineDeadError: the engine died.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise InvalidRequestError(f"{len(prompts)} prompts but {len(each)} sampling params", param="params")
        arrived: SimpleQueue[tuple[int, OutputDelta]] = SimpleQueue()
        outputs: list[list[OutputDelta]] = [[] for _ in prompts]
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
                if delta.error is not None:
                    raise EngineDeadError(delta.error)
                outputs[index].append(delta)
                running -= delta.finish_reason is not None
        finally:
            for request_id in request_ids:
                self.abort(request_id)
        return [merge(deltas) for deltas in outputs]

    def stats(self) -> EngineStats:
        with self._changed:
            return EngineStats(
                running=self._scheduler.num_running,
                waiting=self._scheduler.num_waiting,
                steps=self._steps,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated_tokens,
                finished=dict(self._finished),
                preemptions=self._scheduler.num_preemptions,
                kv_blocks_total=self._pool.num_blocks,
                kv_blocks_used=self._pool.num_used,
                kv_blocks_free=self._pool.num_free,
                last_step=self._last_step,
                total=self._total,
                dead=self._dead,
            )

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
                result = self._executor.step(batch)
                self._postprocess(batch, result)
            if self._error is None:
                self._end_all(FinishReason.ABORT, CLOSED)
            else:
                self._end_all(FinishReason.ERROR, self._error)
        except BaseException as error:
            logger.exception("engine of %s died", self.model_id)
            self._end_all(FinishReason.ERROR, _reason(error))

    def _next_batch(self) -> StepBatch | None:
        """The next step, waiting for work; None when the engine closes."""
        while not self._closing:
            with self._changed:
                batch = self._scheduler.schedule()
            self._deliver()  # what aborts between the steps left
            if batch is not None:
                return batch
            self._rest()
        return None

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

    def _postprocess(self, batch: StepBatch, result: StepResult) -> None:
        """Book the result, turn new tokens into deltas, end what is finished, tell the readers."""
        with self._changed:
            for sequence, token in self._scheduler.apply(result):
                self._take_token(self._by_sequence[sequence.seq_id], token)
            self._steps += 1
            self._last_step = result.stats
            self._total = add_stats(self._total, result.stats)
        self._deliver()
        self._report(result.stats)

    def _take_token(self, request: _Request, token: int) -> None:
        sequence = request.sequence
        self._generated_tokens += 1
        if sequence.num_output == 1:
            self._prompt_tokens += sequence.prompt_len
        text, hit = "", False
        if sequence.finish_reason is not FinishReason.STOP:  # the text of a stop token is not output
            text, hit = request.detokenizer.push(token)
        if not hit and sequence.finished:
            rest, hit = request.detokenizer.flush()
            text += rest
        if hit:
            self._scheduler.finish(sequence, FinishReason.STOP)
            sequence.finish_reason = FinishReason.STOP  # also where the length was reached with the same token
        self._emit(request, text, (token,))

    def _emit(self, request: _Request, text: str, tokens: tuple[int, ...], error: str | None = None) -> None:
        sequence = request.sequence
        reason = None if sequence.finish_reason is None else sequence.finish_reason.value
        delta = OutputDelta(
            request.request_id, sequence.sample, text, tokens, reason, sequence.prompt_len, sequence.num_output, error
        )
        self._outbox.append((request.sink, delta))
        if reason is not None:
            self._finished[reason] += 1
            del self._requests[request.request_id]
            del self._by_sequence[sequence.seq_id]

    def _deliver(self) -> None:
        """Hand the deltas to their sinks, in order, without the lock: a sink may submit or abort."""
        with self._changed:
            outbox, self._outbox = self._outbox, []
            mailboxes = list(self._mailboxes.items())
        for sink, delta in outbox:
            try:
                sink(delta)
            except Exception:
                logger.exception("sink of request %s failed; the request is aborted", delta.request_id)
                self.abort(delta.request_id)
        for loop, mailbox in mailboxes:
            if orphans := mailbox.flush():
                self._mailboxes.pop(loop, None)
                for request_id in orphans:
                    self.abort(request_id)

    def _report(self, stats: StepStats | None) -> None:
        if self._on_step is None:
            return
        with self._changed:
            delta = self._scheduler.take_delta()
            if stats is None and not delta:
                return
            self._reports += 1
            running, waiting = self._scheduler.num_running, self._scheduler.num_waiting
        try:
            self._on_step(StepReport(self.config.epoch, self._reports, running, waiting, stats, delta))
        except Exception:
            logger.exception("on_step of the engine of %s failed; its report is lost", self.model_id)

    def _end_all(self, reason: FinishReason, why: str) -> None:
        """Finish every request and refuse new ones."""
        with self._changed:
            self._dead = why
            # A block pool in disorder may be the cause of death; the readers are told all the same.
            with suppress(ValueError):
                self._scheduler.drop_in_flight()
            for request in list(self._requests.values()):
                with suppress(ValueError):
                    self._scheduler.finish(request.sequence, reason)
                self._emit(request, "", (), why if reason is FinishReason.ERROR else None)
        self._deliver()
        self._report(None)

    def _check_prompt(self, tokens: list[int]) -> None:
        if not tokens:
            raise InvalidRequestError("the prompt is empty: at least one token is needed", param="prompt")
        if not all(type(token) is int for token in tokens):
            raise InvalidRequestError("the prompt must be a list of integer token ids", param="prompt")
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= self.config.vocab_size:
            raise InvalidRequestError(
                f"token ids must be between 0 and {self.config.vocab_size - 1}, the prompt has {low} to {high}",
                param="prompt",
            )

    def _check_alive(self) -> None:
        if self._dead is not None or self._closing:
            raise EngineDeadError(f"the engine of {self.model_id} does not run: {self._dead or self._error or CLOSED}")


def _put(arrived: SimpleQueue[tuple[int, OutputDelta]], position: int, delta: OutputDelta) -> None:
    arrived.put((position, delta))


def _reason(error: BaseException) -> str:
    return error.message if isinstance(error, RaytierError) else f"{type(error).__name__}: {error}"
