"""G3, G4, G6: what a request may ask for, through a real engine on a real model, with transformers as the judge."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytier.engine.outputs import OutputDelta
from raytier.engine.sampling_params import SamplingParams
from raytier.engine.step import TokenLogprobs
from raytier.engine.structured import StructuredOutputs
from raytier.errors import GenerationError, InvalidRequestError
from tests.checkpoint.families import VOCAB
from tests.local_engine import LocalEngine, local_engine
from tests.models import random_prompts, save_model

GREEDY = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=30, ignore_eos=True)
PROMPTS = random_prompts(1, 40, 9, 25, 17)
#: Little KV memory and short steps: prompts are read in pieces and sequences are preempted.
TIGHT: dict[str, Any] = {
    "kv": {"block_size": 4, "max_blocks": 25},
    "scheduler": {"max_num_batched_tokens": 11, "max_num_seqs": 6},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "llama", "llama", tokenizer_dir)


@pytest.fixture(scope="module")
def plenty(model_dir: Path) -> Iterator[LocalEngine]:
    with local_engine(model_dir) as local:
        yield local


@pytest.fixture(scope="module")
def tight(model_dir: Path) -> Iterator[LocalEngine]:
    with local_engine(model_dir, **TIGHT) as local:
        yield local


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in ("plenty", "tight"):
        if name in request.fixturenames:
            stats = request.getfixturevalue(name).engine.stats()
            assert (stats.running, stats.waiting, stats.kv_blocks_used, stats.dead) == (0, 0, 0, None)


# ---- sampling against transformers ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"bad_words": ("a", "the")}, {}),
        (
            {"min_tokens": 22, "stop_token_ids": tuple(range(3, 200))},
            {"min_new_tokens": 22, "eos_token_id": list(range(3, 200))},
        ),
    ],
)
@pytest.mark.parametrize("house", ["plenty", "tight"])
def test_greedy_with_what_changes_logits_is_that_of_transformers(
    house: str, ours: dict[str, Any], theirs: dict[str, Any], reference: Any, request: pytest.FixtureRequest
) -> None:
    engine = request.getfixturevalue(house).engine
    if "bad_words" in ours:
        ids_of = engine.tokenizer.encode
        theirs = {"bad_words_ids": [ids_of(word, add_special_tokens=False) for word in ours["bad_words"]]}
    before = engine.stats().preemptions
    outputs = engine.generate(PROMPTS, replace(GREEDY, **ours))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([prompt])
        arguments = {"eos_token_id": None, **theirs}
        expected = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False, **arguments
        )[0, len(prompt) :].tolist()
        assert list(output.token_ids) == expected
    assert (engine.stats().preemptions > before) == (house == "tight")


def test_n_samples_are_those_of_single_requests(plenty: LocalEngine, tight: LocalEngine) -> None:
    """Sample i draws the same whatever n is, and whatever else runs; greedy ones are all alike."""
    params = replace(GREEDY, temperature=1.0, seed=11, n=4)
    four = plenty.engine.generate(PROMPTS[:2], params)
    assert [output.index for output in four] == [0, 1, 2, 3] * 2
    assert len({output.token_ids for output in four}) > 4
    assert [o.token_ids for o in tight.engine.generate(PROMPTS[:2], params)] == [o.token_ids for o in four]
    two = plenty.engine.generate([PROMPTS[0]], replace(params, n=2))
    assert [output.token_ids for output in two] == [output.token_ids for output in four[:2]]
    alike = plenty.engine.generate([PROMPTS[2]], replace(GREEDY, n=3))
    assert len({output.token_ids for output in alike}) == 1


async def test_a_stream_of_samples_ends_once(plenty: LocalEngine) -> None:
    params = replace(GREEDY, temperature=1.0, seed=3, n=3)
    deltas = [delta async for delta in plenty.engine.stream(PROMPTS[1], params)]
    assert [delta.done for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    whole = plenty.engine.generate([PROMPTS[1]], params)
    for index in range(3):
        mine = [delta for delta in deltas if delta.index == index]
        assert tuple(t for d in mine for t in d.token_ids) == whole[index].token_ids
        assert "".join(d.text for d in mine) == whole[index].text
        assert [d.finish_reason for d in mine if d.finish_reason] == ["length"]


# ---- logprobs ------------------------------------------------------------------------------------


def check(entries: tuple[TokenLogprobs | None, ...], tokens: list[int], logits: torch.Tensor, top: int) -> None:
    """`entries` of `tokens` against the logits that each of them was predicted with."""
    expected = torch.log_softmax(logits, dim=-1)
    assert len(entries) == len(tokens)
    for entry, token, row in zip(entries, tokens, expected, strict=True):
        assert entry is not None and entry.token_id == token
        assert entry.logprob == pytest.approx(float(row[token]), abs=2e-4)
        assert entry.rank == 1 + int((row > row[token]).sum())
        assert [p for _, p in entry.top] == pytest.approx(row.topk(top).values.tolist(), abs=2e-4)


@pytest.mark.parametrize("house", ["plenty", "tight"])
def test_logprobs_of_prompt_and_output(house: str, reference: Any, request: pytest.FixtureRequest) -> None:
    """Prompts in pieces, rows bounded per step, preemptions in between: nothing is lost or twice."""
    engine = request.getfixturevalue(house).engine
    params = [replace(GREEDY, temperature=t, seed=1, logprobs=3, prompt_logprobs=2) for t in (0, 1, 0, 1, 0)]
    outputs = engine.generate(PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([[*prompt, *output.token_ids]])).logits[0]
        assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
        check(output.prompt_logprobs[1:], prompt[1:], logits[: len(prompt) - 1], 2)
        check(output.logprobs, list(output.token_ids), logits[len(prompt) - 1 : -1], 3)


@pytest.mark.parametrize("house", ["plenty", "tight"])
def test_a_request_for_the_prompt_alone(house: str, reference: Any, request: pytest.FixtureRequest) -> None:
    """What lm-eval's loglikelihood asks for: nothing generated, every token of the prompt judged."""
    engine = request.getfixturevalue(house).engine
    before = engine.stats()
    outputs = engine.generate(PROMPTS, replace(GREEDY, max_tokens=0, prompt_logprobs=1, n=2))
    assert len(outputs) == 10
    for number, output in enumerate(outputs):
        prompt = PROMPTS[number // 2]
        assert (output.token_ids, output.text, output.finish_reason, output.completion_tokens) == ((), "", "length", 0)
        assert (output.prompt_logprobs is None) == (output.index == 1)
        if output.prompt_logprobs is not None:
            with torch.no_grad():
                check(output.prompt_logprobs[1:], prompt[1:], reference(torch.tensor([prompt])).logits[0, :-1], 1)
    stats = engine.stats()
    assert stats.generated_tokens == before.generated_tokens
    assert stats.prompt_tokens - before.prompt_tokens == 2 * sum(map(len, PROMPTS))


def test_a_prompt_as_long_as_the_context(plenty: LocalEngine) -> None:
    [prompt] = random_prompts(plenty.manifest.max_context)
    [output] = plenty.engine.generate([prompt], replace(GREEDY, max_tokens=0, prompt_logprobs=0))
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
    with pytest.raises(InvalidRequestError, match="leaves no room"):
        plenty.engine.generate([prompt], replace(GREEDY, max_tokens=1, prompt_logprobs=0))
    with pytest.raises(InvalidRequestError, match="max_tokens must be at least 1"):
        replace(GREEDY, max_tokens=0)


# ---- structured output ---------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
DRAWN = replace(GREEDY, temperature=1.0, max_tokens=120, ignore_eos=False)


def is_person(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"name", "age"} and len(value["name"]) <= 5 and 0 <= value["age"] <= 99


KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "json": ({"json": SCHEMA}, is_person),
    "regex": ({"regex": r"[a-f]{3,9}-\d{2}é?"}, lambda text: re.fullmatch(r"[a-f]{3,9}-\d{2}é?", text)),
    "choice": (
        {"choice": ["the quick", "the lazy dog", 'a "b"\\n', "日本"]},
        lambda text: text in KINDS["choice"][0]["choice"],
    ),
    "grammar": (
        {"grammar": 'start: ("yes" | "no") " " NUMBER\nNUMBER: /[0-9]{2}/\n'},
        lambda text: re.fullmatch(r"(yes|no) \d\d", text),
    ),
    "gbnf": (
        {"grammar": 'root ::= "[" item ("," item){1,2} "]"\nitem ::= [a-c]+ [0-9]'},
        lambda text: re.fullmatch(r"\[[a-c]+\d(,[a-c]+\d){1,2}\]", text),
    ),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_text_matches(kind: str, plenty: LocalEngine, tight: LocalEngine) -> None:
    """Drawn from a random model, several samples each; the same after preemptions, and beside free requests."""
    asked, matches = KINDS[kind]
    structured = StructuredOutputs.from_request(asked)
    params = replace(DRAWN, structured_outputs=structured, seed=5, n=3, max_tokens=60)
    outputs = plenty.engine.generate([[5, 6, 7]], params)
    ended = [output for output in outputs if output.finish_reason == "stop"]
    assert all(matches(output.text) for output in ended)
    assert len(ended) == 3 or kind in ("gbnf", "json"), "what has no end within 60 tokens"
    assert len({output.text for output in outputs}) > 1 or kind == "choice"
    before = tight.engine.stats().preemptions
    free = random_prompts(30, 31)
    again = tight.engine.generate([*free, [5, 6, 7]], [GREEDY, GREEDY, params])
    assert tight.engine.stats().preemptions > before
    alone = plenty.engine.generate(free, GREEDY)
    assert [o.token_ids for o in again] == [o.token_ids for o in (*alone, *outputs)]


def test_any_json_object(plenty: LocalEngine) -> None:
    structured = StructuredOutputs(json_object=True)
    bias = tuple((plenty.engine.tokenizer.encode(t, add_special_tokens=False)[0], 6.0) for t in ('"', "}", "{"))
    params = replace(DRAWN, structured_outputs=structured, n=6, seed=1, logit_bias=bias)
    ended = [o for o in plenty.engine.generate([[5]], params) if o.finish_reason == "stop"]
    assert ended and all(isinstance(json.loads(output.text), dict) for output in ended)


def test_a_grammar_with_stop_strings_and_min_tokens(plenty: LocalEngine) -> None:
    structured = StructuredOutputs(regex="a{1,20}")
    params = replace(DRAWN, structured_outputs=structured, n=8, seed=2)
    lengths = {len(output.text) for output in plenty.engine.generate([[5]], params)}
    assert min(lengths) < 15 and max(lengths) <= 20
    longer = plenty.engine.generate([[5]], replace(params, min_tokens=15))
    assert all(o.completion_tokens > 15 or len(o.text) == 20 for o in longer), (
        "the grammar's end comes before min_tokens"
    )
    for output in plenty.engine.generate([[5]], replace(params, stop=("aaa",))):
        assert output.text in ("", "a", "aa")
        assert (output.stop_reason == "aaa") == (len(output.text) == 0 or output.completion_tokens > 2) or output.text
    exact = replace(GREEDY, structured_outputs=StructuredOutputs(regex="ab"), min_tokens=12)
    [output] = plenty.engine.generate([[5]], exact)
    assert (output.text, output.finish_reason, output.stop_reason) == ("ab", "stop", None)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"json": '{"type": "objekt"}'}, "json: Invalid type: objekt, at the root"),
        (
            {"json": {"type": "object", "properties": {"a": {"items": {"type": "strin"}}}}},
            r"strin, at properties\.a\.items",
        ),
        (
            {"json": {"$defs": {"x": {"type": "integer", "minimum": 5, "maximum": 2}}, "$ref": "#/$defs/x"}},
            r"minimum.*at \$defs\.x",
        ),
        ({"json": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/nowhere"}]}}, r"nowhere.*at anyOf\[1\]"),
        ({"json": '{"type": '}, "not a JSON schema.*line 1 column"),
        ({"json": "[1]"}, "an object is expected, got list"),
        ({"regex": "a(b"}, "unclosed group"),
        ({"regex": r"\d+(?=x)"}, "look-ahead"),
        ({"grammar": 'start: "a" b\n'}, r'1\(8\): unknown name: "b"'),
        ({"grammar": 'root ::= "a" [0-9'}, "line 1"),
        ({"grammar": ""}, "1 to"),
        ({"choice": []}, "1 to 4096 texts"),
        ({"choice": [1]}, "a list of texts"),
        ({}, "exactly one of"),
        ({"regex": "a", "choice": ["a"]}, "exactly one of.*got regex, choice"),
        ({"xml": "a"}, "no field 'xml'"),
        ("json", "must be a map"),
    ],
)
def test_what_cannot_be_matched_is_refused_and_says_where(asked: Any, message: str, plenty: LocalEngine) -> None:
    engine = plenty.engine
    with pytest.raises(InvalidRequestError, match=f"(?s)^structured_outputs.*{message}") as refused:
        engine.check(SamplingParams.from_request(engine.defaults, structured_outputs=asked))
    assert refused.value.param == "structured_outputs"


