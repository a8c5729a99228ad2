"""What runs next: continuous batching with chunked prefill, by priority and arrival. Pure: ids and lengths only.

`schedule` makes a step, `apply` takes its result; between the two the step is *in flight* and its blocks
are being written. Every running sequence holds the blocks of all its known tokens from its admission on (one
allocation, so a prompt lies in few runs); later it needs a block only when decoding crosses a block border. Layers with
a window hold no more than that and the step.

A sequence begins with what is found of its tokens in the prefix cache, or with the blocks of another sample of its
request; at least its last token is always computed.
"""

from __future__ import annotations

import time
from bisect import insort
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter

from raytier.engine.sequence import FinishReason, Samples, Sequence, Status
from raytier.engine.step import Arrival, SequenceChunk, StepBatch, StepResult
from raytier.errors import EngineDeadError, InvalidRequestError, QueueFullError
from raytier.kv.cache import KVCache
from raytier.kv.ledger import LedgerDelta
from raytier.kv.orders import KVOrders
from raytier.kv.tables import BlockCopy, Prefix
from raytier.kv.usage import Pressure

#: Least prompt tokens per step whose logprobs are computed, so that a crowd of decodes does not starve them.
_LEAST_ROWS = 16

_order = attrgetter("order")


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """max_num_seqs: sequences that run at once; max_num_batched_tokens: tokens of a step; max_mixed_tokens: of a step
    that carries decodes, which wait for its prompt tokens; max_queue: sequences that may wait; max_context: longest
    sequence in tokens."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_mixed_tokens: int
    max_queue: int
    max_context: int


@dataclass(slots=True)
class _Budget:
    """What is left of a step: tokens for decodes and for prefills, and logits of prompt tokens."""

    decodes: int
    prefill: int
    rows: int

    def take(self, sequence: Sequence, count: int) -> int:
        """Set aside up to `count` prefill tokens of a sequence; how many it gets."""
        count = min(count, self.prefill)
        if (excess := sequence.logit_rows(count) - self.rows) > 0:
            # The last token of a prompt needs no row, and does not come before the others.
            count = min(count, sequence.prompt_len - 1 - sequence.num_computed) - excess
        self.rows -= sequence.logit_rows(count)
        self.prefill -= count
        return count


def check_length(prompt: int, longest: int, context: int) -> None:
    """Refuse a prompt that leaves no room in the context.

    Args:
        prompt: its tokens. longest: with those to be generated. context: longest sequence in tokens.

    Raises:
        InvalidRequestError: shorten it.
    """
    if prompt > context or prompt == context != longest:
        raise InvalidRequestError(
            f"the prompt has {prompt} tokens and leaves no room to generate: the context is "
            f"{context} tokens; shorten it by at least {prompt - context + 1}",
            param="prompt",
        )


class Scheduler:
    """Decides which tokens of which sequences a step carries, and which blocks these have.

    Order within a step: running decodes, running prefills (chunked by what is left of the budget), then
    waiting sequences. When blocks run out the last running sequence is preempted: its blocks come back
    and it is recomputed later, from its place in the queue. A sequence that waits preempts none that runs.

    A sample whose prompt another one of its request is computing waits for it, and those behind it do not.

    Invariants: `running` and `waiting` are each in order of (priority, arrival); no block that is written to is in two
    block tables (`KVCache`); a step carries at most max_num_batched_tokens tokens, with a decode among them
    max_mixed_tokens; at most max_num_seqs sequences run; logprobs are computed of at most 2 x max_num_seqs prompt
    tokens per step.
    Progress: the first running sequence can always preempt the others, and `add` refuses what does not
    fit alone, so it finishes; then the next one is the first.
    """

    def __init__(self, model_id: str, kv: KVCache, limits: SchedulerLimits, *, epoch: int = 0) -> None:
        self._model_id = model_id
        self._kv = kv
        self._limits = limits
        self._epoch = epoch
        self._step = 0
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._in_flight: dict[int, tuple[Sequence, SequenceChunk]] = {}
        self._stepping = False  # between `schedule` and `apply`
        self._sent: set[int] = set()  # sequences that the executor knows
        self._ended: list[int] = []  # what it knows and may forget
        self._next_check = 0.0
        self._copies: list[BlockCopy] = []  # of the step that is being made
        self.num_preemptions = 0
        self.num_restarts = 0  # sequences whose KV could not be loaded

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def add(self, *sequences: Sequence) -> None:
        """Queue new sequences, all or none. Their `max_tokens` is the length at which they will finish.

        Raises:
            InvalidRequestError: one could never run, with the numbers.
            QueueFullError: max_queue sequences would wait.
        """
        for sequence in sequences:
            self._check_fits(sequence)
        limit = self._limits.max_queue
        if len(sequences) > limit:
            raise InvalidRequestError(
                f"{len(sequences)} samples of one request; at most {limit} can wait (scheduler.max_queue): lower n",
                param="n",
            )
        if len(self._waiting) + len(sequences) > limit:
            raise QueueFullError(
                f"the request queue is full: {len(self._waiting)} waiting (scheduler.max_queue), "
                f"{len(self._running)} running; retry later"
            )
        samples = Samples(sequences) if len(sequences) > 1 else None
        for sequence in sequences:
            sequence.samples = samples
            insort(self._waiting, sequence, key=_order)

    def schedule(self) -> StepBatch | None:
        """The next step, now in flight; None when nothing can run (only when nothing waits or runs).

        Raises:
            RuntimeError: the last step's result has not been applied.
        """
        if self._stepping:
            raise RuntimeError(f"step {self._step} is in flight: apply its result first")
        planned, budget, preempted = self._plan_running()
        if preempted and not planned:
            return self.schedule()  # fewer run now, so this ends
        if not preempted:
            planned += self._admit(budget)
        if not planned:
            return None
        chunks, arrivals = [], []
        for sequence, count in planned:
            start, known = sequence.num_computed, len(sequence.tokens)
            tokens = tuple(sequence.tokens[start : start + count])
            draws = start + count == known < sequence.max_tokens
            first, *further = sequence.kv.chunk_tables()
            chunk = SequenceChunk(sequence.seq_id, tokens, start, first, draws, tuple(further))
            self._in_flight[sequence.seq_id] = (sequence, chunk)
            chunks.append(chunk)
            if sequence.seq_id not in self._sent:
                self._sent.add(sequence.seq_id)
                arrivals.append(sequence.arrival())
        return self._batch(tuple(chunks), tuple(arrivals), self._kv.take_orders())

    def schedule_moves(self, *, keep: bool = False) -> StepBatch | None:
        """A step that runs nothing, and ends when KV that belongs on disk is there; None where there is none.

        Args:
            keep: give up part of what is on the device, so that it goes there too.

        Raises:
            RuntimeError: the last step's result has not been applied.
        """
        if self._stepping:
            raise RuntimeError(f"step {self._step} is in flight: apply its result first")
        lower = self._kv.lower
        if lower is None or not (lower.has_writes or (keep and self._kv.num_cached)):
            return None
        if keep:
            self._kv.evict(max(1, lower.shape.host_slots // 4))
        orders = self._kv.take_orders(settle=True)
        return None if orders is None else self._batch((), (), orders)

    def _batch(
        self, chunks: tuple[SequenceChunk, ...], arrivals: tuple[Arrival, ...], moves: KVOrders | None
    ) -> StepBatch:
        self._step += 1
        self._stepping = True
        ended, self._ended = tuple(self._ended), []
        copies, self._copies = tuple(self._copies), []
        return StepBatch(self._model_id, self._epoch, self._step, chunks, arrivals, ended, copies, moves)

    def apply(self, result: StepResult) -> list[tuple[Sequence, int | None]]:
        """Take the result of the step in flight: (sequence, new token) for each token drawn, and (sequence, None) for
        each that ended without one.

        A sequence that reached a stop token or its length is finished when this returns, and so is one whose token
        could not be drawn. Sequences aborted while the step ran are dropped here, their blocks freed now. Those whose
        KV could not be loaded begin again; what the step brought for them is taken out of `result`.

        Raises:
            EngineDeadError: the result is not that of the step in flight, or a token is missing.
        """
        if not self._stepping or result.step != self._step:
            raise EngineDeadError(f"result of step {result.step}, but step {self._step} was expected")
        answered = result.tokens.keys() | result.failed.keys()
        missing = [seq_id for seq_id, (_, chunk) in self._in_flight.items() if chunk.draws and seq_id not in answered]
        if missing:
            raise EngineDeadError(f"step {result.step} returned no token for sequences {missing}")
        news: list[tuple[Sequence, int | None]] = []
        in_flight, self._in_flight = self._in_flight, {}
        self._stepping = False
        lost = self._moved(result)
        for sequence, chunk in in_flight.values():
            if sequence.finished:
                self._kv.release(sequence.kv)
                continue
            if lost and sequence.kv.holds(lost):
                self._restart(sequence, result)
                continue
            sequence.num_computed = chunk.stop
            self._kv.computed(sequence.kv, sequence.tokens, chunk.stop)
            sequence.logprobs_known += len(result.prompt_logprobs.get(sequence.seq_id, ()))
            token = result.tokens[sequence.seq_id] if chunk.draws and sequence.seq_id not in result.failed else None
            if token is not None:
                sequence.tokens.append(token)
            elif chunk.draws:
                self.finish(sequence, FinishReason.ERROR)
            elif sequence.remaining:
                continue  # in the middle of its prompt
            news.append((sequence, token))
            if token in sequence.stop_ids:
                self.finish(sequence, FinishReason.STOP)
            elif len(sequence.tokens) >= sequence.max_tokens:
                self.finish(sequence, FinishReason.LENGTH)
        return news

    def _moved(self, result: StepResult) -> frozenset[tuple[int, int]]:
        """Book what was moved; (group, block) of what could not be loaded."""
        if result.moved is None:
            return frozenset()
        self._kv.moved(result.moved, result.stats.num_tokens, result.stats.wall_s)
        return frozenset((move.group, move.block) for move in result.moved.lost)

    def _restart(self, sequence: Sequence, result: StepResult) -> None:
        """Let a sequence that was computed on blocks without content begin again."""
        result.tokens.pop(sequence.seq_id, None)
        result.logprobs.pop(sequence.seq_id, None)
        result.prompt_logprobs.pop(sequence.seq_id, None)
        result.failed.pop(sequence.seq_id, None)
        self.num_restarts += 1
        self._requeue(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason) -> bool:
        """End a sequence in any state; False when it had ended before.

        Its blocks are freed at once, unless a step in flight writes to them: then `apply` frees them,
        so that no other sequence gets a block that is still being written.
        """
        if sequence.finished:
            return False
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        self._forget(sequence)
        if sequence.seq_id not in self._in_flight:
            self._kv.release(sequence.kv)
        return True

    def drop_in_flight(self) -> None:
        """The executor is gone and will not write any more: end the step in flight without a result."""
        in_flight, self._in_flight = self._in_flight, {}
        self._stepping = False
        for sequence, _ in in_flight.values():
            if sequence.finished:
                self._kv.release(sequence.kv)

    def take_delta(self) -> LedgerDelta:
        """What changed in the block tables since the last call."""
        return self._kv.take_delta()

    def check_idle(self) -> None:
        """`check_integrity`, unless that would take more than a hundredth of the time: it goes through all blocks."""
        began = time.monotonic()
        if began >= self._next_check:
            self.check_integrity()
            self._next_check = began + 100 * (time.monotonic() - began)

    def check_integrity(self) -> None:
        """Assert the invariants, between steps.

        Raises:
            AssertionError: the bookkeeping is wrong; the message says where.
        """
        self._kv.check_integrity([sequence.kv for sequence in self._running])
        for queue, status in ((self._running, Status.RUNNING), (self._waiting, Status.WAITING)):
            for sequence in queue:
                sequence.check(self._kv.block_size)
                if sequence.status is not status:
                    raise AssertionError(
                        f"sequence {sequence.seq_id} is {sequence.status.value} in the {status.value} queue"
                    )
            if any(first.order > second.order for first, second in pairwise(queue)):
                raise AssertionError(f"{status.value} sequences are not in order: {[s.order for s in queue]}")
        if unknown := self._sent - {sequence.seq_id for sequence in self._running}:
            raise AssertionError(f"the executor knows sequences that do not run: {unknown}")

    def _check_fits(self, sequence: Sequence) -> None:
        prompt, longest, context = sequence.prompt_len, sequence.max_tokens, self._limits.max_context
        check_length(prompt, longest, context)
        # The KV of the last token is never needed, unless it is the prompt's.
        needed, available = max(prompt, longest - 1), self._kv.most_tokens(self._limits.max_num_batched_tokens)
        if needed > available:
            size, room = self._kv.block_size, available + 1 - prompt
            fix = f"lower max_tokens to at most {room}" if room > 0 else f"shorten the prompt by {1 - room} tokens"
            raise InvalidRequestError(
                f"{prompt} prompt tokens and {longest - prompt} to generate need {-(-needed // size)} KV blocks of "
                f"{size} tokens, there are {available // size}: {fix}, or give the KV cache more memory",
                param="max_tokens" if room > 0 else "prompt",
            )

    def _plan_running(self) -> tuple[list[tuple[Sequence, int]], _Budget, bool]:
        """(sequence, tokens) of the running ones, budget left, whether any was preempted.

        One token of budget is set aside for every decode first, so that a long prompt delays nobody; the
        blocks are taken in order, so that a victim is never one that is already planned.
        """
        decodes, limits = sum(1 for s in self._running if s.remaining == 1), self._limits
        tokens = limits.max_mixed_tokens if decodes else limits.max_num_batched_tokens
        decodes = min(tokens, decodes)
        rows = max(2 * (limits.max_num_seqs - decodes), limits.max_num_seqs // 4, _LEAST_ROWS)
        budget = _Budget(decodes, tokens - decodes, rows)
        planned: list[tuple[Sequence, int]] = []
        preempted = False
        index = 0
        while index < len(self._running):
            sequence = self._running[index]
            index += 1
            if sequence.remaining == 1:
                count = min(1, budget.decodes)
                budget.decodes -= count
            else:
                count = budget.take(sequence, sequence.remaining)
            if not count:
                continue
            while not self._grow(sequence, count):
                preempted = True
                victim = self._running[-1]
                self._preempt(victim)
                if victim is sequence:
                    return planned, budget, True
            planned.append((sequence, count))
        budget.prefill += budget.decodes
        return planned, budget, preempted

    def _grow(self, sequence: Sequence, count: int) -> bool:
        """Let a sequence write its next `count` tokens; False where blocks are missing."""
        computed = sequence.num_computed
        copies = self._kv.grow(sequence.kv, len(sequence.tokens), computed, computed + count)
        if copies is None:
            return False
        self._copies += copies
        return True

    def _admit(self, budget: _Budget) -> list[tuple[Sequence, int]]:
        """Start waiting sequences in order while budget, places and blocks last."""
        planned: list[tuple[Sequence, int]] = []
        index = 0
        while budget.prefill and index < len(self._waiting) and len(self._running) < self._limits.max_num_seqs:
            if self._running and self._kv.pressure is Pressure.CRITICAL:
                break
            sequence = self._waiting[index]
            prefix = self._beginning(sequence)
            if prefix is None:
                index += 1
                continue
            # A block in reserve for each running sequence, or the newcomer would soon be preempted by their growth.
            known, stop = len(sequence.tokens), min(len(sequence.tokens), prefix.num_tokens + budget.prefill)
            if not self._kv.can_begin(prefix, known, stop, len(self._running)):
                break
            sequence.num_computed = prefix.num_tokens
            count = budget.take(sequence, sequence.remaining)
            if not count:
                sequence.num_computed = 0
                break
            self._kv.begin(sequence.kv, prefix, known)
            if not self._grow(sequence, count):
                raise AssertionError(f"sequence {sequence.seq_id} lacks blocks that it was said to have")
            if not sequence.preemptions:
                sequence.num_cached = prefix.num_tokens
            del self._waiting[index]
            insort(self._running, sequence, key=_order)
            sequence.status = Status.RUNNING
            planned.append((sequence, count))
        return planned

    def _beginning(self, sequence: Sequence) -> Prefix | None:
        """What a waiting sequence can begin with; None where it had better wait until another sample has computed the
        prompt."""
        kv, shared = self._kv, min(sequence.most_found, sequence.prompt_len - 1)
        if sequence.samples is not None and kv.policy.sharing and not sequence.num_output and shared >= kv.block_size:
            leader = sequence.samples.leader()
            if leader is not None and leader.num_computed < shared:
                return None
            if leader is not None and (fork := kv.fork_of(leader.kv, shared)) is not None:
                return fork
        return kv.find(sequence.kv, sequence.tokens, sequence.most_found)

    def _preempt(self, sequence: Sequence) -> None:
        sequence.preemptions += 1
        self.num_preemptions += 1
        self._requeue(sequence)

    def _requeue(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._kv.release(sequence.kv)
        self._forget(sequence)
        sequence.num_computed = 0
        sequence.status = Status.WAITING
        insort(self._waiting, sequence, key=_order)

    def _forget(self, sequence: Sequence) -> None:
        """Let the executor drop what it knows of a sequence."""
        if sequence.seq_id in self._sent:
            self._sent.remove(sequence.seq_id)
            self._ended.append(sequence.seq_id)
