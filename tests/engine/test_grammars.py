"""G4: grammars are compiled once, in nobody's way."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from raytier.engine import structured as structured_module
from raytier.engine.grammars import Grammars
from raytier.engine.structured import StructuredOutputs
from raytier.errors import InvalidRequestError
from tests.engine.fakes import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
VOCAB = TOKENIZER.vocab_size


class Compiler:
    """Stands before the real one: notes what is compiled, and lets what is named `slow` wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = StructuredOutputs.compile
        self.compiled: list[str | None] = []
        self.began, self.gate = threading.Event(), threading.Event()

        def compile_(asked: StructuredOutputs, tokenizer: Any) -> str:
            self.compiled.append(asked.regex)
            if asked.regex == "slow":
                self.began.set()
                assert self.gate.wait(20)
            return real(asked, tokenizer)

        monkeypatch.setattr(StructuredOutputs, "compile", compile_)


def test_a_known_grammar_does_not_wait_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, grammars = Compiler(monkeypatch), Grammars(TOKENIZER.spec)
    known = grammars.get(StructuredOutputs(regex="known"), VOCAB)
    with ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(grammars.get, StructuredOutputs(regex="slow"), VOCAB) for _ in range(2)]
        try:
            assert compiler.began.wait(20)
            other = ThreadPoolExecutor(1)
            assert other.submit(grammars.get, StructuredOutputs(regex="known"), VOCAB).result(10) == known
            other.shutdown()
        finally:
            compiler.gate.set()
        assert slow[0].result(20) == slow[1].result(20)
    assert compiler.compiled == ["known", "slow"]


def test_what_was_used_longest_ago_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(monkeypatch)
    size = len("aa") + len(Grammars(TOKENIZER.spec).get(StructuredOutputs(regex="aa"), VOCAB))
    grammars = Grammars(TOKENIZER.spec, max_characters=2 * size)
    compiler.compiled.clear()
    for regex in ("aa", "bb", "aa", "cc", "aa", "bb"):
        grammars.get(StructuredOutputs(regex=regex), VOCAB)
    assert compiler.compiled == ["aa", "bb", "cc", "bb"]


def test_what_is_refused_is_remembered_too(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, grammars = Compiler(monkeypatch), Grammars(TOKENIZER.spec)
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="unclosed group") as refused:
            grammars.get(StructuredOutputs(regex="a(b"), VOCAB)
        assert refused.value.param == "structured_outputs"
    assert compiler.compiled == ["a(b"]


def test_looking_for_the_fault_of_a_large_schema_comes_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []
    real = structured_module._failure

    def count(schema: object, tokenizer: Any) -> str:
        tries.append(schema)
        return real(schema, tokenizer)

    monkeypatch.setattr(structured_module, "_failure", count)
    properties = {f"p{number}": {"type": "integer"} for number in range(1000)}
    schema = {"type": "object", "properties": {**properties, "last": {"type": "sorcery"}}}
    with pytest.raises(InvalidRequestError, match="sorcery, at the root of the schema"):
        Grammars(TOKENIZER.spec).get(StructuredOutputs.from_request({"json": schema}), VOCAB)
    assert len(tries) <= 65