def test_ids_outside_the_vocabulary_are_refused(plenty: LocalEngine) -> None:
    for name, value in (("logit_bias", ((VOCAB, 1.0),)), ("allowed_token_ids", (1, VOCAB))):
        with pytest.raises(InvalidRequestError, match=f"{name} must hold token ids between 0 and {VOCAB - 1}"):
            plenty.engine.generate([[5]], replace(GREEDY, **{name: value}))
    with pytest.raises(InvalidRequestError, match="bad_words.*no tokens"):
        plenty.engine.generate([[5]], replace(GREEDY, bad_words=("  ",)))
    [output] = plenty.engine.generate([[5]], replace(GREEDY, min_tokens=2, stop_token_ids=(VOCAB + 7,)))
    assert output.completion_tokens == 30


async def test_a_request_that_leaves_no_token_fails_alone(plenty: LocalEngine) -> None:
    impossible = replace(GREEDY, allowed_token_ids=(9,), structured_outputs=StructuredOutputs(regex="ab"))
    assert plenty.engine.tokenizer.token(9) not in ("a", "ab")
    with pytest.raises(GenerationError, match="leave no token"):
        _ = [delta async for delta in plenty.engine.stream([5], impossible)]
    with pytest.raises(GenerationError, match="leave no token"):
        plenty.engine.generate([[5, 6]], impossible)
    assert plenty.engine.generate([[5]], GREEDY)[0].finish_reason == "length"


