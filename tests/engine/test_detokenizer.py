"""G5: text that never splits a character, stop strings over token borders."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raytier.engine.byte_level import bytes_of
from raytier.engine.detokenizer import Detokenizer, StopMatcher
from raytier.engine.tokenizer import Tokenizer
from tests.engine.fakes import EOS, byte_fallback_tokenizer, byte_level_tokenizer

BYTES = byte_level_tokenizer()
FALLBACK = byte_fallback_tokenizer()
TEXTS = [
    "日本語 ok 😀🎉",
    "naïve 👩‍👩‍👧 family",
    "Ünïcödé\n\n  two  spaces ",
    "العربية हिन्दी 한국어",
    "<tool call>{}<tool call>",
]


def deltas(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    texts = [detokenizer.push(token)[0] for token in ids]
    return [*texts, detokenizer.flush()[0]]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["byte level", "byte fallback"])
def test_no_delta_splits_a_character(tokenizer: Tokenizer, text: str) -> None:
    if tokenizer is FALLBACK:
        ids = [FALLBACK._backend.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    else:
        ids = tokenizer.encode(text)
    parts = deltas(tokenizer, ids)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    assert parts[-1] == "", "complete characters are not held back"


@given(ids=st.lists(st.integers(0, BYTES.vocab_size + 3), max_size=60), skip=st.booleans())
@settings(max_examples=400, deadline=None)
@example(ids=list(range(BYTES.vocab_size)), skip=False)
def test_deltas_join_to_the_full_decoding(ids: list[int], skip: bool) -> None:
    """Any tokens at all, malformed UTF-8, added and unknown ids included."""
    assert BYTES.is_byte_level
    assert "".join(deltas(BYTES, ids, skip=skip)) == BYTES.decode(ids, skip_special_tokens=skip)


@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(text: str) -> None:
    assert "".join(deltas(BYTES, BYTES.encode(text, add_special_tokens=False), skip=False)) == text


pieces = st.sampled_from(["▁hello", "▁world", "▁a", "b", "c", "é", "日", "本", "!", "▁"])
characters = st.text(alphabet="aé日😀\U00010348", min_size=1, max_size=3).map(
    lambda text: [f"<0x{byte:02X}>" for byte in text.encode()]
)


@given(groups=st.lists(st.one_of(pieces.map(lambda piece: [piece]), characters), max_size=25))
@settings(max_examples=300, deadline=None)
@example(groups=[["▁"], [f"<0x{byte:02X}>" for byte in "😀".encode()], ["▁"], ["▁hello"]])
def test_byte_fallback_joins_to_the_full_decoding(groups: list[list[str]]) -> None:
    ids = [FALLBACK._backend.token_to_id(piece) for group in groups for piece in group]
    assert not FALLBACK.is_byte_level
    parts = deltas(FALLBACK, ids)
    assert "".join(parts) == FALLBACK.decode(ids)
    assert not any("\ufffd" in part for part in parts)


def test_malformed_bytes_are_given_out_soon_and_cost_no_more_with_length() -> None:
    """Without a bound on what is held back a stream of broken bytes would be decoded again and again."""
    for tokenizer, broken in ((BYTES, BYTES._backend.token_to_id("ÿ")), (FALLBACK, 3 + 0xFF)):
        detokenizer = Detokenizer(tokenizer)
        text = ""
        for count in range(1, 200):
            text += detokenizer.push(broken)[0]
            assert count - 4 <= len(text) <= count
        assert text + detokenizer.flush()[0] == "\ufffd" * 199
        assert len(getattr(detokenizer._decoder, "_pending", ())) <= 4


def test_special_tokens() -> None:
    ids = BYTES.encode(f"one{EOS}<tool call>two")
    assert "".join(deltas(BYTES, ids)) == "one<tool call>two"
    assert "".join(deltas(BYTES, ids, skip=False)) == f"one{EOS}<tool call>two"
    ids = [1, *FALLBACK.encode("▁hello"), 2]
    assert "".join(deltas(FALLBACK, ids)) == FALLBACK.decode(ids)


def test_an_incomplete_character_at_the_end() -> None:
    ids = BYTES.encode("ok 😀")[:-1]
    assert "".join(deltas(BYTES, ids)) == "ok \ufffd"


def test_the_byte_alphabet_is_that_of_the_library() -> None:
    from tokenizers import decoders

    for token in BYTES._backend.get_vocab():
        assert bytes_of(token).decode(errors="replace") == decoders.ByteLevel().decode([token])


# ---- stop strings --------------------------------------------------------------------------------


def cut(text: str, stops: list[str], include: bool, unarmed: int = 0) -> tuple[str, str | None]:
    """By definition: the text up to the stop string that is complete first (the first named one of those), beyond the
    first `unarmed` characters."""
    for end in range(unarmed + 1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            shown = text[:end]
            return (shown if include else shown[: end - len(hits[0])]), hits[0]
    return text, None


@given(
    chunks=st.lists(st.text(alphabet="ab", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=3, unique=True),
    include=st.booleans(),
    unarmed=st.sampled_from([0, 0, 1, 3]),
)
@settings(max_examples=500, deadline=None)
def test_stop_strings_wherever_the_borders_are(
    chunks: list[str], stops: list[str], include: bool, unarmed: int
) -> None:
    matcher = StopMatcher(stops, include)
    given_out, seen = "", ""
    hit: str | None = None
    for number, chunk in enumerate(chunks):
        text, hit = matcher.push(chunk, number >= unarmed)
        given_out += text
        seen += chunk
        if hit:
            break
        held = seen[len(given_out) :]
        assert any(stop.startswith(held) for stop in stops), "more was held back than could become a stop string"
        longest = max(
            (n for stop in stops for n in range(len(stop)) if n <= len(seen) and seen.endswith(stop[:n])), default=0
        )
        assert len(held) == longest
    else:
        given_out += matcher.flush()
    assert (given_out, hit) == cut("".join(chunks), stops, include, len("".join(chunks[:unarmed])))


def test_stop_strings_in_a_detokenizer() -> None:
    detokenizer = Detokenizer(BYTES, stop=["文句"])
    out = ""
    hit: str | None = None
    for token in BYTES.encode("日本語 中文句子"):
        text, hit = detokenizer.push(token)
        out += text
        if hit:
            break
    assert (out, hit) == ("日本語 中", "文句")


def test_before_min_tokens_no_stop_string_ends_the_text() -> None:
    """A token beyond min_tokens has to complete it, as in vLLM; nothing of an earlier one is swallowed."""
    ids = [BYTES.encode(letter)[0] for letter in "ababa"]
    for min_tokens, wanted in ((0, ("", "ab")), (1, ("", "ab")), (2, ("ab", "ab")), (4, ("ababa", None))):
        detokenizer = Detokenizer(BYTES, stop=["ab"], min_tokens=min_tokens)
        out = ""
        hit: str | None = None
        for token in ids:
            text, hit = detokenizer.push(token)
            out += text
            if hit is not None:
                break
        else:
            out += detokenizer.flush()[0]
        assert (out, hit) == wanted


def test_bytes_of_single_tokens() -> None:
    ids = BYTES.encode("naïve 😀 日本")
    assert b"".join(BYTES.token_bytes(token) for token in ids) == "naïve 😀 日本".encode()
    ids = FALLBACK.encode("▁hello▁world😀")
    assert b"".join(FALLBACK.token_bytes(token) for token in ids) == " hello world😀".encode()
    assert BYTES.token_bytes(BYTES.vocab_size + 5) == b""


def test_a_stop_string_completed_by_the_flush() -> None:
    detokenizer = Detokenizer(BYTES, stop=["\ufffd"], include_stop=True)
    for token in BYTES.encode("a😀")[:-1]:
        assert not detokenizer.push(token)[1]
    assert detokenizer.flush() == ("\ufffd", "\ufffd")
