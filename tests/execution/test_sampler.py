"""G3: what requests do to logits, against slow definitions; state that follows the tokens; logprobs."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytier.engine.step import Arrival, SequenceChunk, SequenceSpec, StepBatch, StepResult
from raytier.execution import grammar as grammar_module
from raytier.execution import logprobs as logprobs_module
from raytier.execution.drawing import draw
from raytier.execution.logits import LogitRules, adjust
from raytier.execution.logprobs import token_logprobs
from raytier.execution.sampler import Sampler
from tests.engine.fakes import byte_level_tokenizer

VOCAB = 40
NEVER = -math.inf


def by_definition(
    logits: Sequence[float], spec: SequenceSpec, prompt: Sequence[int], output: Sequence[int]
) -> list[float]:
    """One row, one token at a time, in the order that engine.md 4.1 names."""
    changed = list(logits)
    if spec.allowed_token_ids is not None:
        changed = [value if token in spec.allowed_token_ids else NEVER for token, value in enumerate(changed)]
    for word in spec.bad_words:
        if list(word[:-1]) == list(output[len(output) - len(word) + 1 :] if len(word) > 1 else []):
            changed[word[-1]] = NEVER
    if len(output) < spec.min_tokens:
        for token in spec.stop_ids:
            changed[token] = NEVER
    for token, bias in spec.logit_bias:
        changed[token] += bias
    for token in {*prompt, *output}:
        value = changed[token]
        value = value / spec.repetition_penalty if value > 0 else value * spec.repetition_penalty
        times = list(output).count(token)
        changed[token] = value - spec.frequency_penalty * times - spec.presence_penalty * (times > 0)
    return changed


tokens = st.integers(0, VOCAB - 1)
words = st.lists(tokens, min_size=1, max_size=3).map(tuple)


@st.composite
def specs(make: st.DrawFn) -> SequenceSpec:
    """Each field at its default half of the time."""

    def maybe(default: Any, other: st.SearchStrategy[Any]) -> Any:
        return make(st.one_of(st.just(default), other))

    return SequenceSpec(
        repetition_penalty=maybe(1.0, st.floats(0.1, 3)),
        presence_penalty=maybe(0.0, st.floats(-2, 2)),
        frequency_penalty=maybe(0.0, st.floats(-2, 2)),
        logit_bias=tuple(maybe({}, st.dictionaries(tokens, st.floats(-100, 100), max_size=5)).items()),
        allowed_token_ids=maybe(None, st.lists(tokens, min_size=1, max_size=30).map(tuple)),
        bad_words=tuple(maybe([], st.lists(words, max_size=4))),
        min_tokens=maybe(0, st.integers(0, 6)),
        stop_ids=tuple(maybe([], st.lists(tokens, max_size=3, unique=True))),
    )


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.tuples(specs(), st.lists(tokens, min_size=1, max_size=12), st.lists(tokens, max_size=8)),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 1000),
)
def test_logits_are_changed_as_defined(rows: list[tuple[SequenceSpec, list[int], list[int]]], seed: int) -> None:
    """A whole batch at once equals row after row; state that grew token by token equals state made from all tokens."""
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    expected = torch.tensor(
        [by_definition(row.tolist(), *each) for row, each in zip(logits, rows, strict=True)], dtype=torch.float32
    )
    grown, whole = [], []
    for spec, prompt, output in rows:
        rules = LogitRules(spec, VOCAB, len(prompt), prompt)
        for token in output:
            rules.add(token)
        grown.append(rules)
        whole.append(LogitRules(spec, VOCAB, len(prompt), prompt + output))
    positions = [len(output) for _, _, output in rows]
    for rules_of_all in (grown, whole):
        changed = logits.clone()
        adjust(changed, rules_of_all, positions, [None] * len(rows))
        torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-5)
        for row, (rules, position) in enumerate(zip(rules_of_all, positions, strict=True)):
            if not rules.acts(position):
                assert torch.equal(changed[row], logits[row])


class Model:
    """A sampler, and logits that follow from sequence and position alone."""

    def __init__(self, vocab: int = VOCAB) -> None:
        self.sampler = Sampler(vocab, None)
        self.vocab = vocab
        self.steps = 0

    def logits(self, seq_id: int, position: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * seq_id + position)
        return torch.randn(self.vocab, generator=generator) * 2

    def step(
        self, chunks: Sequence[SequenceChunk], arrivals: Sequence[Arrival] = (), ended: Sequence[int] = ()
    ) -> StepResult:
        self.steps += 1
        batch = StepBatch("m", 0, self.steps, tuple(chunks), tuple(arrivals), tuple(ended))
        self.sampler.begin(batch)
        packed = [(c.seq_id, c.start + i) for c in chunks for i in range(len(c.token_ids))]
        rows = [self.logits(*packed[row]) for row in self.sampler.rows(batch)]
        return self.sampler.finish(batch, torch.stack(rows) if rows else torch.empty(0, self.vocab))


PROMPT = (3, 1, 4, 1, 5)
FULL = SequenceSpec(
    temperature=0.8,
    top_p=0.95,
    seed=5,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    bad_words=((7, 8), (9,)),
    logit_bias=((2, 1.5),),
    min_tokens=3,
    stop_ids=(0,),
)


def generate(model: Model, spec: SequenceSpec, count: int, *, lose_at: int = -1, seq_id: int = 1) -> list[int]:
    """`count` tokens, with a preemption before token `lose_at`."""
    known = list(PROMPT)
    arrival, ended, start = [Arrival(seq_id, spec, len(PROMPT), PROMPT)], [], 0
    for number in range(count):
        if number == lose_at:
            arrival, ended, start = [Arrival(seq_id, spec, len(PROMPT), tuple(known))], [seq_id], 0
        chunk = SequenceChunk(seq_id, tuple(known[start:]), start, (1,), True)
        start = len(known)
        known.append(model.step([chunk], arrival, ended).tokens[seq_id])
        arrival, ended = [], []
    return known[len(PROMPT) :]


@pytest.mark.parametrize("lose_at", [1, 4, 9])
def test_a_preempted_sequence_goes_on_with_the_same_state(lose_at: int) -> None:
    assert generate(Model(), FULL, 12) == generate(Model(), FULL, 12, lose_at=lose_at)


def test_what_ended_is_forgotten_and_what_did_not_arrive_is_refused() -> None:
    model = Model()
    chunk = SequenceChunk(1, PROMPT, 0, (1,), True)
    with pytest.raises(RuntimeError, match=r"not arrived: \[1\]"):
        model.step([chunk])
    model.step([chunk], [Arrival(1, FULL, 5, PROMPT)])
    model.step([SequenceChunk(2, (4,), 0, (1,), True)], [Arrival(2, SequenceSpec(), 1)], ended=[1])
    assert len(model.sampler) == 1
    with pytest.raises(RuntimeError, match="not arrived"):
        model.step([chunk])


def test_a_row_does_not_depend_on_the_others() -> None:
    kinds = [SequenceSpec(), FULL, SequenceSpec(temperature=1.0, seed=3), SequenceSpec(allowed_token_ids=(4, 5))]
    together = Model()
    arrivals = [Arrival(i, spec, 5, PROMPT) for i, spec in enumerate(kinds)]
    chunks = [SequenceChunk(i, PROMPT, 0, (1,), True) for i in range(4)]
    drawn = together.step(chunks, arrivals).tokens
    for index in range(4):
        assert Model().step([chunks[index]], [arrivals[index]]).tokens == {index: drawn[index]}


def test_plain_greedy_is_argmax_whatever_runs_beside_it() -> None:
    model = Model()
    arrivals = [Arrival(i, SequenceSpec(logprobs=3) if i % 2 else SequenceSpec(), 5) for i in range(6)]
    arrivals.append(Arrival(6, FULL, 5, PROMPT))
    drawn = model.step([SequenceChunk(i, PROMPT, 0, (1,), True) for i in range(7)], arrivals).tokens
    assert [drawn[i] for i in range(6)] == [int(model.logits(i, 4).argmax()) for i in range(6)]


def test_a_sequence_without_a_possible_token_fails_alone() -> None:
    impossible = SequenceSpec(allowed_token_ids=(4,), bad_words=((4,),))
    arrivals = [Arrival(1, impossible, 5, PROMPT), Arrival(2, SequenceSpec(), 5)]
    result = Model().step([SequenceChunk(i, PROMPT, 0, (1,), True) for i in (1, 2)], arrivals)
    assert result.tokens.keys() == {2}
    assert "leave no token" in result.failed[1]


def test_penalties_change_what_a_greedy_sequence_repeats() -> None:
    """With the same logits at every position: greedy repeats itself, penalties and bans make it move on."""

    class Flat(Model):
        def logits(self, seq_id: int, position: int) -> torch.Tensor:
            return torch.arange(self.vocab, dtype=torch.float32) * 0.1 + 1

    assert generate(Flat(), SequenceSpec(), 4) == [39] * 4
    assert generate(Flat(), SequenceSpec(presence_penalty=0.15), 4) == [39, 38, 39, 39]
    assert generate(Flat(), SequenceSpec(frequency_penalty=0.15), 4) == [39, 38, 39, 37]
    assert generate(Flat(), SequenceSpec(repetition_penalty=2.0), 4) == [39, 38, 37, 36]
    assert generate(Flat(), SequenceSpec(bad_words=((39, 39),)), 4) == [39, 38, 39, 38]
    assert generate(Flat(), SequenceSpec(min_tokens=2, stop_ids=(39,)), 4) == [38, 38, 39, 39]


# ---- logprobs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_log_softmax(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs_module, "PIECE_BYTES", 3 * 4 * VOCAB)
    logits = (torch.randn(10, VOCAB) * 3).to(dtype)
    rows, ids = [7, 0, 2, 9, 4, 4, 1], [0, 1, 2, 3, 4, 5, 39]
    found = token_logprobs(logits, rows, ids, [0, 1, 2, 20, 40, 5, 3])
    expected = torch.log_softmax(logits.float(), dim=-1)
    for row, token, entry in zip(rows, ids, found, strict=True):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(expected[row, token]), abs=1e-5)
        assert entry.rank == 1 + int((logits[row] > logits[row, token]).sum())
        order = sorted(range(VOCAB), key=lambda i: (-float(logits[row, i]), i))[: len(entry.top)]
        assert [i for i, _ in entry.top] == order or dtype is torch.bfloat16
        assert [p for _, p in entry.top] == pytest.approx([float(expected[row, i]) for i in order], abs=1e-5)
    assert [len(entry.top) for entry in found] == [0, 1, 2, 20, 40, 5, 3]


def test_logprobs_are_taken_before_anything_is_applied() -> None:
    model = Model()
    spec = SequenceSpec(temperature=0.1, logit_bias=((2, 100.0),), repetition_penalty=2.0, logprobs=2)
    result = model.step([SequenceChunk(1, PROMPT, 0, (1,), True)], [Arrival(1, spec, 5, PROMPT)])
    expected = torch.log_softmax(model.logits(1, 4), dim=-1)
    assert result.tokens == {1: 2}
    assert result.logprobs[1].logprob == pytest.approx(float(expected[2]), abs=1e-5)
    assert result.logprobs[1].top[0] == (int(expected.argmax()), pytest.approx(float(expected.max()), abs=1e-5))


@pytest.mark.parametrize("sizes", [[9], [4, 5], [1, 1, 7], [8, 1]])
@pytest.mark.parametrize("known", [1, 4, 9])
def test_logprobs_of_a_prompt_whatever_its_chunks(sizes: list[int], known: int) -> None:
    """Each is that of a token after those before it; what is known already is not computed again."""
    model, prompt = Model(), (3, 1, 4, 1, 5, 9, 2, 6, 5)
    arrivals = [
        Arrival(1, SequenceSpec(prompt_logprobs=1, logprobs=0), 9, prompt, known),
        Arrival(2, SequenceSpec(), 5),
    ]
    found, start = [], 0
    for size in sizes:
        chunk = SequenceChunk(1, prompt[start : start + size], start, (1,), start + size == 9)
        other = SequenceChunk(2, PROMPT, 0, (2,), True)
        result = model.step([other, chunk], arrivals)
        found += result.prompt_logprobs.get(1, ())
        assert result.tokens[2] == int(model.logits(2, 4).argmax())
        assert (1 in result.logprobs) == chunk.draws
        start, arrivals = start + size, []
    assert [entry.token_id for entry in found] == list(prompt[known:])
    for position, entry in enumerate(found, known):
        expected = torch.log_softmax(model.logits(1, position - 1), dim=-1)
        assert entry.logprob == pytest.approx(float(expected[prompt[position]]), abs=1e-5)
        assert entry.top[0][0] == int(expected.argmax())


def test_the_draw_follows_the_changed_distribution() -> None:
    """Frequencies of 4000 draws against the softmax of what the definition makes of the logits."""
    spec = SequenceSpec(temperature=0.7, repetition_penalty=1.4, presence_penalty=0.5, logit_bias=((11, 1.0),))
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 1.5
    output = [5, 5, 6]
    expected = torch.tensor(by_definition(logits.tolist(), spec, PROMPT, output))
    probabilities = torch.softmax(expected / spec.temperature, dim=-1)
    rules = LogitRules(spec, VOCAB, len(PROMPT), [*PROMPT, *output])
    changed = logits[None].repeat(4000, 1)
    adjust(changed, [rules] * 4000, [3] * 4000, [None] * 4000)
    drawn = torch.tensor(draw(changed, [spec.draw(position) for position in range(4000)]))
    counts = torch.bincount(drawn, minlength=VOCAB) / 4000
    torch.testing.assert_close(counts, probabilities, atol=0.03, rtol=0)


# ---- grammars ------------------------------------------------------------------------------------


def test_a_grammar_is_compiled_while_the_prompt_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins when the sequence arrives, and the masks of others do not wait for it."""
    real, gate, began = grammar_module.LLMatcher, threading.Event(), threading.Event()
    slow = real.grammar_from_regex("[0-9]+")
    known = real.grammar_from_regex("[a-z]+")

    def compile_(tokenizer: Any, grammar: str, **options: Any) -> Any:
        if grammar == slow:
            began.set()
            assert gate.wait(20)
        return real(tokenizer, grammar, **options)

    monkeypatch.setattr(grammar_module, "LLMatcher", compile_)
    vocab = byte_level_tokenizer().vocab_size
    sampler = Sampler(vocab, byte_level_tokenizer().spec)

    def step(number: int, chunks: list[SequenceChunk], *arrivals: Arrival) -> StepResult:
        batch = StepBatch("m", 0, number, tuple(chunks), arrivals, ())
        sampler.begin(batch)
        return sampler.finish(batch, torch.zeros(len(sampler.rows(batch)), vocab))

    try:
        first = SequenceChunk(1, (5,), 0, (1,), True)
        assert set(step(1, [first], Arrival(1, SequenceSpec(grammar=known), 1)).tokens) == {1}
        prompt = SequenceChunk(2, (5, 6), 0, (2,), False)
        step(2, [prompt], Arrival(2, SequenceSpec(grammar=slow), 3))
        assert began.wait(10), "compiling begins with the prompt"
        with ThreadPoolExecutor(1) as pool:
            again = pool.submit(step, 3, [SequenceChunk(1, (7,), 1, (1,), True)])
            try:
                assert set(again.result(10).tokens) == {1}
            finally:
                gate.set()
        assert set(step(4, [SequenceChunk(2, (7,), 2, (2,), True)]).tokens) == {2}
    finally:
        gate.set()
        sampler.close()
