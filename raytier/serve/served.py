"""A loaded model as the front sees it."""

from __future__ import annotations

import itertools
from functools import cached_property

from raytier.engine.engine import Engine
from raytier.engine.text import encodable
from raytier.errors import InvalidRequestError
from raytier.model_entry import ModelEntry
from raytier.serve.logprobs import TokenTexts
from raytier.serve.parsers.answer import Languages
from raytier.serve.parsers.thoughts import TAGS

_MARKS = frozenset(
    {"<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", *itertools.chain(*TAGS.values())}
)


class ServedModel:
    """An engine, and how its model writes. `timeout_s`: longest life of a request; None = no limit."""

    def __init__(self, engine: Engine, entry: ModelEntry, timeout_s: float | None) -> None:
        self.engine = engine
        self.timeout_s = timeout_s
        self._entry = entry

    @cached_property
    def languages(self) -> Languages:
        """How the model writes calls and thoughts."""
        template = self.engine.tokenizer.spec.chat_template
        entry = self._entry
        return Languages.of(template, calls_as=entry.tool_call_parser, thoughts_as=entry.reasoning_parser)

    @cached_property
    def marks_are_special(self) -> bool:
        """Whether texts without special tokens lack what parsers look for."""
        tokenizer = self.engine.tokenizer
        return any(tokenizer.token(token_id) in _MARKS for token_id in tokenizer.special_ids)

    @cached_property
    def _most_characters(self) -> int | None:
        """No text that is longer fits into the context, however it is cut into tokens; None where that is not known."""
        tokenizer = self.engine.tokenizer
        if not tokenizer.is_byte_level:
            return None
        longest = max(len(tokenizer.token(token_id) or "") for token_id in range(tokenizer.vocab_size))
        # A normaliser makes at most one character of four.
        return 4 * longest * self.engine.config.max_context

    def encode(self, text: str, param: str, *, add_special_tokens: bool | None = None) -> tuple[int, ...]:
        """Token ids of a prompt.

        Raises:
            InvalidRequestError: it holds half a character, or it is so long that it cannot fit.
        """
        if self._most_characters is not None and len(text) > self._most_characters:
            raise InvalidRequestError(
                f"{len(text)} characters cannot fit: the model's context is {self.engine.config.max_context} tokens",
                param=param,
            )
        token_ids = self.engine.tokenizer.encode(encodable(text, param), add_special_tokens=add_special_tokens)
        return tuple(token_ids)

    @cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(self.engine.tokenizer)
