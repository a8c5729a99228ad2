"""Wire format of conversations: messages with their calls, the tools of a request and the choice among them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from raytier.serve.body import Body, wrong
from raytier.serve.fields import UNSUPPORTED_MESSAGE, shown

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
        {"type": "null"},
    ],
}
_NAME = re.compile(r"[\w.-]{1,128}")


def _as_text(value: object) -> object:
    """Bring the content of a message to one text."""
    if isinstance(value, str) or value is None:
        return value
    if not isinstance(value, list) or not value:
        raise wrong(f"must be a text or a non-empty list of text parts (value {shown(value)})")
    texts: list[str] = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise wrong(f"part {index} is not a text part ({{'type': 'text', 'text': ...}}): {shown(part)}")
        text = part.get("text")
        if not isinstance(text, str):
            raise wrong(f"part {index}: text must be a string (value {shown(text)})")
        texts.append(text)
    return "\n".join(texts)


Content = Annotated[str | None, BeforeValidator(_as_text), WithJsonSchema(_CONTENT_SCHEMA)]


class FunctionCall(Body):
    """A call as the model made it; `arguments` is the JSON text of an object."""

    name: str
    arguments: str

    def parsed(self) -> dict[str, Any]:
        return dict(json.loads(self.arguments or "{}"))

    @field_validator("arguments")
    @classmethod
    def _an_object(cls, value: str) -> str:
        try:
            given = json.loads(value or "{}")
        except (ValueError, RecursionError) as error:
            raise wrong(f"must be JSON of an object: {error} (value {shown(value)})") from None
        if not isinstance(given, dict):
            raise wrong(f"must be JSON of an object (value {shown(value)})")
        return value


class MessageToolCall(Body):
    """A call in a message of the assistant's."""

    ignored: ClassVar[frozenset[str]] = frozenset({"index"})

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """One message of a conversation."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED_MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = Field(None, description="Of an assistant's message.")
    tool_call_id: str | None = Field(None, description="Of a tool's message: the call that it answers.")
    reasoning_content: str | None = Field(None, description="Of an assistant's message: its thoughts.")

    @model_validator(mode="after")
    def _belongs_together(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.reasoning_content)):
            raise wrong("a message needs content; give a text", "content")
        if self.tool_calls and self.role != "assistant":
            raise wrong(f"only an assistant's message has calls, this one is of role {self.role}", "tool_calls")
        if self.tool_call_id is not None and self.role != "tool":
            raise wrong(f"only a tool's message answers a call, this one is of role {self.role}", "tool_call_id")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it: a call's arguments are an object there."""
        fields = self.model_dump(exclude_none=True, exclude={"tool_calls"})
        if self.tool_calls:
            fields["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {"name": call.function.name, "arguments": call.function.parsed()},
                }
                for call in self.tool_calls
            ]
        return fields


class Function(Body):
    """What a tool does and takes; `parameters` is a JSON schema, `strict` asks for nothing beyond it."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("name")
    @classmethod
    def _a_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise wrong(f"must be 1 to 128 letters, digits, _, . or - (value {shown(value)})")
        return value


class Tool(Body):
    type: Literal["function"]
    function: Function


class ChosenFunction(Body):
    name: str


class ChosenTool(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    function: ChosenFunction


class JSONSchema(Body):
    """`schema` is what the answer has to match; `name` and `description` are for people."""

    ignored: ClassVar[frozenset[str]] = frozenset({"description", "strict"})

    name: str
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    """`json_object`: any JSON object; `json_schema`: what the schema allows."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise wrong(f"goes with type json_schema and with no other (type {self.type})", "json_schema")
        return self

    def structured(self) -> dict[str, Any] | None:
        """The field of `StructuredOutputs` that this means."""
        if self.json_schema is not None:
            return {"json": self.json_schema.schema_}
        return {"json_object": True} if self.type == "json_object" else None
