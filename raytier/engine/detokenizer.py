"""Tokens to text, one at a time, without splitting a character or giving away part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from raytier.engine.byte_level import bytes_of
from raytier.engine.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
#: Tokens that an incomplete UTF-8 character can span at most (4 bytes, the last one completes it).
_MAX_PENDING = 3


class Detokenizer:
    """The text of one sequence as it grows; O(1) amortised per token.

    The concatenation of what `push` and `flush` return is the decoded text of all tokens, cut at the
    first stop string.

    Args:
        stop: strings that end the text, also across token borders.
        include_stop: keep the stop string itself.
        skip_special_tokens: leave special tokens out.
        min_tokens: a stop string ends the text when a later token than so many completes it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._decoder: _Decoder = _ByteDecoder(tokenizer) if tokenizer.is_byte_level else _WindowDecoder(tokenizer)
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._matcher = StopMatcher(stop, include_stop) if stop else None
        self._unarmed = min_tokens  # tokens still to come that cannot end the text

    def push(self, token_id: int) -> tuple[str, str | None]:
        """New text that is certain, and the stop string that ended it, if one did (push no more then)."""
        text = "" if token_id in self._skipped else self._decoder.push(token_id)
        if self._matcher is None:
            return text, None
        armed = self._unarmed <= 0
        self._unarmed -= 1
        return self._matcher.push(text, armed)

    def flush(self) -> tuple[str, str | None]:
        """What was held back, when no more tokens come; an incomplete character becomes U+FFFD."""
        text = self._decoder.flush()
        if self._matcher is None:
            return text, None
        text, hit = self._matcher.push(text, self._unarmed < 0)
        return (text, hit) if hit is not None else (text + self._matcher.flush(), None)


class StopMatcher:
    """Finds the first of several stop strings in a growing text; holds back only what may become one.

    Knuth-Morris-Pratt, one state per string: the state is the number of its characters that the text ends with,
    so the largest state is what must be held back. Characters are taken one by one, hence the stop string that
    is complete first wins, wherever the token borders are.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool) -> None:
        self._stops = [(stop, _failure(stop)) for stop in stops]
        self._include = include_stop
        self._states = [0] * len(stops)
        self._held = ""

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """Text that cannot become part of a stop string any more, and the one that was found; one that is complete
        within a text that is not `armed` is passed over."""
        for position, character in enumerate(text):
            for index, (stop, failure) in enumerate(self._stops):
                state = self._states[index]
                while state and stop[state] != character:
                    state = failure[state - 1]
                state += stop[state] == character
                if state == len(stop) and armed:
                    seen = self._held + text[: position + 1]
                    return (seen if self._include else seen[: len(seen) - len(stop)]), stop
                if state == len(stop):
                    state = failure[state - 1]
                self._states[index] = state
        seen = self._held + text
        certain = len(seen) - max(self._states)
        self._held = seen[certain:]
        return seen[:certain], None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


@lru_cache(maxsize=256)
def _failure(stop: str) -> tuple[int, ...]:
    """For each prefix of `stop`, the length of its longest proper border (KMP's failure function)."""
    failure = [0] * len(stop)
    state = 0
    for position in range(1, len(stop)):
        while state and stop[state] != stop[position]:
            state = failure[state - 1]
        state += stop[state] == stop[position]
        failure[position] = state
    return tuple(failure)


class _Decoder(Protocol):
    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class _ByteDecoder:
    """Byte-level BPE: the text is the UTF-8 decoding of the tokens' bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        token = self._tokenizer.token(token_id)
        return "" if token is None else self._utf8.decode(bytes_of(token))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """Any other tokenizer: decode a short window and take what is new.

    The window is the last tokens given out (context, because decoders treat a first token differently)
    and the pending ones. While the window ends in U+FFFD a character may be incomplete and nothing is given
    out; an incomplete character spans few tokens, so more pending ones mean that the bytes are malformed and
    they are given out as they are.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        if self._tokenizer.token(token_id) is None:
            return ""
        self._pending.append(token_id)
        text = self._new_text()
        if text.endswith(_REPLACEMENT) and len(self._pending) <= _MAX_PENDING:
            return ""
        # A token without text (a leading space that is stripped) must not stand alone as context.
        kept = [] if text else self._context[-_MAX_PENDING:]
        self._context, self._pending = kept + self._pending, []
        return text

    def flush(self) -> str:
        text = self._new_text() if self._pending else ""
        self._pending = []
        return text

    def _new_text(self) -> str:
        context = self._tokenizer.decode(self._context, skip_special_tokens=False)
        window = self._tokenizer.decode([*self._context, *self._pending], skip_special_tokens=False)
        return window[len(context) :]
