"""G1, G5, G6: the step loop, streams, cancellation, death."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import pytest

from raytier.checkpoint.manifest import GenerationDefaults
from raytier.config import Scheduler as SchedulerConfig
from raytier.engine.config import EngineConfig
from raytier.engine.engine import Engine
from raytier.engine.outputs import OutputDelta, StepReport
from raytier.engine.sampling_params import SamplingParams
from raytier.engine.step import SampleSpec, StepBatch, StepExecutor, StepResult
from raytier.errors import EngineDeadError, InvalidRequestError, QueueFullError, ResourceNotAvailableError
from raytier.kv.block_pool import BlockPool
from raytier.kv.cache import KVCache
from raytier.kv.ledger import GroupShape, LeaseLedger
from tests.engine.fakes import PagedExecutor, byte_level_tokenizer, next_token

TOKENIZER = byte_level_tokenizer()
VOCAB = TOKENIZER.vocab_size
GREEDY = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=12)
BLOCK = 4


def expected_tokens(prompt: Sequence[int], params: SamplingParams, seed: int = 0, sample: int = 0) -> list[int]:
    """What the fake model generates, by definition."""
    tokens = list(prompt)
    for position in range(params.max_tokens):
        draw = SampleSpec(params.temperature, params.top_p, params.top_k, seed, sample, position)
        tokens.append(next_token(tokens, draw, VOCAB))
    return tokens[len(prompt) :]


@dataclass
class Collector:
    """A sink that remembers, and an event for the end."""

    deltas: list[OutputDelta] = field(default_factory=list)
    first: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, delta: OutputDelta) -> None:
        assert not self.ended.is_set(), "a delta after the last one"
        self.deltas.append(delta)
        self.first.set()
        if delta.done:
            self.ended.set()

    def wait(self) -> list[OutputDelta]:
        assert self.ended.wait(20)
        return self.deltas

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)


@dataclass
class House:
    """Builds engines on fake executors and checks at the end that nothing is left in them."""

    engines: list[Engine] = field(default_factory=list)

    def build(
        self,
        *,
        blocks: int = 400,
        executor: StepExecutor | None = None,
        model: Callable[[Sequence[int], SampleSpec], int] | None = None,
        before_step: Callable[[StepBatch], None] | None = None,
        on_step: Callable[[StepReport], None] | None = None,
        defaults: GenerationDefaults | None = None,
        max_context: int = 200,
        seqs: int = 16,
        tokens: int = 32,
        queue: int = 64,
        policy: Literal["fcfs", "priority"] = "fcfs",
    ) -> Engine:
        pool = BlockPool(BLOCK)
        pool.add_extent(1, blocks)
        engine = Engine(
            "fake",
            executor or PagedExecutor(blocks + 1, BLOCK, VOCAB, model, before_step),
            TOKENIZER,
            KVCache([pool]),
            defaults or GenerationDefaults(),
            EngineConfig(
                SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, max_queue=queue, policy=policy),
                tokens,
                tokens,
                max_context,
                VOCAB,
            ),
            on_step,
        )
        self.engines.append(engine)
        return engine


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    for engine in house.engines:
        engine.close()
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine-")]


class Gate:
    """Lets steps through one by one: the executor waits in `before_step` until `open`."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self._permits = threading.Semaphore(0)
        self._open = False

    def before_step(self, batch: StepBatch) -> None:
        self.entered.release()
        if not self._open:
            assert self._permits.acquire(timeout=20)

    def wait_for_step(self) -> None:
        assert self.entered.acquire(timeout=20)

    def let_through(self) -> None:
        self._permits.release()

    def open(self) -> None:
        self._open = True
        self._permits.release()


# ---- output --------------------------------------------------------------------------------------


def test_tokens_text_and_counts(house: House) -> None:
    engine = house.build()
    sink = Collector()
    prompt = TOKENIZER.encode("The quick brown fox")
    request_id = engine.submit(prompt, GREEDY, sink)
    deltas = sink.wait()
    assert sink.tokens == expected_tokens(prompt, GREEDY)
    assert sink.text == TOKENIZER.decode(sink.tokens)
    assert len(deltas) == GREEDY.max_tokens, "one delta per token while the sink keeps up"
    assert [delta.completion_tokens for delta in deltas] == list(range(1, 13))
    assert {(d.request_id, d.index, d.prompt_tokens) for d in deltas} == {(request_id, 0, len(prompt))}
    assert [d.finish_reason for d in deltas] == [None] * 11 + ["length"]


