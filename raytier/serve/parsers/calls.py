"""How families of models write calls of tools. `LANGUAGES` names them as configurations do."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from raytier.serve.parsers.call_json import JsonCalls
from raytier.serve.parsers.parts import END, Machine, Parser, Reading

#: Name of a tool -> JSON schema of its parameters.
Tools = Mapping[str, Mapping[str, Any]]

_NAME = frozenset(string.ascii_letters + string.digits + "_-.")
_ID = string.ascii_letters + string.digits


class HermesCalls(JsonCalls):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them among text: Hermes, Qwen2.5 and 3.

    With `functions`, `<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>` as well:
    Qwen3-Coder and later ones. A parameter's value is text, or what its schema says.
    """

    BEGIN, FINISH = "<tool_call>", "</tool_call>"

    def __init__(self, tools: Tools, *, functions: bool = False) -> None:
        self._tools = tools
        self._functions = functions
        super().__init__()

    def _read(self) -> Reading[None]:
        tag = yield from self._until((self.BEGIN,), self._content)
        while tag == self.BEGIN:
            space, character = yield from self._after_space()
            if character == "{":
                refused = yield from self._call_object()
            elif character == "<" and self._functions:
                refused = yield from self._function()
            else:
                refused = character
            if refused is not None:
                self._content(self.BEGIN + space + refused)
            else:
                # Nothing belongs between a call and its end, which may be missing before another call.
                tag = yield from self._until((self.FINISH, self.BEGIN), lambda _: None)
                if tag != self.FINISH:
                    continue
                self._drop_space()
            tag = yield from self._until((self.BEGIN,), self._content)
        self._end()

    def _function(self) -> Reading[str | None]:
        """The rest of a function whose `<` was read; returns as `_call_object`."""
        read = "<"
        for expected in "function=":
            read += (character := (yield))
            if character != expected:
                return read
        name: list[str] = []
        if (yield from self._until((">",), name.append)) is None:
            return read + "".join(name)
        index = self._begin_call("".join(name).strip())
        known = self._tools.get("".join(name).strip(), {}).get("properties")
        schemas = known if isinstance(known, Mapping) else {}
        separator = "{"
        while (yield from self._until(("<parameter=", "</function>"), lambda _: None)) == "<parameter=":
            key: list[str] = []
            value: list[str] = []
            if (yield from self._until((">",), key.append)) is None:
                return None
            if (yield from self._until(("</parameter>",), value.append)) is None:
                return None
            schema = schemas.get("".join(key).strip())
            text = _typed("".join(value), schema if isinstance(schema, Mapping) else {})
            self._arguments(index, f"{separator}{json.dumps(''.join(key).strip())}: {text}")
            separator = ", "
        self._arguments(index, "{}" if separator == "{" else "}")
        return None


def _typed(value: str, schema: Mapping[str, Any]) -> str:
    """JSON of a parameter's value: what it reads as, unless its schema wants a text."""
    text = value.removeprefix("\n").removesuffix("\n")
    kinds = schema.get("type")
    if kinds != "string" and not (isinstance(kinds, list) and "string" in kinds):
        try:
            json.loads(text)
            return text.strip()
        except ValueError:
            pass
    return json.dumps(text, ensure_ascii=False)


class LlamaCalls(JsonCalls):
    """An answer that is nothing but `{"name": ..., "parameters": {...}}`, several with semicolons between: Llama 3.x.

    An object that names no tool of the request is text.
    """

    def __init__(self, tools: Tools) -> None:
        super().__init__(names=tools)

    def _read(self) -> Reading[None]:
        read, character = yield from self._after_space()
        for expected in "<|python_tag|>":
            if character != expected:
                break
            read += character
            character = yield
        space, character = yield from self._skip_space(character)
        read += space
        while character == "{":
            refused = yield from self._call_object()
            if refused is not None:
                yield from self._rest(read + refused)
                return
            read, character = yield from self._after_space()
            if character in (";", ","):
                space, following = yield from self._after_space()
                read += character + space
                character = following
        if character is not END:
            yield from self._rest(read + character)
        elif not self._calls:
            self._content(read)
            self._end()


class MistralCalls(JsonCalls):
    """`[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]NAME[ARGS]{...}` per call: Mistral.

    Their templates refuse ids that are not nine letters or digits.
    """

    BEGIN = "[TOOL_CALLS]"

    def __init__(self) -> None:
        super().__init__(new_id=lambda: "".join(secrets.choice(_ID) for _ in range(9)))

    def _read(self) -> Reading[None]:
        while (yield from self._until((self.BEGIN,), self._content)) is not None:
            space, character = yield from self._after_space()
            if character == "[":
                refused = yield from self._list()
            elif character == "{":
                refused = yield from self._call_object()
            else:
                refused = yield from self._named(character)
            if refused is not None:
                self._content(self.BEGIN + space + refused)
        self._end()

    def _list(self) -> Reading[str | None]:
        """The rest of a list of calls whose bracket was read; returns as `_call_object`."""
        before = "["
        while True:
            space, character = yield from self._after_space()
            if character != "{":
                return None if self._calls else before + space + character
            refused = yield from self._call_object()
            if refused is not None:
                return None if self._calls else before + space + refused
            _, character = yield from self._after_space()
            if character != ",":
                return None

    def _named(self, character: str) -> Reading[str | None]:
        """A call that begins with its name; returns as `_call_object`."""
        name = ""
        while character in _NAME:
            name += character
            character = yield
        read, tag, identity = name, "", ""
        # [CALL_ID]id and [ARGS] in this order; both may be missing.
        while name and character == "[":
            tag = character
            while (character := (yield)) is not END and character != "]" and len(tag) < len("[CALL_ID]"):
                tag += character
            read += tag + character
            if tag == "[CALL_ID":
                while (character := (yield)) in _NAME:
                    identity += character
                read += identity
                continue
            if tag != "[ARGS":
                return read
            character = yield
        space, character = yield from self._skip_space(character)
        if not name or character != "{":
            return read + space + character
        yield from self._nested("{", self._begin_call(name, identity or None))
        self._drop_space()
        return None


class RequiredCalls(JsonCalls):
    """`[{"name": ..., "parameters": {...}}, ...]` and nothing else: what a grammar makes of tool_choice required."""

    def __init__(self, tools: Tools) -> None:
        super().__init__(names=tools)

    def _read(self) -> Reading[None]:
        read, character = yield from self._after_space()
        while character == "[" or (character == "," and self._calls):
            space, following = yield from self._after_space()
            refused = (yield from self._call_object()) if following == "{" else following
            if refused is not None:
                yield from self._rest(read + character + space + refused)
                return
            read, character = yield from self._after_space()
        if not self._calls:
            if character is END:  # nothing but white space
                self._content(read)
                self._end()
            else:
                yield from self._rest(read + character)
            return
        while (yield) is not END:  # the bracket that ends the list
            pass


class NamedCall(Machine):
    """The arguments of one tool and nothing else: what a grammar makes of a tool_choice that names it."""

    def __init__(self, name: str) -> None:
        self._name = name
        super().__init__()

    def _read(self) -> Reading[None]:
        character = yield
        index = self._begin_call(self._name)
        while character is not END:
            self._arguments(index, character)
            character = yield


#: Name in a configuration -> parser of one answer.
LANGUAGES: Mapping[str, Callable[[Tools], Parser]] = MappingProxyType(
    {
        "hermes": HermesCalls,
        "llama3_json": LlamaCalls,
        "mistral": lambda tools: MistralCalls(),
        "qwen3": lambda tools: HermesCalls(tools, functions=True),
    }
)
