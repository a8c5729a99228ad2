"""From a conversation to a prompt: the chat template, tools, and what the answer has to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from raytier.engine.sampling_params import SamplingParams
from raytier.errors import InvalidRequestError
from raytier.serve.generate import Prompt
from raytier.serve.parsers.answer import ToolUse, answer_parser
from raytier.serve.served import ServedModel

# Variables of the template that are fields of the request themselves.
_TEMPLATE_ARGUMENTS = frozenset({"self", "messages", "add_generation_prompt", "continue_final_message", "tools"})

#: Of a tool that says nothing of parameters.
_NOTHING: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class ChatInput:
    """A conversation to continue.

    Attributes:
        messages: `{"role": ..., "content": text}` and what else the template reads, in order; `developer` is taken as
            `system`.
        sampling: fields of `SamplingParams`; absent ones take the model's defaults.
        tools: as OpenAI has them: `{"type": "function", "function": {"name", "description", "parameters"}}`.
        tool_choice: none, auto, required, or the name of the tool to call with `named`.
        add_generation_prompt: end the prompt with the header of an assistant's turn.
        continue_final_message: let the last message's text go on, instead of a new turn.
        template_kwargs: further variables of the model's chat template.
    """

    messages: Sequence[Mapping[str, Any]]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_grammar(self) -> bool:
        """Whether something may have to be compiled for it."""
        forced = self.tool_choice not in (None, "auto", "none")
        return forced or self.sampling.get("structured_outputs") is not None


def prepare_chat(model: ServedModel, chat: ChatInput) -> Prompt:
    """Render and tokenize. Takes milliseconds, so not on an event loop.

    Raises:
        InvalidRequestError: a sampling value is wrong, the template refuses the messages, or the model has no tools.
    """
    use = tool_use(chat.tools, chat.tool_choice, parallel=chat.parallel_tool_calls)
    sampling = dict(chat.sampling)
    if use.forced:
        if sampling.get("structured_outputs") is not None:
            raise InvalidRequestError(
                f"tool_choice {use.choice} does not go with a form of the answer; give one of the two",
                param="tool_choice",
            )
        sampling["structured_outputs"] = {"json": call_schema(use)}
    _check_tools(model, use)
    text = render(model, chat, use)
    constrained = sampling.get("structured_outputs") is not None
    continued = str(chat.messages[-1].get("content") or "") if chat.continue_final_message else ""
    new_parser = partial(answer_parser, model.languages, use, prompt=text, continued=continued, constrained=constrained)
    if model.marks_are_special and new_parser() is not None:
        sampling["skip_special_tokens"] = False
    checked = model.engine.check(SamplingParams.from_request(model.engine.defaults, **sampling))
    # The rendered template holds its special tokens already.
    return Prompt(model.encode(text, "messages", add_special_tokens=False), checked, new_parser)


def render(model: ServedModel, chat: ChatInput, use: ToolUse | None = None) -> str:
    """The conversation as the model's template writes it.

    Raises:
        InvalidRequestError: the template refuses the messages, or its variables are named twice.
    """
    taken = _TEMPLATE_ARGUMENTS & chat.template_kwargs.keys()
    if taken:
        raise InvalidRequestError(
            f"chat_template_kwargs cannot set {', '.join(sorted(taken))}; use the field of the request",
            param="chat_template_kwargs",
        )
    messages = [{**m, "role": "system"} if m.get("role") == "developer" else m for m in chat.messages]
    tools = None if use is not None and use.choice == "none" else list(chat.tools) or None
    return model.engine.tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=chat.add_generation_prompt and not chat.continue_final_message,
        continue_final_message=chat.continue_final_message,
        tools=tools,
        **chat.template_kwargs,
    )


def tool_use(tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any] | None, *, parallel: bool) -> ToolUse:
    """What a request's `tools` and `tool_choice` mean; absent is auto where there are tools.

    Raises:
        InvalidRequestError: a tool is none of OpenAI's form, or the choice is none of them.
    """
    schemas: dict[str, Mapping[str, Any]] = {}
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InvalidRequestError(
                f'tools[{index}] must be {{"type": "function", "function": {{"name": ...}}}}', param="tools"
            )
        parameters = function.get("parameters") or _NOTHING
        if not isinstance(parameters, Mapping):
            raise InvalidRequestError(f"tools[{index}].function.parameters must be a JSON schema", param="tools")
        schemas[function["name"]] = parameters
    if isinstance(choice, Mapping):
        name = (choice.get("function") or {}).get("name")
        if name not in schemas:
            raise InvalidRequestError(
                f"tool_choice: {name!r} is none of the tools ({', '.join(schemas) or 'none'})", param="tool_choice"
            )
        return ToolUse({name: schemas[name]}, "named", parallel)
    match choice:
        case None | "auto":
            return ToolUse(schemas, "auto" if schemas else "none", parallel)
        case "none":
            return ToolUse(schemas, "none", parallel)
        case "required" if schemas:
            return ToolUse(schemas, "required", parallel)
    raise InvalidRequestError(
        f"tool_choice must be none, auto, required (with tools) or one of the tools, got {choice!r}",
        param="tool_choice",
    )


def call_schema(use: ToolUse) -> Mapping[str, Any]:
    """JSON schema of the answer when a tool has to be called: its arguments, or a list of calls."""
    if use.choice == "named":
        return next(iter(use.tools.values()))
    # References count from the root of a schema, so what tools share with themselves moves there.
    shared: dict[str, Any] = {}
    calls = []
    for name, schema in use.tools.items():
        definitions = schema.get("$defs", {})
        if not isinstance(definitions, Mapping):
            raise InvalidRequestError(f"tools: $defs of {name} must be an object of JSON schemas", param="tools")
        for key, part in definitions.items():
            if shared.setdefault(key, part) != part:
                raise InvalidRequestError(
                    f"tools: two of them define $defs.{key} differently; rename one, or choose one tool by its name",
                    param="tools",
                )
        parameters = {key: part for key, part in schema.items() if key != "$defs"}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    limit = {} if use.parallel else {"maxItems": 1}
    return {"type": "array", "minItems": 1, **limit, "items": {"anyOf": calls}, **({"$defs": shared} if shared else {})}


def _check_tools(model: ServedModel, use: ToolUse) -> None:
    if use.choice == "none":
        return
    template = model.engine.tokenizer.spec.chat_template
    if template is not None and "tools" not in template:
        raise InvalidRequestError(
            f"the chat template of {model.engine.model_id} takes no tools; leave them out, or use another model",
            param="tools",
        )
    if use.choice == "auto" and model.languages.calls is None:
        raise InvalidRequestError(
            f"it is not known how {model.engine.model_id} writes calls of tools: set tool_call_parser of the model in "
            "the application's configuration, or let tool_choice be required or one of the tools",
            param="tools",
        )
