"""The parts of an answer as a parser gives them out, and the machine that all parsers are.

A parser reads characters, not chunks: whatever the borders between its inputs, the parts joined are the same, and an
answer in one piece is parsed by the same code as a stream.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol, TypeVar

from raytier.engine.detokenizer import StopMatcher

T = TypeVar("T")

#: What a machine waits for: the next character, or `END`.
Reading = Generator[None, str, T]
END = ""


@dataclass(frozen=True, slots=True)
class Content:
    """Text that the user sees."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """The model calls a tool: call number `index` of the answer, the first being 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of the arguments of call `index`."""

    index: int
    text: str


Part = Content | Reasoning | CallBegun | CallArguments


class Parser(Protocol):
    """Takes an answer apart while it is written."""

    def push(self, text: str) -> list[Part]:
        """What is certain after `text`; the parts of one kind that follow each other are one."""
        ...

    def finish(self) -> list[Part]:
        """What was held back, when no more text comes."""
        ...


def joined(parts: Iterable[Part]) -> list[Part]:
    """`parts` with neighbours of one kind as one."""
    whole: list[Part] = []
    for _, run in groupby(parts, lambda part: (type(part), getattr(part, "index", None))):
        first, *rest = run
        # All pieces at once: one after the other, a long answer would be copied for each of its characters.
        if rest and not isinstance(first, CallBegun):
            first = replace(first, text=first.text + "".join(p.text for p in rest if not isinstance(p, CallBegun)))
            rest = []
        whole += [first, *rest]
    return whole


def call_id() -> str:
    """An id as OpenAI's look."""
    return f"call_{uuid.uuid4().hex}"


class Machine:
    """A parser whose states are positions in the generator `_read`, which gets one character at a time."""

    def __init__(self, new_id: Callable[[], str] = call_id) -> None:
        self._parts: list[Part] = []
        self._calls = 0
        self._new_id = new_id
        # White space is kept until it is known whether text follows: before a call it belongs to nobody.
        self._space = ""
        self._leading = False
        self._reading = self._read()
        next(self._reading)

    def push(self, text: str) -> list[Part]:
        for character in text:
            self._reading.send(character)
        return self._take()

    def finish(self) -> list[Part]:
        try:
            while True:
                self._reading.send(END)
        except StopIteration:
            pass
        return self._take()

    def _take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return joined(parts)

    def _read(self) -> Reading[None]:
        """The language; ends only after it has been sent `END`."""
        raise NotImplementedError

    # What languages are made of

    def _until(self, markers: tuple[str, ...], give: Callable[[str], object]) -> Reading[str | None]:
        """Give out text up to one of `markers`; returns that one, or None at the end of the text."""
        matcher = StopMatcher(markers, include_stop=True)
        while True:
            character = yield
            if character is END:
                give(matcher.flush())
                return None
            text, hit = matcher.push(character)
            if not hit:
                give(text)
                continue
            marker = next(marker for marker in markers if text.endswith(marker))
            give(text[: len(text) - len(marker)])
            return marker

    def _after_space(self) -> Reading[tuple[str, str]]:
        """White space, and the character after it."""
        space = ""
        while (character := (yield)).isspace():
            space += character
        return space, character

    def _content(self, text: str) -> None:
        """Text for the user; white space at its end waits for more text."""
        if self._leading:
            text = text.lstrip()
            self._leading = not text
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._parts.append(Content(shown))

    def _drop_space(self) -> None:
        """White space around a call, or around the end of thoughts, is not content."""
        self._space = ""
        self._leading = True

    def _rest(self, text: str = "") -> Reading[None]:
        """Everything that follows is content, as it stands."""
        self._content(text)
        while (character := (yield)) is not END:
            self._content(character)
        self._end()

    def _end(self) -> None:
        if self._space:
            self._parts.append(Content(self._space))
            self._space = ""

    def _begin_call(self, name: str, identity: str | None = None) -> int:
        self._drop_space()
        index = self._calls
        self._calls += 1
        self._parts.append(CallBegun(index, identity or self._new_id(), name))
        return index

    def _arguments(self, index: int, text: str) -> None:
        if text:
            self._parts.append(CallArguments(index, text))