def test_generate_runs_more_prompts_than_the_queue_holds(house: House) -> None:
    engine = house.build(seqs=2, queue=3)
    prompts = [[index, index + 1, index + 2] for index in range(20)]
    outputs = engine.generate(prompts, GREEDY)
    assert [list(output.token_ids) for output in outputs] == [expected_tokens(p, GREEDY) for p in prompts]
    assert [output.text for output in outputs] == [TOKENIZER.decode(output.token_ids) for output in outputs]
    assert {output.finish_reason for output in outputs} == {"length"}


def test_generate_leaves_nothing_running_when_a_prompt_is_refused(house: House) -> None:
    engine = house.build()
    with pytest.raises(InvalidRequestError):
        engine.generate([[1, 2], []], replace(GREEDY, max_tokens=100))
    assert engine.stats().finished["abort"] == 1


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_models_own_stop_token_ends_without_its_text(house: House, ignore_eos: bool) -> None:
    eos = TOKENIZER.spec.eos_token_ids[0]
    word = TOKENIZER.encode("The")[0]
    engine = house.build(
        model=lambda history, draw: eos if draw.position == 3 else word,
        defaults=GenerationDefaults(stop_token_ids=(eos,)),
    )
    params = replace(GREEDY, ignore_eos=ignore_eos, skip_special_tokens=False, max_tokens=6)
    [output] = engine.generate([[1, 2, 3]], params)
    text = TOKENIZER.decode([word])
    if ignore_eos:
        assert (output.finish_reason, output.completion_tokens) == ("length", 6)
        assert output.text == text * 3 + "<|im_end|>" + text * 2
    else:
        assert (output.finish_reason, output.completion_tokens) == ("stop", 4)
        assert output.text == text * 3
        assert output.token_ids == (word, word, word, eos)


def test_stop_token_ids_of_the_request_add_to_the_models(house: House) -> None:
    engine = house.build(
        model=lambda history, draw: draw.position, defaults=GenerationDefaults(stop_token_ids=(8,)), max_context=50
    )
    for ids, ignore, count in (((5,), False, 6), ((), False, 9), ((5,), True, 6), ((), True, 12)):
        params = replace(GREEDY, stop_token_ids=ids, ignore_eos=ignore)
        [output] = engine.generate([[1, 2, 3]], params)
        assert output.completion_tokens == count


def spell(text: str) -> Callable[[Sequence[int], SampleSpec], int]:
    """A model that writes `text`, one token at a time."""
    ids = TOKENIZER.encode(text)
    return lambda history, draw: ids[draw.position]


def test_stop_strings_end_within_the_step_and_across_tokens(house: House) -> None:
    text = "The lazy dog jumps over the quick brown fox."
    engine = house.build(model=spell(text))
    cases = {
        ("azy d",): "The l",
        ("zzz", "jumps over"): "The lazy dog ",
        ("brown", "lazy dogs"): "The lazy dog jumps over the quick ",
    }
    for stop, visible in cases.items():
        for include in (False, True):
            params = replace(GREEDY, stop=stop, max_tokens=40, include_stop_str_in_output=include)
            sink = Collector()
            engine.submit([1], params, sink)
            sink.wait()
            hit = next(s for s in stop if text.startswith(visible + s))
            assert sink.text == visible + (hit if include else "")
            assert sink.deltas[-1].finish_reason == "stop"
            assert len(sink.tokens) <= len(TOKENIZER.encode(visible + hit)) + 1, "it ended with the step that hit"


def test_a_stop_string_that_never_completes_is_given_out_at_the_end(house: House) -> None:
    text = "The lazy do"
    engine = house.build(model=spell(text))
    count = len(TOKENIZER.encode(text))
    [output] = engine.generate([[1]], replace(GREEDY, stop=("lazy dog",), max_tokens=count))
    assert (output.text, output.finish_reason) == (text, "length")


