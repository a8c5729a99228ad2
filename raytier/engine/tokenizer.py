"""Tokenizing and chat templates without transformers: the `tokenizers` library and Jinja."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import tokenizers
from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from raytier.checkpoint.manifest import TokenizerSpec
from raytier.engine.byte_level import bytes_of
from raytier.engine.grammars import Grammars
from raytier.engine.structured import StructuredOutputs
from raytier.errors import InvalidRequestError

#: Names under which a message's reasoning is passed; the first is the one templates read.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
#: Marks the end of a message that is to be continued; transformers' mark, which also shows whether it was trimmed.
_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "


#: How vocabularies with a fallback to bytes spell one.
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class Tokenizer:
    """Text to ids and back for one model. Thread-safe; encoding releases the GIL."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self.spec = spec
        self._backend = tokenizers.Tokenizer.from_str(spec.tokenizer_json)
        # Both may be left over in a model's tokenizer.json and would change the prompt.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._grammars = Grammars(spec)

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows, added tokens included; the model's own vocabulary may be larger."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out of the text."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether every token is a string of bytes (GPT-2's alphabet), so that text is their concatenation."""
        decoder = json.loads(self.spec.tokenizer_json).get("decoder") or {}
        while decoder.get("type") == "Sequence" and len(decoder["decoders"]) == 1:
            decoder = decoder["decoders"][0]
        return bool(decoder.get("type") == "ByteLevel")

    def encode(self, text: str, *, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids of `text`; the tokenizer's own special tokens are added where the model's files say so.

        A rendered chat template holds its special tokens already: encode it with False.
        """
        add = self.spec.add_special_tokens if add_special_tokens is None else add_special_tokens
        return list(self._backend.encode(text, add_special_tokens=add).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token, None for ids it does not have (padding of the model)."""
        return self._backend.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, in UTF-8, as far as one can say without its neighbours; nothing for an id that
        the vocabulary does not have. Bytes of a character may be spread over several tokens."""
        token = self.token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            return bytes_of(token)
        if (byte := _BYTE_TOKEN.fullmatch(token)) is not None:
            return bytes([int(byte[1], 16)])
        return token.replace("\u2581", " ").encode()

    def grammar(self, structured: StructuredOutputs, vocab_size: int) -> str:
        """llguidance's grammar of what an output must match. A new one may take a second, known ones nothing.

        Raises:
            InvalidRequestError: it cannot be matched; the message says what is wrong, and where.
        """
        return self._grammars.get(structured, vocab_size)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """Render the model's chat template, as transformers' `apply_chat_template(tokenize=False)` does.

        Args:
            messages: OpenAI messages; a list of content parts becomes their text, one part per line.
            add_generation_prompt: end with the header of an assistant's turn.
            continue_final_message: end within the content of the last message, so that it is continued.
            tools: that the model may call, as OpenAI has them.
            kwargs: further variables of the template, such as `documents`, `enable_thinking`.

        Raises:
            InvalidRequestError: the model has no template, or it refuses the messages (in its own words).
        """
        if self.spec.chat_template is None:
            raise InvalidRequestError(
                "this model has no chat template: use /v1/completions with a plain prompt instead", param="messages"
            )
        plain = _messages(messages)
        final = plain[-1].get("content", "")
        if continue_final_message:
            if not final:
                raise InvalidRequestError("the last message has no content to continue", param="messages")
            plain[-1]["content"] = final + _CONTINUED
        variables = {
            **self.spec.special_tokens,
            "documents": None,
            **_plain(kwargs, "chat_template_kwargs"),
            "tools": _plain(tools, "tools"),
            "messages": plain,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render(variables)
        except TemplateError as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error.message}", param="messages"
            ) from error
        except Exception as error:  # a template is the model author's code: anything may come out of it
            raise InvalidRequestError(
                f"the model's chat template fails on these messages: {type(error).__name__}: {error}", param="messages"
            ) from error
        return _up_to_the_mark(text) if continue_final_message else text

    @cached_property
    def _template(self) -> Template:
        return _environment().from_string(self.spec.chat_template or "")


def _up_to_the_mark(text: str) -> str:
    """`text` before the mark in it; where the template has trimmed the message, white space goes as well."""
    place = text.rfind(_CONTINUED.strip())
    if place < 0:
        raise InvalidRequestError(
            "the model's chat template leaves the last message out, so it cannot be continued", param="messages"
        )
    before = text[:place]
    return before if text.startswith(_CONTINUED, place) else before.rstrip()


def _messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as a template expects them: plain data, no null fields, contents as text."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError("messages must be a list of at least one message", param="messages")
    plain = []
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequestError(f"messages[{position}] must be an object with a role", param="messages")
        # Many templates print a literal None where a missing field would do.
        fields = {key: _plain(value, "messages") for key, value in message.items() if value is not None}
        if "content" in fields:
            fields["content"] = _text(fields["content"], position)
        reasoning = next((fields[name] for name in _REASONING_FIELDS if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        plain.append(fields)
    return plain


def _text(content: object, position: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(f"messages[{position}].content must be a string or a list of parts", param="messages")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequestError(
                f"messages[{position}].content: parts of type text are supported, got {kind!r}", param="messages"
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _plain(value: Any, param: str) -> Any:
    """A copy of JSON-like data: templates come with the model and must not get hold of other objects."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, param) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, param) for item in value]
    raise InvalidRequestError(f"{param}: JSON values are expected, got a {type(value).__name__}", param=param)


class _GenerationBlock(Extension):
    """`{% generation %}` marks assistant text for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - declared by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict` without its class attributes, which would lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _SafeNamespace(Namespace):
    """`namespace` without underscore attributes, which would lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]  # so that a template may have an attribute called self
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        Namespace.__setitem__(self, name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace attribute must not start with an underscore, got {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up (utils/chat_template_utils.py), so that templates render alike."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _SafeNamespace
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
