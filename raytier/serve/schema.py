"""Wire format of the OpenAI routes: what a request may say and what an answer looks like.

Requests are checked strictly (no `"5"` for 5, no unknown field). The ranges of sampling values are
not here: `SamplingParams` checks them, for HTTP and for deployment handles alike. Answers are small
models of our own: the `openai` package's types parse them (a test holds that), but importing that
package costs a replica 0.5 s and 21 MiB (PSS, measured on top of Ray Serve).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from raytier.serve.fields import IGNORED, UNSUPPORTED_MESSAGE, UNSUPPORTED_REQUEST, drop_neutral, shown
from raytier.serve.generate import SAMPLING_FIELDS, FinishReason

_PROMPT_SCHEMA = {
    "description": "A text, token ids, or a list of either (one choice each).",
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ],
}
_CONTENT_SCHEMA = {
    "description": "A text, or a list of text parts (joined by newlines).",
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "text"],
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
            },
        },
    ],
}
_STOP_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


def _wrong(message: str) -> PydanticCustomError:
    # The text goes in as a value: a template of pydantic's would read braces in what the client sent.
    return PydanticCustomError("raytier", "{message}", {"message": message})


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _as_prompts(value: object) -> object:
    """Bring the four forms of `prompt` to one: a list of texts and of token-id lists."""
    if isinstance(value, str):
        return [value]
    if _is_ids(value):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value) or all(_is_ids(item) for item in value):
            return value
        if all(isinstance(item, list) for item in value) and not all(value):
            raise _wrong("an empty list of token ids cannot be continued; give at least one token")
    raise _wrong(
        "must be a text, a non-empty list of token ids (integers), or a non-empty list of texts or of token-id lists"
    )


def _as_text(value: object) -> object:
    """Bring the content of a message to one text."""
    if isinstance(value, str):
        return value
    if value is None:
        raise _wrong("a message needs content; give a text")
    if not isinstance(value, list) or not value:
        raise _wrong(f"must be a text or a non-empty list of text parts (value {shown(value)})")
    texts: list[str] = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise _wrong(f"part {index} is not a text part ({{'type': 'text', 'text': ...}}): {shown(part)}")
        text = part.get("text")
        if not isinstance(text, str):
            raise _wrong(f"part {index}: text must be a string (value {shown(text)})")
        texts.append(text)
    return "\n".join(texts)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Prompts = Annotated[list[str | list[int]], BeforeValidator(_as_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
Content = Annotated[str, BeforeValidator(_as_text), WithJsonSchema(_CONTENT_SCHEMA)]
Stop = Annotated[list[str], BeforeValidator(_as_list), WithJsonSchema(_STOP_SCHEMA)]


class _Body(BaseModel):
    """A part of a request: strict types, unknown keys refused, known ones not implemented only when neutral."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({})
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _implemented_only(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        return drop_neutral(data, unsupported=cls.unsupported, ignored=cls.ignored)


class StreamOptions(_Body):
    """`include_usage`: one more chunk at the end, with the usage and no choices."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}
    )

    include_usage: bool | None = None


class ChatMessage(_Body):
    """One message of a conversation."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED_MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None


class GenerationRequest(_Body):
    """What both routes accept. Absent and null mean the model's own default."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED_REQUEST
    ignored: ClassVar[frozenset[str]] = IGNORED

    model: str | None = Field(None, description="Id as /v1/models lists it; absent: the startup model.")
    max_tokens: int | None = Field(None, description="Tokens to generate at most.")
    temperature: float | None = Field(None, description="0 is greedy.")
    top_p: float | None = None
    top_k: int | None = Field(None, description="0 or -1: all.")
    seed: int | None = Field(None, description="Makes the draws reproducible, whatever else runs.")
    stop: Stop | None = None
    stop_token_ids: list[int] | None = Field(None, description="Added to the model's own.")
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "raytier",
                "{message}",
                {"param": "stream_options", "message": "only goes with stream=true; leave it out"},
            )
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self) -> dict[str, Any]:
        """The sampling fields that the client gave, by the names of `SamplingParams`."""
        return {name: value for name in SAMPLING_FIELDS if (value := getattr(self, name, None)) is not None}


class ChatCompletionRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, description="The newer name of max_tokens.")
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further variables of the chat template.")

    @model_validator(mode="after")
    def _one_limit(self) -> ChatCompletionRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            message = f"{self.max_completion_tokens} differs from max_tokens, {self.max_tokens}; give one of the two"
            raise PydanticCustomError("raytier", "{message}", {"param": "max_completion_tokens", "message": message})
        return self

    def sampling(self) -> dict[str, Any]:
        fields = super().sampling()
        if self.max_completion_tokens is not None:
            fields["max_tokens"] = self.max_completion_tokens
        return fields


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Prompts


class Answer(BaseModel):
    """An answer. Fields that were not given stay out of the JSON; a given null is written."""

    model_config = ConfigDict(frozen=True)

    def json_bytes(self) -> bytes:
        """JSON in UTF-8 on one line.

        Line and paragraph separators are escaped: clients that cut an event stream with a
        Unicode-aware `splitlines` (httpx's `aiter_lines`) would break inside a string.
        """
        text = self.model_dump_json(exclude_unset=True)
        return text.translate(_LINE_BREAKS).encode()


_LINE_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int) -> Usage:
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )


class AssistantMessage(Answer):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Answer):
    index: int
    message: AssistantMessage
    logprobs: None
    finish_reason: FinishReason


class ChatCompletion(Answer):
    """Answer of /v1/chat/completions without streaming."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Answer):
    index: int
    delta: Delta
    logprobs: None
    finish_reason: FinishReason | None


class ChatCompletionChunk(Answer):
    """One event of a streamed chat completion. `usage` is written only when the client asked for it."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class TextChoice(Answer):
    index: int
    text: str
    logprobs: None
    finish_reason: FinishReason | None


class Completion(Answer):
    """Answer of /v1/completions, whole or one event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelCard(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelCard]


class ErrorBody(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Answer):
    """Every error of the HTTP front."""

    error: ErrorBody