def test_a_stop_string_on_the_last_token_counts_as_stop(house: House) -> None:
    text = "The lazy dog"
    engine = house.build(model=spell(text))
    count = len(TOKENIZER.encode(text))
    [output] = engine.generate([[1]], replace(GREEDY, stop=("dog",), max_tokens=count))
    assert (output.text, output.finish_reason) == ("The lazy ", "stop")


def test_the_context_limit_is_length(house: House) -> None:
    engine = house.build(max_context=20)
    [output] = engine.generate([list(range(15))], replace(GREEDY, max_tokens=100))
    assert (output.finish_reason, output.completion_tokens) == ("length", 5)


# ---- draws ---------------------------------------------------------------------------------------


def test_a_seed_makes_draws_reproducible_whatever_else_runs(house: House) -> None:
    drawn = replace(GREEDY, temperature=0.9, seed=7)
    alone = house.build().generate([[1, 2, 3]], drawn)[0].token_ids
    crowd = [[5, 6, 7 + index] for index in range(10)]
    assert house.build(seqs=4, tokens=5).generate([*crowd, [1, 2, 3]], drawn)[-1].token_ids == alone
    assert list(alone) == expected_tokens([1, 2, 3], drawn, seed=7)


def test_without_a_seed_every_request_draws_differently(house: House) -> None:
    engine = house.build()
    outputs = engine.generate([[1, 2, 3]] * 5, replace(GREEDY, temperature=1.0))
    assert len({output.token_ids for output in outputs}) == 5


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_preemption_gives_the_tokens_that_plenty_of_blocks_give(house: House, temperature: float) -> None:
    params = [replace(GREEDY, temperature=temperature, seed=index, max_tokens=40) for index in range(8)]
    prompts = [list(range(index, index + 9)) for index in range(8)]
    tight = house.build(blocks=20, tokens=8)
    outputs = tight.generate(prompts, params)
    assert tight.stats().preemptions > 0
    plenty = house.build().generate(prompts, params)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plenty]
    assert [o.text for o in outputs] == [o.text for o in plenty]


# ---- many readers --------------------------------------------------------------------------------


async def collect(engine: Engine, prompt: list[int], params: SamplingParams) -> list[OutputDelta]:
    return [delta async for delta in engine.stream(prompt, params)]


async def test_16_concurrent_streams(house: House) -> None:
    engine = house.build(blocks=80, tokens=16)
    prompts = [list(range(index, index + 3 + index % 7)) for index in range(16)]
    outputs = await asyncio.gather(*(collect(engine, prompt, GREEDY) for prompt in prompts))
    for prompt, deltas in zip(prompts, outputs, strict=True):
        assert [t for d in deltas for t in d.token_ids] == expected_tokens(prompt, GREEDY)
        assert [d.finish_reason for d in deltas if d.finish_reason] == ["length"]
    stats = engine.stats()
    assert stats.generated_tokens == 16 * GREEDY.max_tokens
    assert stats.prompt_tokens == sum(map(len, prompts))
    assert stats.finished == {"length": 16}
    assert stats.total.num_tokens >= sum(map(len, prompts)) + 16 * (GREEDY.max_tokens - 1)


def test_streams_of_several_event_loops_and_threads(house: House) -> None:
    engine = house.build()
    results: dict[int, list[OutputDelta]] = {}

    def run(index: int) -> None:
        results[index] = asyncio.run(collect(engine, [index, 1, 2], GREEDY))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for index in range(6):
        assert [t for d in results[index] for t in d.token_ids] == expected_tokens([index, 1, 2], GREEDY)
    assert not engine._mailboxes, "a mailbox outlived its readers"


