"""What an output must match: JSON schema, regular expression, choice or grammar, as llguidance's grammars."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import NoReturn

import tokenizers
from llguidance import LLMatcher, LLTokenizer, grammar_from

from raytier.checkpoint.manifest import TokenizerSpec
from raytier.engine.text import encodable
from raytier.errors import InvalidRequestError

PARAM = "structured_outputs"
MAX_LENGTH = 1 << 20  # characters of a schema, regular expression or grammar
MAX_CHOICES = 4096

#: Keywords of JSON Schema whose value is a schema, a list of schemas, or a map of names to schemas.
_ONE = ("items", "additionalProperties", "additionalItems", "not", "contains", "propertyNames", "if", "then", "else")
_LISTS = ("prefixItems", "items", "anyOf", "oneOf", "allOf")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SHARED = ("$defs", "definitions")
#: Each try serialises and compiles the shared definitions again.
_SEARCH_TRIES, _SEARCH_S = 64, 0.5
#: Between the parts of a JSON text: nothing, a space, or a new line with its indentation. Without a bound a model that
#: likes blanks never comes to an end.
_WHITESPACE = r"( |\n[ \t]{0,32})?"


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """Exactly one of these is given; the names are vLLM's.

    Attributes:
        json: a JSON schema, as text.
        regex: a regular expression (Rust's syntax, without look-around) that the whole text matches.
        choice: the texts to choose from.
        grammar: in llguidance's Lark dialect, or GBNF with a rule `root`.
        json_object: any JSON object.

    Raises:
        InvalidRequestError: none or several are given, or one is not of its type.
    """

    json: str | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        given = [name for name in NAMES if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            _refuse(f"needs exactly one of {', '.join(NAMES)}, got {', '.join(given) or 'none'}")
        for name in ("json", "regex", "grammar"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not 0 < len(text) <= MAX_LENGTH):
                _refuse(f"{name} must be a text of 1 to {MAX_LENGTH} characters")
            encodable(text or "", PARAM)
        if self.choice is not None:
            if not isinstance(self.choice, tuple) or not 0 < len(self.choice) <= MAX_CHOICES:
                _refuse(f"choice must be a list of 1 to {MAX_CHOICES} texts")
            if not all(isinstance(text, str) and text for text in self.choice):
                _refuse("choice must be a list of texts, none of them empty")
            encodable("".join(self.choice), PARAM)
        if not isinstance(self.json_object, bool):
            _refuse("json_object must be true or false")

    @classmethod
    def from_request(cls, value: object) -> StructuredOutputs:
        """Fields as a request has them: a schema may be a map, choices a list, an absent one null.

        Raises:
            InvalidRequestError: as above, or a field is not known.
        """
        if not isinstance(value, Mapping):
            _refuse(f"must be a map with one of {', '.join(NAMES)}, got {value!r}")
        values = {name: each for name, each in value.items() if each is not None}
        for name in values:
            if name not in NAMES:
                _refuse(f"has no field {name!r}; known: {', '.join(NAMES)}")
        if isinstance(schema := values.get("json"), Mapping):
            values["json"] = json.dumps(schema)
        if isinstance(choice := values.get("choice"), list):
            values["choice"] = tuple(choice)
        return cls(**values)

    def compile(self, tokenizer: LLTokenizer) -> str:
        """llguidance's grammar of what is asked, checked with the model's tokenizer.

        Raises:
            InvalidRequestError: it cannot be matched; the message says what is wrong, and where.
        """
        if self.json is not None:
            return _compile_schema(self.json, tokenizer)
        if self.json_object:
            return _compile_schema('{"type": "object"}', tokenizer)
        if self.regex is not None:
            return _checked("regex", grammar_from("regex", self.regex), tokenizer)
        if self.choice is not None:
            return _checked("choice", grammar_from("choice", json.dumps(self.choice)), tokenizer)
        assert self.grammar is not None
        try:
            grammar = grammar_from("grammar", self.grammar)
        except ValueError as error:
            _refuse(f"grammar: {error}")
        return _checked("grammar", grammar, tokenizer)


#: Names of all fields, in order.
NAMES = tuple(each.name for each in fields(StructuredOutputs))


def _compile_schema(text: str, tokenizer: LLTokenizer) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        _refuse(f"json is not a JSON schema: {error}")
    if not isinstance(schema, dict):
        _refuse(f"json is not a JSON schema: an object is expected, got {type(schema).__name__}")
    if message := _failure(schema, tokenizer):
        place, message = _deepest(schema, message, tokenizer)
        _refuse(f"json: {message}, at {place or 'the root of the schema'}")
    return _json_grammar(text)


def _json_grammar(schema: str) -> str:
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _WHITESPACE})


def _failure(schema: object, tokenizer: LLTokenizer) -> str:
    try:
        return LLMatcher.validate_grammar(_json_grammar(json.dumps(schema)), tokenizer).strip()
    except ValueError as error:
        return str(error)


def _deepest(root: object, message: str, tokenizer: LLTokenizer) -> tuple[str, str]:
    """Path and message of the smallest part of a schema, which cannot be compiled, that cannot be compiled either:
    llguidance does not say where it failed. After some tries or some time it is the smallest one found by then."""
    shared = {key: root[key] for key in _SHARED if key in root} if isinstance(root, dict) else {}
    path = ""
    tries, end = 0, time.monotonic() + _SEARCH_S
    parts = _parts(root)
    while (each := next(parts, None)) is not None:
        name, part = each
        if not isinstance(part, dict):
            continue
        if tries == _SEARCH_TRIES or time.monotonic() > end:
            break
        tries += 1
        alone = part if any(name.startswith(key) for key in shared) else {**shared, **part}
        if found := _failure(alone, tokenizer):
            path, message, parts = f"{path}.{name}" if path else name, found, _parts(part)
    return path, message


def _parts(schema: object) -> Iterator[tuple[str, object]]:
    """The schemas within a schema, by where they stand in it."""
    if not isinstance(schema, dict):
        return
    for key in _ONE:
        if isinstance(schema.get(key), dict):
            yield key, schema[key]
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            yield from ((f"{key}[{index}]", part) for index, part in enumerate(schema[key]))
    for key in _MAPS:
        if isinstance(schema.get(key), dict):
            yield from ((f"{key}.{name}", part) for name, part in schema[key].items())


def _checked(name: str, grammar: str, tokenizer: LLTokenizer) -> str:
    if message := LLMatcher.validate_grammar(grammar, tokenizer):
        _refuse(f"{name}: {message.strip()}")
    return grammar


def _refuse(message: str) -> NoReturn:
    dot = "." if message.startswith(NAMES) else " "
    raise InvalidRequestError(f"{PARAM}{dot}{message}", param=PARAM)


def guide_tokenizer(spec: TokenizerSpec, vocab: int) -> LLTokenizer:
    """The model's tokenizer in llguidance's form.

    Args:
        vocab: width of the model's logits, which may be more or less than the tokenizer has.

    Raises:
        InvalidRequestError: the model has no end-of-sequence token, with which a text that matches would end.
    """
    if not spec.eos_token_ids:
        _refuse("cannot be used with this model: its tokenizer has no end-of-sequence token")
    known = tokenizers.Tokenizer.from_str(spec.tokenizer_json).get_vocab(with_added_tokens=True)
    width = max([vocab - 1, *known.values(), *spec.eos_token_ids]) + 1
    return LLTokenizer(spec.tokenizer_json, n_vocab=width, eos_token=list(spec.eos_token_ids))
