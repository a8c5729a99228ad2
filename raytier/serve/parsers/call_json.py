"""Calls written as JSON objects: `{"name": ..., "arguments": {...}}`, their arguments given out as they are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection

from raytier.serve.parsers.parts import END, Machine, Reading, call_id

#: What models write for the arguments, and what else may stand in such an object.
_ARGUMENTS = frozenset({"arguments", "parameters"})
_OTHER_KEYS = frozenset({"type", "id", "function"})
_OPENING, _CLOSING = frozenset("{["), frozenset("}]")
_AFTER_A_VALUE = frozenset(",}]")


class JsonCalls(Machine):
    """Reads call objects.

    Args:
        names: of the tools; an object that names another one is text. None: any name is one.
    """

    def __init__(self, names: Collection[str] | None = None, new_id: Callable[[], str] = call_id) -> None:
        self._names = names
        super().__init__(new_id)

    def _call_object(self) -> Reading[str | None]:
        """The rest of an object whose brace was read.

        Returns:
            None when it was a call (or the text ended within one). What was read, brace included, when it is none:
            nothing was given out then.
        """
        index: int | None = None
        arguments: str | None = None
        space, character = yield from self._after_space()
        read = "{" + space + character
        while character == '"':
            key, raw = yield from self._string()
            space, colon = yield from self._after_space()
            read += raw + space + colon
            if colon != ":" or not (key == "name" or key in _ARGUMENTS or key in _OTHER_KEYS):
                break
            space, character = yield from self._after_space()
            read += space
            value, raw, character = yield from self._value(character, index if key in _ARGUMENTS else None)
            read += raw
            if key == "name":
                if index is not None or not self._is_name(value, raw):
                    read += character
                    break
                index = self._begin_call(value)
                self._arguments(index, arguments or "")
            elif key in _ARGUMENTS:
                arguments = value
            space, character = yield from self._skip_space(character)
            read += space + character
            if character != ",":
                break
            space, character = yield from self._after_space()
            read += space + character
        if index is None:
            return read
        # What is wrong after the call has begun stays in the call: what was given out cannot be taken back.
        if arguments is None and character == "}":
            self._arguments(index, "{}")
        return None

    def _is_name(self, value: str, raw: str) -> bool:
        return bool(value) and raw.startswith('"') and (self._names is None or value in self._names)

    def _skip_space(self, character: str) -> Reading[tuple[str, str]]:
        if not character.isspace():
            return "", character
        space, following = yield from self._after_space()
        return character + space, following

    def _string(self) -> Reading[tuple[str | None, str]]:
        """A string whose quote was read: its value (None when it is none), and how it was written."""
        raw = ""
        while (character := (yield)) is not END:
            raw += character
            if character == '"':
                try:
                    return str(json.loads('"' + raw, strict=False)), raw
                except ValueError:
                    return None, raw
            if character == "\\":
                raw += yield
        return None, raw

    def _value(self, first: str, call: int | None) -> Reading[tuple[str, str, str]]:
        """A value that begins with `first`. Its text goes to the arguments of `call`, if that is given, at once.

        Models write arguments as text within a string, and null for none, as well: these are brought to an object.

        Returns:
            The value's text, how it was written, the character after it.
        """
        if first in _OPENING:
            raw = yield from self._nested(first, call)
            return raw, raw, (yield)
        if first == '"':
            text, rest = yield from self._string()
            raw = first + rest
            value = text or ""
            following = yield
        else:
            raw = first
            following = yield
            while not (following is END or following in _AFTER_A_VALUE or following.isspace()):
                raw += following
                following = yield
            value = "{}" if raw == "null" else raw
        if call is not None:
            self._arguments(call, value)
        return value, raw, following

    def _nested(self, first: str, call: int | None) -> Reading[str]:
        """An object or a list, by its brackets."""
        raw, depth, quoted = first, 1, False
        if call is not None:
            self._arguments(call, first)
        while depth and (character := (yield)) is not END:
            if quoted and character == "\\":
                character += yield
            elif character == '"':
                quoted = not quoted
            elif not quoted:
                depth += (character in _OPENING) - (character in _CLOSING)
            raw += character
            if call is not None:
                self._arguments(call, character)
        return raw