async def test_one_wake_up_of_the_loop_per_step(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = house.build()
    loop = asyncio.get_running_loop()
    original = loop.call_soon_threadsafe
    calls = 0

    def counted(*args: object, **kwargs: object) -> asyncio.Handle:
        nonlocal calls
        calls += threading.current_thread().name == "engine-fake"
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    await asyncio.gather(*(collect(engine, [index, 1], GREEDY) for index in range(10)))
    assert calls <= engine.stats().steps


async def test_a_slow_reader_gets_the_first_token_at_once_and_the_rest_as_one(house: House) -> None:
    gate = Gate()
    ended = threading.Event()
    engine = house.build(before_step=gate.before_step, on_step=lambda report: report.num_running or ended.set())
    gate.let_through()
    async with aclosing(engine.stream([1, 2, 3], GREEDY)) as stream:
        first = await anext(stream)
        assert len(first.token_ids) == 1
        gate.open()
        assert await asyncio.to_thread(ended.wait, 20)
        await asyncio.sleep(0)
        rest = await anext(stream)
        assert [*first.token_ids, *rest.token_ids] == expected_tokens([1, 2, 3], GREEDY)
        assert first.text + rest.text == TOKENIZER.decode([*first.token_ids, *rest.token_ids])
        assert (rest.finish_reason, rest.completion_tokens) == ("length", GREEDY.max_tokens)


async def test_a_refused_request_raises_at_the_first_delta(house: House) -> None:
    engine = house.build()
    with pytest.raises(InvalidRequestError):
        await anext(engine.stream([], GREEDY))
    assert not engine._mailboxes


# ---- the end of requests -------------------------------------------------------------------------


def test_an_abort_frees_everything_within_the_step(house: House) -> None:
    gate = Gate()
    engine = house.build(before_step=gate.before_step)
    sinks = [Collector(), Collector()]
    prompts = ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10])  # they share nothing
    ids = [engine.submit(p, replace(GREEDY, max_tokens=50), sink) for p, sink in zip(prompts, sinks, strict=True)]
    gate.wait_for_step()
    gate.let_through()
    gate.wait_for_step()  # the second step runs, and the blocks of both are being written
    held = engine.stats().kv_blocks_used
    assert engine.abort(ids[0])
    assert not engine.abort(ids[0])
    assert engine.stats().kv_blocks_used == held, "blocks that a step in flight writes to came back"
    gate.let_through()
    gate.wait_for_step()
    assert engine.stats().kv_blocks_used == held - 2
    assert [d.finish_reason for d in sinks[0].wait()] == [None, "abort"]
    assert engine.abort(ids[1])
    gate.open()
    sinks[1].wait()
    assert engine.stats().finished == {"abort": 2}


def test_an_abort_while_waiting_takes_effect_at_once(house: House) -> None:
    gate = Gate()
    engine = house.build(before_step=gate.before_step, seqs=1)
    running, waiting = Collector(), Collector()
    engine.submit([1, 2, 3], GREEDY, running)
    gate.wait_for_step()
    request_id = engine.submit([1, 2, 3], GREEDY, waiting)
    assert engine.stats().waiting == 1
    engine.abort(request_id)
    assert engine.stats().waiting == 0
    gate.open()
    assert [(d.text, d.finish_reason) for d in waiting.wait()] == [("", "abort")]
    assert running.wait()[-1].finish_reason == "length"


async def test_leaving_a_stream_aborts_its_request(house: House) -> None:
    engine = house.build(max_context=4000, blocks=1000)
    async with aclosing(engine.stream([1, 2, 3], replace(GREEDY, max_tokens=3000))) as stream:
        await anext(stream)
    task = asyncio.create_task(collect(engine, [4, 5], replace(GREEDY, max_tokens=3000)))
    await asyncio.sleep(0)  # it has submitted now
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.stats().finished["abort"] == 2
    await collect(engine, [6], GREEDY)
    assert engine.stats().kv_blocks_used == 0


def test_requests_of_a_closed_event_loop_are_aborted(house: House) -> None:
    gate = Gate()
    engine = house.build(before_step=gate.before_step)
    loop = asyncio.new_event_loop()
    stream = engine.stream([1, 2], replace(GREEDY, max_tokens=100))
    gate.let_through()
    loop.run_until_complete(anext(stream))
    loop.close()
    gate.open()
    other = Collector()
    engine.submit([3], replace(GREEDY, max_tokens=50), other)
    other.wait()
    assert engine.stats().finished == {"abort": 1, "length": 1}
    assert not engine._mailboxes


def test_a_failing_sink_ends_its_own_request_only(house: House) -> None:
    engine = house.build()
    other = Collector()

    def failing(delta: OutputDelta) -> None:
        raise RuntimeError("reader is broken")

    engine.submit([1, 2], replace(GREEDY, max_tokens=100), failing)
    engine.submit([1, 2], replace(GREEDY, max_tokens=30), other)
    assert other.wait()[-1].finish_reason == "length"
    assert engine.dead is None
    assert engine.stats().finished["abort"] == 1