# ---- a thousand streams --------------------------------------------------------------------------


async def test_a_thousand_cancelled_and_finished_streams_leave_nothing(tight: LocalEngine) -> None:
    """Cancelled before, at and after their first tokens, by leaving and by cancelling the task; the rest unharmed."""
    engine = tight.engine
    chance = random.Random(4)
    kinds = [
        replace(GREEDY, max_tokens=5),
        replace(GREEDY, max_tokens=9, temperature=1.0, n=2, repetition_penalty=1.2),
        replace(GREEDY, max_tokens=6, logprobs=1, prompt_logprobs=1),
        replace(DRAWN, max_tokens=8, structured_outputs=StructuredOutputs(regex="[a-f]{3,9}")),
    ]
    wanted = {i: engine.generate([PROMPTS[2]], replace(kind, seed=7)) for i, kind in enumerate(kinds)}
    limit = asyncio.Semaphore(40)
    finished = 0

    async def one(number: int) -> None:
        nonlocal finished
        kind = number % len(kinds)
        leave_after = chance.choice([None, None, 0, 1, 2])
        async with limit, aclosing(engine.stream(PROMPTS[2], replace(kinds[kind], seed=7))) as stream:
            deltas: list[OutputDelta] = []
            async for delta in stream:
                deltas.append(delta)
                if leave_after is not None and len(deltas) > leave_after:
                    return
        finished += 1
        for output in wanted[kind]:
            tokens = tuple(t for d in deltas if d.index == output.index for t in d.token_ids)
            assert tokens == output.token_ids

    tasks = [asyncio.create_task(one(number)) for number in range(1000)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0.02)
        alive = [task for task in tasks if not task.done()]
        if alive:
            chance.choice(alive[:40]).cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    failures = [r for r in results if isinstance(r, Exception) and not isinstance(r, asyncio.CancelledError)]
    assert not failures
    assert finished > 200 and any(isinstance(r, asyncio.CancelledError) for r in results)
    await asyncio.to_thread(engine.generate, [[5]], GREEDY)  # what was aborted last has been told to the executor
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert not engine._requests and not engine._by_sequence and not engine._deadlines and not len(engine._mailboxes)
    assert len(tight.runner.sampler) <= 1
