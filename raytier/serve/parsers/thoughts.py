"""How families of models write their thoughts. `TAGS` names them as configurations do."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from raytier.serve.parsers.parts import Machine, Reading, Reasoning

#: Name in a configuration -> the tags around thoughts.
TAGS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"think": ("<think>", "</think>"), "mistral": ("[THINK]", "[/THINK]")}
)


class Thoughts(Machine):
    """Thoughts between tags at the beginning of an answer; the text after them is content.

    White space around the thoughts is left out. The end of the text ends thoughts too.

    Args:
        begun: the prompt ends with the opening tag already.
    """

    def __init__(self, tags: tuple[str, str], *, begun: bool) -> None:
        self._tags = tags
        self._begun = begun
        self._thought = False
        super().__init__()

    def _read(self) -> Reading[None]:
        opening, _ = self._tags
        if not self._begun:
            read, character = yield from self._after_space()
            for position, expected in enumerate(opening):
                if position:
                    character = yield
                read += character
                if character != expected:
                    yield from self._rest(read)
                    return
        # Some models write the tag although the prompt has it.
        while (tag := (yield from self._until(self._tags, self._think))) == opening:
            if self._thought:
                self._think(opening)
        if tag is not None:
            self._drop_space()
            yield from self._rest()

    def _think(self, text: str) -> None:
        text = self._space + text if self._thought else text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._thought = True
            self._parts.append(Reasoning(shown))