@pytest.mark.parametrize("error", [EngineDeadError("the device actor died"), ZeroDivisionError("division by zero")])
async def test_a_dying_executor_ends_all_requests(house: House, error: Exception) -> None:
    submitted = threading.Event()

    def die(batch: StepBatch) -> None:
        if batch.step == 5:
            assert submitted.wait(20)
            raise error

    engine = house.build(before_step=die, seqs=2)
    sinks = [Collector() for _ in range(4)]
    for sink in sinks:
        engine.submit([1, 2, 3], replace(GREEDY, max_tokens=50), sink)
    reason = str(error) if isinstance(error, EngineDeadError) else "ZeroDivisionError: division by zero"
    stream = asyncio.create_task(collect(engine, [1, 2], GREEDY))
    await asyncio.sleep(0)
    submitted.set()
    with pytest.raises(EngineDeadError, match=reason):
        await stream
    for sink in sinks:
        assert (sink.wait()[-1].finish_reason, sink.deltas[-1].error) == ("error", reason)
    with pytest.raises(EngineDeadError, match=reason):
        engine.submit([1], GREEDY, Collector())
    with pytest.raises(EngineDeadError, match=reason):
        engine.generate([[1]], GREEDY)
    assert engine.dead == reason
    assert engine.stats().dead == reason
    assert engine.stats().finished == {"error": 5}


def test_generate_raises_when_the_engine_dies(house: House) -> None:
    def die(batch: StepBatch) -> None:
        if batch.step == 2:
            raise OSError("disk gone")

    with pytest.raises(EngineDeadError, match="disk gone"):
        house.build(before_step=die).generate([[1, 2]], GREEDY)


def test_an_answer_without_a_token_is_not_swallowed(house: House) -> None:
    class Forgetful:
        def step(self, batch: StepBatch) -> StepResult:
            return StepResult(batch.step)

    with pytest.raises(EngineDeadError, match="no token for sequences"):
        house.build(executor=Forgetful()).generate([[1, 2]], GREEDY)


def test_close_aborts_and_refuses(house: House) -> None:
    gate = Gate()
    engine = house.build(before_step=gate.before_step)
    sink = Collector()
    engine.submit([1, 2], replace(GREEDY, max_tokens=50), sink)
    gate.wait_for_step()
    gate.open()
    engine.close()
    engine.close()
    assert sink.wait()[-1].finish_reason == "abort"
    with pytest.raises(EngineDeadError, match="closed"):
        engine.submit([1], GREEDY, sink)


def test_what_ends_the_engine_is_the_error_of_its_requests(house: House) -> None:
    gate = Gate()
    engine = house.build(before_step=gate.before_step)
    sink = Collector()
    engine.submit([1, 2], replace(GREEDY, max_tokens=50), sink)
    gate.wait_for_step()
    gate.open()
    engine.close("the model was unloaded")
    last = sink.wait()[-1]
    assert (last.finish_reason, last.error) == ("error", "the model was unloaded")
    assert engine.dead == "the model was unloaded"
    with pytest.raises(EngineDeadError, match="does not run: the model was unloaded"):
        engine.submit([1], GREEDY, sink)


def test_a_sink_may_submit_abort_and_close(house: House) -> None:
    engine = house.build()
    second = Collector()

    def chain(delta: OutputDelta) -> None:
        if delta.finish_reason == "length":
            engine.submit([1], GREEDY, second)

    engine.submit([1, 2], GREEDY, chain)
    second.wait()
    third = Collector()

    def closing(delta: OutputDelta) -> None:
        engine.close()
        third(delta)

    engine.submit([1, 2], GREEDY, closing)
    assert third.wait()[-1].finish_reason == "abort"


