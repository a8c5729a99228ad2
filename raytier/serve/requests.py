"""Wire format of the OpenAI routes' requests: what one may say.

Requests are checked strictly (no `"5"` for 5, no unknown field). The ranges of sampling values are not here:
`SamplingParams` checks them, for HTTP and for deployment handles alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from raytier.engine.sampling_params import FIELDS
from raytier.serve.body import Body, wrong
from raytier.serve.fields import IGNORED, UNSUPPORTED_REQUEST
from raytier.serve.messages import ChatMessage, ChosenTool, ResponseFormat, Tool

_PROMPT_SCHEMA = {
    "description": "A text, token ids, or a list of either (one choice each).",
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ],
}
_STOP_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


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
            raise wrong("an empty list of token ids cannot be continued; give at least one token")
    raise wrong(
        "must be a text, a non-empty list of token ids (integers), or a non-empty list of texts or of token-id lists"
    )


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Prompts = Annotated[list[str | list[int]], BeforeValidator(_as_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
Stop = Annotated[list[str], BeforeValidator(_as_list), WithJsonSchema(_STOP_SCHEMA)]


class StreamOptions(Body):
    """`include_usage`: one more chunk at the end, with the usage and no choices."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}
    )

    include_usage: bool | None = None


#: vLLM's older names -> fields of `structured_outputs`.
_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}


class GenerationRequest(Body):
    """What both routes accept. Absent and null mean the model's own default."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED_REQUEST
    ignored: ClassVar[frozenset[str]] = IGNORED

    model: str | None = Field(None, description="Id as /v1/models lists it; absent: the startup model.")
    max_tokens: int | None = Field(None, description="Tokens to generate at most.")
    temperature: float | None = Field(None, description="0 is greedy.")
    top_p: float | None = None
    top_k: int | None = Field(None, description="0 or -1: all.")
    min_p: float | None = Field(None, description="Least probability, as a share of the likeliest token's.")
    n: int | None = Field(None, description="Choices for every prompt.")
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(None, description="Token id -> what is added to its logit.")
    seed: int | None = Field(None, description="Makes the draws reproducible, whatever else runs.")
    stop: Stop | None = None
    stop_token_ids: list[int] | None = Field(None, description="Added to the model's own.")
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, description="Tokens before anything may end the answer.")
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = Field(None, description="As logprobs, for the prompt's tokens; not in a stream.")
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = Field(
        None, description="One of json (a schema), regex, choice, grammar (Lark or GBNF), json_object."
    )
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: int | None = Field(None, description="Lower ones go first, where scheduler.policy is priority.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise wrong("only goes with stream=true; leave it out", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise wrong("does not go with stream=true", "prompt_logprobs")
        given = [name for name in ("response_format", "structured_outputs", *_GUIDED) if self._rules(name) is not None]
        if len(given) > 1:
            raise wrong(f"does not go with {given[0]}; give one of the two", given[1])
        return self

    def _rules(self, name: str) -> Any:
        """What a field asks of the answer's form; None where that is nothing."""
        value = getattr(self, name)
        return value.structured() if isinstance(value, ResponseFormat) else value

    @property
    def form(self) -> tuple[str, dict[str, Any]] | None:
        """The field that rules the answer's form, and `structured_outputs` as it means it."""
        for name in ("response_format", "structured_outputs", *_GUIDED):
            if (rules := self._rules(name)) is not None:
                return name, {_GUIDED[name]: rules} if name in _GUIDED else rules
        return None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self) -> dict[str, Any]:
        """The sampling fields that the client gave, by the names of `SamplingParams`."""
        fields = {
            name: value
            for name in FIELDS
            if name in GenerationRequest.model_fields and (value := getattr(self, name)) is not None
        }
        if (form := self.form) is not None:
            fields["structured_outputs"] = form[1]
        return fields


class ChatCompletionRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, description="The newer name of max_tokens.")
    logprobs: bool | None = Field(None, description="Report the log-probability of every token.")
    top_logprobs: int | None = Field(None, description="And of so many of the likeliest in its place, up to 20.")
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = Field(
        None, description="Absent: auto where there are tools."
    )
    parallel_tool_calls: bool | None = Field(None, description="False: the first call counts.")
    reasoning_effort: str | None = Field(None, description="For templates that know it.")
    add_generation_prompt: bool | None = Field(None, description="Begin the assistant's turn; true when absent.")
    continue_final_message: bool | None = Field(None, description="Continue the last message; excludes the former.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further variables of the chat template.")

    @model_validator(mode="after")
    def _fits(self) -> ChatCompletionRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            text = f"{self.max_completion_tokens} differs from max_tokens, {self.max_tokens}; give one of the two"
            raise wrong(text, "max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            if self.top_logprobs:
                raise wrong("only goes with logprobs=true", "top_logprobs")
            self.top_logprobs = None
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise wrong(f"every name may stand once, given are {', '.join(names)}", "tools")
        if isinstance(self.tool_choice, ChosenTool) and self.tool_choice.function.name not in names:
            known = ", ".join(names) or "none"
            raise wrong(f"{self.tool_choice.function.name!r} is none of the tools ({known})", "tool_choice")
        if self.tool_choice == "required" and not names:
            raise wrong("required needs tools; give some, or leave it out", "tool_choice")
        if self.continue_final_message and self.add_generation_prompt:
            raise wrong("does not go with add_generation_prompt; give one of the two", "continue_final_message")
        return self

    def sampling(self) -> dict[str, Any]:
        fields = super().sampling()
        if self.max_completion_tokens is not None:
            fields["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            fields["logprobs"] = self.top_logprobs or 0
        return fields


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({**UNSUPPORTED_REQUEST, "suffix": ("",)})

    prompt: Prompts
    echo: bool | None = Field(None, description="Begin the text with the prompt.")
    logprobs: int | None = Field(None, description="Report every token's log-probability and so many of the likeliest.")
    add_special_tokens: bool | None = Field(None, description="Absent: as the model's tokenizer does.")

    def sampling(self) -> dict[str, Any]:
        fields = super().sampling()
        if self.logprobs is not None:
            fields["logprobs"] = self.logprobs
            if self.echo:
                fields["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        return fields


class TokenizeRequest(Body):
    """Body of POST /tokenize: a prompt, or messages with what a chat request says about their template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_the_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (not self.messages):
            raise wrong("give either prompt or messages", "prompt")
        if self.continue_final_message and self.add_generation_prompt:
            raise wrong("does not go with add_generation_prompt; give one of the two", "continue_final_message")
        return self


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]
