"""Wire format of the answers of the OpenAI routes.

Small models of our own: the `openai` package's types parse what they write (a test holds that), but importing that
package costs a replica 0.5 s and 21 MiB (PSS, measured on top of Ray Serve). Events of a stream are written by
`answers`, without models: there are as many of them as tokens.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from raytier.catalog.life import State
from raytier.serve.generate import Tally
from raytier.serve.text import on_one_line

FinishReason = Literal["stop", "length", "tool_calls"]


class Answer(BaseModel):
    """An answer. Fields that were not given stay out of the JSON; a given null is written."""

    model_config = ConfigDict(frozen=True)

    def json_bytes(self) -> bytes:
        """JSON in UTF-8 on one line."""
        return on_one_line(self.model_dump_json(exclude_unset=True)).encode()


class PromptTokensDetails(Answer):
    """`cached_tokens`: of the prompt, those whose KV was found and not computed."""

    cached_tokens: int


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, tally: Tally) -> Usage:
        return cls(
            prompt_tokens=tally.prompt_tokens,
            completion_tokens=tally.completion_tokens,
            total_tokens=tally.prompt_tokens + tally.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=tally.cached_tokens),
        )


class CalledFunction(Answer):
    """`arguments` is JSON as the model wrote it."""

    name: str
    arguments: str


class ToolCall(Answer):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Answer):
    """`reasoning_content`: the model's thoughts, where it has any; `content` is null when there are calls alone."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Answer):
    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason


class ChatCompletion(Answer):
    """Answer of /v1/chat/completions without streaming."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class TextChoice(Answer):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class Completion(Answer):
    """Answer of /v1/completions without streaming."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class TokenizeAnswer(Answer):
    """`max_model_len`: longest sequence in tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(Answer):
    prompt: str


class ModelCard(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    status: State


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
