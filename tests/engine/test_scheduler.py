"""G1: continuous batching, chunked prefill, preemption, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from raytier.engine.scheduler import Scheduler, SchedulerLimits
from raytier.engine.sequence import FinishReason, Sequence, Status
from raytier.engine.step import SequenceSpec, StepBatch, StepResult
from raytier.errors import EngineDeadError, InvalidRequestError, QueueFullError
from raytier.kv.block_pool import BlockPool
from raytier.kv.cache import KVCache
from raytier.kv.ledger import GroupShape, LeaseLedger
from tests.engine.fakes import PagedExecutor, next_token

VOCAB = 50
BLOCK = 4


def make(
    *,
    blocks: int = 50,
    seqs: int = 8,
    tokens: int = 16,
    mixed: int | None = None,
    queue: int = 100,
    context: int = 100,
) -> tuple[Scheduler, BlockPool, PagedExecutor]:
    pool = BlockPool(BLOCK)
    pool.add_extent(1, blocks)
    kv = KVCache([pool])
    scheduler = Scheduler("m", kv, SchedulerLimits(seqs, tokens, mixed or tokens, queue, context))
    return scheduler, pool, PagedExecutor(blocks + 1, BLOCK, VOCAB)


def sequence(
    seq_id: int,
    prompt: int,
    new: int = 5,
    *,
    stop: frozenset[int] = frozenset(),
    temperature: float = 0.0,
    priority: int = 0,
    logprobs: int | None = None,
) -> Sequence:
    tokens = [(seq_id * 7 + position) % VOCAB for position in range(prompt)]
    spec = SequenceSpec(temperature, seed=seq_id, prompt_logprobs=logprobs)
    return Sequence(seq_id, tokens, prompt, prompt + new, spec, stop, priority)


def shape(batch: StepBatch | None) -> list[tuple[int, int, int]]:
    """(sequence, start, tokens) of each chunk."""
    assert batch is not None
    return [(c.seq_id, c.start, len(c.token_ids)) for c in batch.chunks]


def run(scheduler: Scheduler, executor: PagedExecutor) -> int:
    """Step until nothing is left; the number of steps."""
    steps = 0
    while (batch := scheduler.schedule()) is not None:
        scheduler.apply(executor.step(batch))
        scheduler.check_integrity()
        steps += 1
    assert not scheduler.has_work
    return steps


def test_prefill_is_chunked_and_decodes_go_first() -> None:
    scheduler, _, executor = make(tokens=10)
    short, long = sequence(1, 3), sequence(2, 25)
    scheduler.add(short)
    scheduler.add(long)
    shapes, drawing = [], []
    for _ in range(4):
        batch = scheduler.schedule()
        shapes.append(shape(batch))
        assert batch is not None
        drawing.append([c.seq_id for c in batch.chunks if c.draws])
        scheduler.apply(executor.step(batch))
    assert shapes == [
        [(1, 0, 3), (2, 0, 7)],
        [(1, 3, 1), (2, 7, 9)],
        [(1, 4, 1), (2, 16, 9)],
        [(1, 5, 1), (2, 25, 1)],
    ]
    assert drawing == [[1], [1], [1, 2], [1, 2]]


def test_beside_decodes_a_step_carries_fewer_tokens() -> None:
    """A prompt that nobody waits for is read in large steps, until a stream runs whose next token waits for it."""
    scheduler, _, executor = make(tokens=12, mixed=5)
    scheduler.add(sequence(1, 14))
    shapes = []
    for step in range(6):
        if step == 2:
            scheduler.add(sequence(2, 9))
        batch = scheduler.schedule()
        shapes.append(shape(batch))
        assert batch is not None
        scheduler.apply(executor.step(batch))
    assert shapes == [
        [(1, 0, 12)],
        [(1, 12, 2)],
        [(1, 14, 1), (2, 0, 4)],
        [(1, 15, 1), (2, 4, 4)],
        [(1, 16, 1), (2, 8, 1)],
        [(1, 17, 1), (2, 9, 1)],
    ]


def test_a_prompt_lies_in_one_run() -> None:
    scheduler, _, executor = make(tokens=4)
    scheduler.add(sequence(1, 30))
    scheduler.add(sequence(2, 20))
    for _ in range(16):
        batch = scheduler.schedule()
        assert batch is not None
        for chunk in batch.chunks:
            table = chunk.block_table
            assert table == tuple(range(table[0], table[0] + len(table)))
        scheduler.apply(executor.step(batch))


def test_max_num_seqs_and_order_of_arrival() -> None:
    scheduler, _, executor = make(seqs=2)
    for seq_id in range(1, 5):
        scheduler.add(sequence(seq_id, 3, 2))
    ends: list[int] = []
    while (batch := scheduler.schedule()) is not None:
        assert len(batch.chunks) <= 2
        ends += [s.seq_id for s, _ in scheduler.apply(executor.step(batch)) if s.finished]
    assert ends == [1, 2, 3, 4]


def test_the_latest_is_preempted_and_resumes_before_those_that_wait() -> None:
    scheduler, pool, executor = make(blocks=8, tokens=32)
    sequences = [sequence(1, 12, 14), sequence(2, 12, 8), sequence(3, 4, 4)]
    for each in sequences:
        scheduler.add(each)
    started: list[int] = []
    while (batch := scheduler.schedule()) is not None:
        started += [c.seq_id for c in batch.chunks if c.start == 0]
        if sequences[1].preemptions and sequences[1].status is Status.WAITING:
            assert sequences[1].kv.tables == []
            assert sequences[1].num_computed == 0
            assert sequences[2].status is Status.WAITING
        scheduler.apply(executor.step(batch))
        scheduler.check_integrity()
    assert started == [1, 2, 2, 3]
    assert scheduler.num_preemptions == 1
    assert pool.num_used == 0


def test_priorities_go_first_and_the_last_of_them_is_preempted() -> None:
    scheduler, pool, executor = make(blocks=8, seqs=2, tokens=32)
    low, middle, high = (sequence(i, 12, 10, priority=p) for i, p in ((1, 5), (2, 1), (3, -1)))
    scheduler.add(low)
    batch = scheduler.schedule()
    assert shape(batch) == [(1, 0, 12)]
    scheduler.add(middle)
    scheduler.add(high)
    assert batch is not None
    scheduler.apply(executor.step(batch))
    ends: list[int] = []
    while (batch := scheduler.schedule()) is not None:
        ends += [s.seq_id for s, _ in scheduler.apply(executor.step(batch)) if s.finished]
        scheduler.check_integrity()
    assert ends == [3, 2, 1]
    assert (low.preemptions, middle.preemptions, high.preemptions) == (1, 0, 0)
    assert pool.num_used == 0


def test_what_the_executor_must_know_is_sent_once_and_again_after_a_preemption() -> None:
    scheduler, _, executor = make(blocks=8, tokens=10)
    sequences = [sequence(1, 12, 14), sequence(2, 12, 8, logprobs=2)]
    for each in sequences:
        scheduler.add(each)
    run(scheduler, executor)
    arrivals = [arrival for batch in executor.batches for arrival in batch.arrivals]
    assert [arrival.seq_id for arrival in arrivals] == [1, 2, 2]
    assert scheduler.num_preemptions == 1
    assert [len(arrival.tokens) for arrival in arrivals] == [0, 12, len(arrivals[2].tokens)]
    assert len(arrivals[2].tokens) > 12, "what was generated is there to be taken up again"
    assert (arrivals[1].logprobs_known, arrivals[2].logprobs_known) == (1, 12)
    assert [seq_id for batch in executor.batches for seq_id in batch.ended] == [2, 1]


def test_samples_are_queued_all_or_none() -> None:
    scheduler, _, _ = make(queue=3)
    scheduler.add(sequence(1, 3))
    with pytest.raises(QueueFullError):
        scheduler.add(*(sequence(i, 3) for i in (2, 3, 4)))
    assert scheduler.num_waiting == 1
    with pytest.raises(InvalidRequestError, match="4 samples of one request; at most 3 .*lower n"):
        scheduler.add(*(sequence(i, 3) for i in (2, 3, 4, 5)))
    scheduler.add(sequence(2, 3), sequence(3, 3))
    assert scheduler.num_waiting == 3


def test_one_sample_computes_the_prompt_and_the_others_wait_for_it() -> None:
    scheduler, pool, executor = make(tokens=8, blocks=60)
    prompt = [(3 * position) % VOCAB for position in range(18)]
    samples = [Sequence(i, list(prompt), 18, 22, SequenceSpec(1.0, seed=5, sample=i)) for i in (1, 2, 3)]
    scheduler.add(*samples)
    scheduler.add(sequence(4, 3, 2))
    shapes = []
    while (batch := scheduler.schedule()) is not None:
        shapes.append(shape(batch))
        scheduler.apply(executor.step(batch))
        scheduler.check_integrity()
    assert shapes[:4] == [
        [(1, 0, 8)],
        [(1, 8, 8)],
        [(1, 16, 2), (4, 0, 3)],
        [(1, 18, 1), (4, 3, 1), (2, 17, 1), (3, 17, 1)],
    ]
    assert [len(batch.copies) for batch in executor.batches[:5]] == [0, 0, 0, 2, 0]
    assert [s.num_cached for s in samples] == [0, 17, 17]
    for each in samples:
        reference = list(prompt)
        for position in range(4):
            reference.append(next_token(reference, each.spec.draw(position), VOCAB))
        assert each.tokens == reference
    assert pool.num_used == 0


def test_the_next_sample_computes_the_prompt_when_the_first_has_gone() -> None:
    scheduler, pool, executor = make(tokens=8, blocks=60)
    samples = [Sequence(i, [5] * 18, 18, 20, SequenceSpec(seed=5, sample=i)) for i in (1, 2, 3)]
    scheduler.add(*samples)
    batch = scheduler.schedule()
    assert shape(batch) == [(1, 0, 8)]
    scheduler.finish(samples[0], FinishReason.ABORT)
    assert batch is not None
    scheduler.apply(executor.step(batch))
    batch = scheduler.schedule()
    assert shape(batch)[0][0] == 2
    assert batch is not None
    scheduler.apply(executor.step(batch))
    run(scheduler, executor)
    assert all(s.finished for s in samples) and pool.num_used == 0


def test_logprobs_of_prompts_are_bounded_per_step() -> None:
    """16 rows at least, 2 per sequence that may run and does not decode; a prompt without them is not held up."""
    scheduler, pool, executor = make(seqs=12, blocks=60, tokens=40, context=200)
    asking, plain = sequence(1, 100, 0, logprobs=0), sequence(2, 30, 2)
    scheduler.add(asking)
    scheduler.add(plain)
    shapes = []
    while (batch := scheduler.schedule()) is not None:
        shapes.append(shape(batch))
        scheduler.apply(executor.step(batch))
        scheduler.check_integrity()
    assert shapes[:3] == [[(1, 0, 24), (2, 0, 16)], [(1, 24, 24), (2, 16, 14)], [(1, 48, 22), (2, 30, 1)]]
    assert sum(count for step in shapes for seq_id, _, count in step if seq_id == 1) == 100
    assert (asking.finish_reason, asking.num_output, asking.logprobs_known) == (FinishReason.LENGTH, 0, 100)
    assert pool.num_used == 0


def test_a_sequence_whose_token_cannot_be_drawn_ends_alone() -> None:
    scheduler, pool, executor = make()
    good, bad = sequence(1, 5), sequence(2, 5)
    scheduler.add(good)
    scheduler.add(bad)
    batch = scheduler.schedule()
    assert batch is not None
    result = executor.step(batch)
    del result.tokens[2]
    result.failed[2] = "no token is left"
    assert scheduler.apply(result) == [(good, good.tokens[-1]), (bad, None)]
    assert bad.finish_reason is FinishReason.ERROR
    run(scheduler, executor)
    assert good.num_output == 5 and pool.num_used == 0


def test_what_can_never_fit_is_refused_with_numbers() -> None:
    scheduler, _, executor = make(blocks=5, context=40)
    scheduler.add(sequence(1, 11, 10))  # 20 tokens of KV in 5 blocks: the last token needs none
    with pytest.raises(InvalidRequestError, match="need 6 KV blocks of 4 tokens, there are 5.*at most 10") as refused:
        scheduler.add(sequence(2, 11, 11))
    assert refused.value.param == "max_tokens"
    with pytest.raises(InvalidRequestError, match="shorten the prompt by 2 tokens") as refused:
        scheduler.add(sequence(3, 22, 3))
    assert refused.value.param == "prompt"
    with pytest.raises(InvalidRequestError, match="40 tokens and leaves no room.*at least 1$"):
        scheduler.add(sequence(4, 40, 1))
    assert run(scheduler, executor) == 10


def test_the_queue_is_bounded() -> None:
    scheduler, _, _ = make(queue=2)
    scheduler.add(sequence(1, 3))
    scheduler.add(sequence(2, 3))
    with pytest.raises(QueueFullError, match="2 waiting"):
        scheduler.add(sequence(3, 3))
    scheduler.schedule()
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 0)


def test_stop_token_and_length_end_within_the_step() -> None:
    scheduler, pool, executor = make()
    executor.model = lambda history, draw: 7 if draw.position == 2 else 1
    stopped, full = sequence(1, 3, stop=frozenset({7})), sequence(2, 3, 2)
    scheduler.add(stopped)
    scheduler.add(full)
    run(scheduler, executor)
    assert (stopped.finish_reason, stopped.tokens[3:]) == (FinishReason.STOP, [1, 1, 7])
    assert (full.finish_reason, full.num_output) == (FinishReason.LENGTH, 2)
    assert pool.num_used == 0


def test_an_abort_in_flight_frees_when_the_step_has_ended() -> None:
    scheduler, pool, executor = make()
    first, second = sequence(1, 5), sequence(2, 5)
    scheduler.add(first)
    scheduler.add(second)
    batch = scheduler.schedule()
    assert batch is not None
    assert scheduler.finish(first, FinishReason.ABORT)
    assert not scheduler.finish(first, FinishReason.ABORT)
    assert pool.num_used == 4
    assert [s for s, _ in scheduler.apply(executor.step(batch))] == [second]
    assert pool.num_used == 2
    scheduler.check_integrity()


def test_a_lost_executor() -> None:
    scheduler, pool, _ = make()
    sequences = [sequence(1, 5), sequence(2, 5)]
    for each in sequences:
        scheduler.add(each)
    scheduler.schedule()
    scheduler.finish(sequences[0], FinishReason.ABORT)
    scheduler.drop_in_flight()
    scheduler.finish(sequences[1], FinishReason.ERROR)
    assert pool.num_used == 0
    scheduler.check_integrity()


def test_results_must_belong_to_the_step() -> None:
    scheduler, _, _ = make()
    with pytest.raises(EngineDeadError, match="step 0 was expected"):
        scheduler.apply(StepResult(3))
    scheduler.add(sequence(1, 5))
    batch = scheduler.schedule()
    assert batch is not None
    with pytest.raises(RuntimeError, match="in flight"):
        scheduler.schedule()
    with pytest.raises(EngineDeadError, match="result of step 7, but step 1"):
        scheduler.apply(StepResult(7, {1: 3}))
    with pytest.raises(EngineDeadError, match=r"no token for sequences \[1\]"):
        scheduler.apply(StepResult(1, {}))


workloads = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=8)


@settings(max_examples=120, deadline=None)
@given(work=workloads, blocks=st.integers(15, 40), seqs=st.integers(1, 6), tokens=st.integers(1, 24))
def test_output_depends_on_the_sequence_alone(work: list[tuple[int, int]], blocks: int, seqs: int, tokens: int) -> None:
    """Whatever the batch, the chunks and the preemptions: the tokens of a run with plenty of everything."""
    scheduler, pool, executor = make(blocks=blocks, seqs=seqs, tokens=tokens)
    sequences = [sequence(i, prompt, new, temperature=0.5 * (i % 2)) for i, (prompt, new) in enumerate(work, 1)]
    for each in sequences:
        scheduler.add(each)
    run(scheduler, executor)
    assert pool.num_used == 0
    assert max(batch.num_tokens for batch in executor.batches) <= tokens
    assert max(len(batch.chunks) for batch in executor.batches) <= seqs
    for each in sequences:
        reference = list(each.tokens[: each.prompt_len])
        for position in range(each.max_tokens - each.prompt_len):
            reference.append(next_token(reference, each.spec.draw(position), VOCAB))
        assert each.tokens == reference
        assert each.finish_reason is FinishReason.LENGTH


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, steps and cancellations in any order, over a small pool; a ledger follows the deltas."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler, self.pool, self.executor = make(blocks=12, seqs=3, tokens=6, mixed=4, queue=4, context=48)
        self.ledger = LeaseLedger([GroupShape(13, 1)], BLOCK)
        self.ledger.lease("e", 0, 12)
        self.reports = 0
        self.sequences: list[Sequence] = []
        self.batch: StepBatch | None = None
        self.ids = 0

    @rule(
        prompt=st.integers(1, 30),
        new=st.integers(1, 18),
        priority=st.integers(-1, 1),
        logprobs=st.sampled_from([None, None, 0]),
        kind=st.integers(0, 2),
        samples=st.sampled_from([1, 1, 2, 4]),
    )
    def add(self, prompt: int, new: int, priority: int, logprobs: int | None, kind: int, samples: int) -> None:
        """Prompts are prefixes of one of three texts, so that blocks are found."""
        tokens = [(kind * 7 + position) % VOCAB for position in range(prompt)]
        arrivals = []
        for sample in range(samples):
            self.ids += 1
            spec = SequenceSpec(1.0, seed=self.ids, sample=sample, prompt_logprobs=None if sample else logprobs)
            longest = prompt + new - (logprobs == 0)
            arrivals.append(Sequence(self.ids, list(tokens), prompt, longest, spec, frozenset(), priority))
        try:
            self.scheduler.add(*arrivals)
        except QueueFullError:
            assert self.scheduler.num_waiting + samples > 4
        except InvalidRequestError:
            assert prompt + new - 1 > 48
        else:
            self.sequences += arrivals

    @precondition(lambda self: self.batch is None)
    @rule()
    def schedule(self) -> None:
        work = self.scheduler.has_work
        self.batch = self.scheduler.schedule()
        assert (self.batch is not None) == work, "there is work but no step"
        if self.batch is not None:
            running = any(c.start and len(c.token_ids) == 1 and c.draws for c in self.batch.chunks)
            assert 1 <= self.batch.num_tokens <= (4 if running else 6)
            assert self.scheduler.num_running <= 3
            first = min((s for s in self.sequences if s.status is Status.RUNNING), key=lambda s: s.order)
            assert first.seq_id in {c.seq_id for c in self.batch.chunks}, "the first does not progress"

    @precondition(lambda self: self.batch is not None)
    @rule()
    def apply(self) -> None:
        assert self.batch is not None
        drawn = self.scheduler.apply(self.executor.step(self.batch))
        alive = {c.seq_id for c in self.batch.chunks if c.draws}
        assert {s.seq_id for s, token in drawn if token is not None} <= alive
        for each, token in drawn:
            assert token is not None or each.max_tokens == each.prompt_len
            if token is not None:
                draw = each.spec.draw(each.num_output - 1)
                assert token == next_token(each.tokens[:-1], draw, VOCAB), "it was drawn from another history"
            assert each.spec.prompt_logprobs is None or each.logprobs_known == max(1, each.prompt_len)
        self.batch = None

    @precondition(lambda self: any(not s.finished for s in self.sequences))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        victim = data.draw(st.sampled_from([s for s in self.sequences if not s.finished]))
        in_flight = self.batch is not None and victim.seq_id in {c.seq_id for c in self.batch.chunks}
        used = self.pool.num_used
        held = sum(self.pool.references(block) == 1 for table in victim.kv.tables for block in table)
        assert self.scheduler.finish(victim, FinishReason.ABORT)
        assert not self.scheduler.finish(victim, FinishReason.ABORT)
        assert self.pool.num_used == used - (0 if in_flight else held)

    @rule()
    def report(self) -> None:
        self.reports += 1
        assert self.ledger.report("e", 0, self.reports, self.scheduler.take_delta())
        held = {s.seq_id: tuple(sorted(s.kv.tables[0])) for s in self.sequences if s.kv.tables}
        assert self.ledger.holdings("e") == held

    @invariant()
    def consistent(self) -> None:
        for each in self.sequences:
            each.check(BLOCK)
        if self.batch is None:
            self.scheduler.check_integrity()

    def teardown(self) -> None:
        if self.batch is not None:
            self.apply()
        run(self.scheduler, self.executor)
        assert self.pool.num_used == 0
        assert all(s.finished and not s.kv.tables for s in self.sequences)
        self.report()
        assert self.ledger.stats().used_blocks == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
