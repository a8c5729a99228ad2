"""Log-probabilities of tokens as OpenAI's routes write them, and the tokens' texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from raytier.engine.step import TokenLogprobs
from raytier.engine.tokenizer import Tokenizer

#: JSON has no minus infinity; this is what OpenAI writes for it.
_LEAST = -9999.0


class TokenTexts:
    """Bytes and text of single tokens, kept once they were asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bytes_of = lru_cache(maxsize=1 << 16)(tokenizer.token_bytes)
        self.text_of = lru_cache(maxsize=1 << 16)(self._text_of)

    def _text_of(self, token_id: int) -> str:
        """The token's text; where it is a part of a character, `bytes:` and the bytes, as OpenAI writes it."""
        content = self.bytes_of(token_id)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def chat_logprobs(tokens: Iterable[TokenLogprobs], texts: TokenTexts, most: int) -> dict[str, Any]:
    """`logprobs` of a choice of a chat: every token with the `most` likeliest ones in its place."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        content = texts.bytes_of(token_id)
        return {"token": texts.text_of(token_id), "logprob": max(logprob, _LEAST), "bytes": list(content)}

    content = [
        {**entry(each.token_id, each.logprob), "top_logprobs": [entry(*likely) for likely in each.top[:most]]}
        for each in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(
    token_ids: Sequence[int], tokens: Sequence[TokenLogprobs | None], texts: TokenTexts, offset: int
) -> dict[str, Any]:
    """`logprobs` of a choice of a completion. The first token of a prompt has none.

    Args:
        offset: characters of the text before the first of these tokens.
    """
    offsets = []
    for token_id in token_ids:
        offsets.append(offset)
        offset += len(texts.text_of(token_id))
    return {
        "tokens": [texts.text_of(token_id) for token_id in token_ids],
        "token_logprobs": [None if each is None else max(each.logprob, _LEAST) for each in tokens],
        "top_logprobs": [None if each is None else _by_text(each, texts) for each in tokens],
        "text_offset": offsets,
    }


def prompt_logprobs(
    tokens: Sequence[TokenLogprobs | None], texts: TokenTexts
) -> list[dict[str, dict[str, Any]] | None]:
    """`prompt_logprobs` as vLLM writes them: for every token of the prompt a map of ids to what the model thought."""

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": max(logprob, _LEAST), "rank": rank, "decoded_token": texts.text_of(token_id)}

    return [
        None
        if each is None
        else {
            str(each.token_id): entry(each.token_id, each.logprob, each.rank),
            **{str(token): entry(token, logprob, rank) for rank, (token, logprob) in enumerate(each.top, 1)},
        }
        for each in tokens
    ]


def _by_text(token: TokenLogprobs, texts: TokenTexts) -> dict[str, float]:
    """The likeliest tokens and the one that stands there; of several with one text the likeliest counts."""
    found: dict[str, float] = {}
    for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
        found.setdefault(texts.text_of(token_id), max(logprob, _LEAST))
    return found