def test_a_request_that_takes_too_long_ends_with_what_it_has(house: House) -> None:
    gate = Gate()
    engine = house.build(before_step=gate.before_step, seqs=1)
    running, waiting, other = Collector(), Collector(), Collector()
    engine.submit([1, 2, 3], replace(GREEDY, max_tokens=100), running, timeout_s=0.2)
    engine.submit([1, 2, 3], GREEDY, waiting, timeout_s=0.1)
    engine.submit([1, 2, 3], GREEDY, other, timeout_s=60)
    gate.wait_for_step()
    gate.let_through()
    gate.wait_for_step()
    assert running.first.wait(20)
    time.sleep(0.25)
    gate.open()
    last = running.wait()[-1]
    assert (last.finish_reason, last.done, last.error) == ("timeout", True, None)
    assert running.tokens == expected_tokens([1, 2, 3], GREEDY)[: len(running.tokens)] != []
    assert [(d.finish_reason, d.token_ids) for d in waiting.wait()] == [("timeout", ())]
    assert waiting.deltas[-1].times is not None and waiting.deltas[-1].times.scheduled is None
    assert other.wait()[-1].finish_reason == "length"
    assert engine.stats().finished == {"timeout": 2, "length": 1}


# ---- samples -------------------------------------------------------------------------------------


def test_samples_of_a_request_come_in_one_stream_of_deltas(house: House) -> None:
    engine = house.build(blocks=20, tokens=8)
    sink = Collector()
    params = replace(GREEDY, temperature=1.0, seed=3, n=4)
    request_id = engine.submit([1, 2, 3, 4, 5], params, sink)
    assert sink.ended.wait(20)
    assert {delta.request_id for delta in sink.deltas} == {request_id}
    assert [delta.done for delta in sink.deltas] == [False] * (len(sink.deltas) - 1) + [True]
    for index in range(4):
        mine = [delta for delta in sink.deltas if delta.index == index]
        assert [t for d in mine for t in d.token_ids] == expected_tokens([1, 2, 3, 4, 5], params, 3, index)
        assert [d.finish_reason for d in mine] == [None] * 11 + ["length"]
    assert engine.stats().finished == {"length": 4}


def test_aborting_ends_the_samples_that_are_left(house: House) -> None:
    eos, word = TOKENIZER.spec.eos_token_ids[0], TOKENIZER.encode("The")[0]
    gate = Gate()
    engine = house.build(
        model=lambda history, draw: eos if draw.sample == 1 else word,
        before_step=gate.before_step,
        defaults=GenerationDefaults(stop_token_ids=(eos,)),
    )
    sink = Collector()
    request_id = engine.submit([1, 2], replace(GREEDY, n=3), sink)
    gate.wait_for_step()
    gate.let_through()
    gate.wait_for_step()
    assert engine.abort(request_id)
    assert not engine.abort(request_id)
    gate.open()
    assert sink.ended.wait(20)
    ends = {d.index: (d.finish_reason, d.done) for d in sink.deltas if d.finish_reason}
    assert ends == {1: ("stop", False), 0: ("abort", False), 2: ("abort", True)}


async def test_samples_that_wait_for_a_slow_reader_are_merged_apart(house: House) -> None:
    gate = Gate()
    ended = threading.Event()
    engine = house.build(before_step=gate.before_step, on_step=lambda report: report.num_running or ended.set())
    params = replace(GREEDY, temperature=1.0, seed=3, n=2)
    gate.open()
    async with aclosing(engine.stream([1, 2, 3], params)) as stream:
        deltas = [await anext(stream)]
        assert await asyncio.to_thread(ended.wait, 20)
        deltas += [delta async for delta in stream]
    for index in range(2):
        tokens = [t for d in deltas if d.index == index for t in d.token_ids]
        assert tokens == expected_tokens([1, 2, 3], params, 3, index)
    assert [d.done for d in deltas] == [False] * (len(deltas) - 1) + [True]


# ---- what is refused -----------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_is_refused_by_its_length_alone(house: House) -> None:
    """However long it is, nothing is copied: 128 samples of a prompt of 10 MB would be a gigabyte."""

    class Prompt(Sequence[int]):
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, index: Any) -> Any:
            raise AssertionError("a token was looked at")

    engine = house.build(max_context=100)
    with pytest.raises(InvalidRequestError, match="1000000000 tokens and leaves no room.*context is 100"):
        engine.submit(Prompt(), replace(GREEDY, n=128), Collector())


