"""Tokens to text, one at a time, without splitting a character or giving away part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

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
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._decoder: _Decoder = _ByteDecoder(tokenizer) if tokenizer.is_byte_level else _WindowDecoder(tokenizer)
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._matcher = StopMatcher(stop, include_stop) if stop else None

    def push(self, token_id: int) -> tuple[str, bool]:
        """New text that is certain, and whether a stop string ended it (push no more then)."""
        text = "" if token_id in self._skipped else self._decoder.push(token_id)
        return self._matcher.push(text) if self._matcher else (text, False)

    def flush(self) -> tuple[str, bool]:
        """What was held back, when no more tokens come; an incomplete character becomes U+FFFD."""
        text = self._decoder.flush()
        if self._matcher is None:
            return text, False
        text, hit = self._matcher.push(text)
        return (text, True) if hit else (text + self._matcher.flush(), False)


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

    def push(self, text: str) -> tuple[str, bool]:
        """Text that cannot become part of a stop string any more, and whether one was found."""
        for position, character in enumerate(text):
            for index, (stop, failure) in enumerate(self._stops):
                state = self._states[index]
                while state and stop[state] != character:
                    state = failure[state - 1]
                state += stop[state] == character
                if state == len(stop):
                    seen = self._held + text[: position + 1]
                    return (seen if self._include else seen[: len(seen) - len(stop)]), True
                self._states[index] = state
        seen = self._held + text
        certain = len(seen) - max(self._states)
        self._held = seen[certain:]
        return seen[:certain], False

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
        return "" if token is None else self._utf8.decode(token_bytes(token))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


def token_bytes(token: str) -> bytes:
    alphabet = _byte_of()
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:
        return token.encode()  # an added token, spelled out


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
