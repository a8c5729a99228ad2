"""The grammars of one model: compiled once each, and remembered."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass

from llguidance import LLTokenizer

from raytier.checkpoint.manifest import TokenizerSpec
from raytier.engine.structured import PARAM, StructuredOutputs, guide_tokenizer
from raytier.errors import InvalidRequestError

_MAX_CHARACTERS = 16 << 20  # remembered: of what was asked and of the grammars


@dataclass(frozen=True, slots=True)
class _Refusal:
    message: str


class Grammars:
    """Thread-safe. A grammar that is known waits for nothing; one that is being compiled is waited for.

    Invariant: the characters remembered are at most `max_characters`; what was used longest ago goes first. What
    cannot be compiled is remembered too.
    """

    def __init__(self, spec: TokenizerSpec, max_characters: int = _MAX_CHARACTERS) -> None:
        self._spec = spec
        self._max_characters = max_characters
        self._lock = threading.Lock()  # never held while something is compiled
        self._known: OrderedDict[StructuredOutputs, str | _Refusal] = OrderedDict()
        self._pending: dict[StructuredOutputs, Future[str | _Refusal]] = {}
        self._characters = 0
        self._guide: LLTokenizer | None = None
        self._guiding = threading.Lock()

    def get(self, structured: StructuredOutputs, vocab_size: int) -> str:
        """llguidance's grammar. A new one is compiled on the caller's thread, which may take a second.

        Raises:
            InvalidRequestError: it cannot be matched; the message says what is wrong, and where.
        """
        with self._lock:
            found = self._known.get(structured)
            if found is not None:
                self._known.move_to_end(structured)
            pending = self._pending.get(structured)
            mine = found is None and pending is None
            if mine:
                self._pending[structured] = pending = Future()
        if mine:
            assert pending is not None
            self._compile(structured, vocab_size, pending)
        if found is None:
            assert pending is not None
            found = pending.result()
        if isinstance(found, _Refusal):
            raise InvalidRequestError(found.message, param=PARAM)
        return found

    def _compile(self, structured: StructuredOutputs, vocab_size: int, pending: Future[str | _Refusal]) -> None:
        made: str | _Refusal
        try:
            try:
                made = structured.compile(self._guide_of(vocab_size))
            except InvalidRequestError as error:
                made = _Refusal(error.message)
        except BaseException as error:
            with self._lock:
                del self._pending[structured]
            pending.set_exception(error)
            return
        with self._lock:
            del self._pending[structured]
            self._known[structured] = made
            self._characters += _characters(structured, made)
            while self._characters > self._max_characters:
                self._characters -= _characters(*self._known.popitem(last=False))
        pending.set_result(made)

    def _guide_of(self, vocab_size: int) -> LLTokenizer:
        with self._guiding:
            if self._guide is None:
                self._guide = guide_tokenizer(self._spec, vocab_size)
            return self._guide


def _characters(structured: StructuredOutputs, made: str | _Refusal) -> int:
    asked = (structured.json, structured.regex, structured.grammar, *(structured.choice or ()))
    return sum(len(text) for text in asked if text) + len(made.message if isinstance(made, _Refusal) else made)