def test_refusals(house: House) -> None:
    gate = Gate()
    engine = house.build(blocks=10, max_context=100, seqs=1, queue=2, before_step=gate.before_step)
    cases: list[tuple[list[int], SamplingParams, str]] = [
        ([], GREEDY, "empty"),
        ([VOCAB], GREEDY, f"between 0 and {VOCAB - 1}"),
        ([-1], GREEDY, "between 0"),
        ([1] * 100, GREEDY, "100 tokens and leaves no room.*context is 100"),
        ([1] * 20, replace(GREEDY, max_tokens=30), "need 13 KV blocks of 4 tokens, there are 10.*at most 21"),
        ([1] * 50, GREEDY, "shorten the prompt by 10 tokens"),
        ([1], replace(GREEDY, n=3), "3 samples of one request; at most 2"),
    ]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"priority": 1}, "priority must be 0.*scheduler.policy is fcfs"),
        ({"priority": "high"}, "priority must be an integer"),
        ({"timeout_s": 0}, "timeout_s must be seconds above 0, got 0"),
        ({"timeout_s": "x"}, "timeout_s must be seconds above 0, got 'x'"),
        ({"timeout_s": float("nan")}, "timeout_s must be seconds above 0"),
    ]
    for terms, message in wrong:
        with pytest.raises(InvalidRequestError, match=message):
            engine.submit([1], GREEDY, Collector(), **terms)
    for prompt, params, message in cases:
        with pytest.raises(InvalidRequestError, match=message):
            engine.submit(prompt, params, Collector())
    sinks = [Collector() for _ in range(3)]
    engine.submit([1] * 20, replace(GREEDY, max_tokens=21), sinks[0])
    gate.wait_for_step()
    for sink in sinks[1:]:
        engine.submit([1], GREEDY, sink)
    with pytest.raises(QueueFullError, match="2 waiting") as refused:
        engine.submit([1], GREEDY, Collector())
    assert refused.value.retry_after_s > 0
    gate.open()
    assert [sink.wait()[-1].finish_reason for sink in sinks] == ["length"] * 3


# ---- reports -------------------------------------------------------------------------------------


def test_reports_keep_a_ledger_true(house: House) -> None:
    ledger = LeaseLedger([GroupShape(25, 1024)], BLOCK)
    [extent] = ledger.lease("engine", 0, 20)
    reports: list[StepReport] = []

    def on_step(report: StepReport) -> None:
        reports.append(report)
        assert ledger.report("engine", report.epoch, report.step, report.kv)
        assert not ledger.report("engine", report.epoch, report.step, report.kv)
        ledger.check_integrity()

    assert (extent.start, extent.count) == (1, 20)
    engine = house.build(blocks=20, tokens=8, on_step=on_step)
    engine.generate([[index] * 9 for index in range(8)], replace(GREEDY, max_tokens=30))
    engine.close()
    stats = ledger.stats()
    assert (stats.used_blocks, stats.active_sequences) == (0, 0)
    assert stats.allocations > 8 * 8
    assert stats.failures >= engine.stats().preemptions > 0
    steps = [report for report in reports if report.stats is not None]
    assert len(steps) == engine.stats().steps
    assert sum(report.stats.num_tokens for report in steps if report.stats) == engine.stats().total.num_tokens
    assert engine.stats().total.bytes_streamed == 1000 * len(steps)


def test_reports_say_how_long_what_took(house: House) -> None:
    reports: list[StepReport] = []
    gate = Gate()
    engine = house.build(on_step=reports.append, seqs=2, before_step=gate.before_step)
    seen: list[int] = []
    engine.observe(lambda report: seen.append(report.step))
    sink, aborted = Collector(), Collector()
    before = time.monotonic()
    engine.submit([1, 2, 3], replace(GREEDY, n=2, temperature=1.0), sink)
    request_id = engine.submit([1], GREEDY, aborted)
    gate.wait_for_step()
    assert engine.abort(request_id)
    gate.open()
    sink.wait()
    engine.close()
    after = time.monotonic()
    assert seen == [report.step for report in reports]
    finished = [each for report in reports for each in report.finished]
    assert sorted((f.index, f.finish_reason, f.completion_tokens, f.n) for f in finished) == [
        (0, "abort", 0, 1),
        (0, "length", 12, 2),
        (1, "length", 12, 2),
    ]
    first = [seconds for report in reports for seconds in report.first_tokens]
    assert len(first) == 2
    assert len([gap for report in reports for gap in report.token_gaps]) == 22
    times = sink.deltas[-1].times
    assert times is not None and times.scheduled is not None and times.first_token is not None
    assert times.last_token is not None and times.decode_s is not None and times.prefill_s is not None
    assert before <= times.arrived <= times.scheduled <= times.first_token <= times.last_token <= times.ended <= after
    assert times.time_to_first_token_s == first[0]
    assert times.total_s == pytest.approx(times.queue_s + times.prefill_s + times.decode_s, abs=0.1)
    left = aborted.deltas[-1].times
    assert left is not None and left.time_to_first_token_s is None and left.queue_s == left.total_s
    loop = engine.stats().loop
    assert loop.execute_s == pytest.approx(sum(report.times.execute_s for report in reports))
    assert loop.schedule_s > 0 and loop.process_s > 0


def test_why_a_text_ended(house: House) -> None:
    eos, word = TOKENIZER.spec.eos_token_ids[0], TOKENIZER.encode("The")[0]
    engine = house.build(
        model=lambda history, draw: (word, word, 7, eos)[min(draw.position, 3)],
        defaults=GenerationDefaults(stop_token_ids=(eos,)),
    )
    cases: list[tuple[dict[str, Any], object, int]] = [
        ({}, None, 4),
        ({"stop_token_ids": (7,)}, 7, 3),
        ({"stop": ("he", "zz")}, "he", 1),
    ]
    for given, reason, count in cases:
        [output] = engine.generate([[1]], replace(GREEDY, **given))
        assert (output.finish_reason, output.stop_reason, output.completion_tokens) == ("stop", reason, count)
    [output] = engine.generate([[1]], replace(GREEDY, max_tokens=2))
    assert (output.finish_reason, output.stop_reason) == ("length", None)


def test_priorities(house: House) -> None:
    gate = Gate()
    engine = house.build(seqs=1, policy="priority", before_step=gate.before_step)
    order: list[str] = []
    sinks = {name: Collector() for name in ("running", "later", "sooner")}

    def note(name: str, delta: OutputDelta) -> None:
        sinks[name](delta)
        if delta.done:
            order.append(name)

    for name, priority in (("running", 9), ("later", 3), ("sooner", -3)):
        engine.submit([1, 2], GREEDY, partial(note, name), priority=priority)
        if name == "running":
            gate.wait_for_step()
    gate.open()
    for sink in sinks.values():
        sink.wait()
    assert order == ["running", "sooner", "later"]


def test_blocks_that_come_back_without_a_step_are_reported(house: House) -> None:
    """An abort between the last step and the next one: no step follows that could carry the news."""
    reported = threading.Semaphore(0)
    held: set[int] = set()

    def on_step(report: StepReport) -> None:
        for change in report.kv.sequences:
            held.difference_update(change.freed)
            held.update(change.allocated)
        if report.step == 2:
            engine.abort(request_id)  # on the engine's thread, between two steps
        if not held:
            reported.release()

    gate = Gate()
    engine = house.build(before_step=gate.before_step, on_step=on_step)
    request_id = engine.submit([1, 2, 3], replace(GREEDY, max_tokens=50), Collector())
    gate.open()
    assert reported.acquire(timeout=20)
    assert engine.stats().steps == 2


def test_a_failing_hook_does_not_stop_the_engine(house: House) -> None:
    def on_step(report: StepReport) -> None:
        raise ResourceNotAvailableError("the KV actor is away")

    [output] = house.build(on_step=on_step).generate([[1, 2]], GREEDY)
    assert output.finish_reason == "length"


def test_the_engine_sleeps_when_idle(house: House) -> None:
    executor = PagedExecutor(401, BLOCK, VOCAB)
    engine = house.build(executor=executor)
    engine.generate([[1, 2]], GREEDY)
    steps = len(executor.batches)
    waits = 0
    original = engine._changed.wait_for

    def counted(predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        nonlocal waits
        waits += 1
        return original(predicate, timeout)

    engine._changed.wait_for = counted  # type: ignore[method-assign]
    engine.generate([[1, 2]], GREEDY)
    assert len(executor.batches) == 2 * steps
    assert waits <= 2
    assert executor.threads == {engine._thread.ident}
