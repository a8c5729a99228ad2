"""Which parsers an answer goes through: by configuration, or by what the model's chat template shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from raytier.serve.parsers import calls, thoughts
from raytier.serve.parsers.calls import NamedCall, RequiredCalls, Tools
from raytier.serve.parsers.parts import CallArguments, CallBegun, Content, Parser, Part, Reasoning, joined
from raytier.serve.parsers.thoughts import Thoughts

AUTO, NONE = "auto", "none"


@dataclass(frozen=True, slots=True)
class Languages:
    """How a model writes calls and thoughts: names in `calls.LANGUAGES` and `thoughts.TAGS`, None for not at all."""

    calls: str | None = None
    thoughts: str | None = None

    @classmethod
    def of(cls, template: str | None, *, calls_as: str = AUTO, thoughts_as: str = AUTO) -> Languages:
        """What the application's configuration says of the model; `auto` is what the chat template shows."""
        text = template or ""
        return cls(
            _calls_in(text) if calls_as == AUTO else None if calls_as == NONE else calls_as,
            _thoughts_in(text) if thoughts_as == AUTO else None if thoughts_as == NONE else thoughts_as,
        )


def _calls_in(template: str) -> str | None:
    if "tools" not in template:
        return None
    if "<tool_call>" in template:
        return "qwen3" if "<function=" in template else "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<|python_tag|>" in template or '"parameters": dictionary' in template:
        return "llama3_json"
    return None


def _thoughts_in(template: str) -> str | None:
    for name, (opening, closing) in thoughts.TAGS.items():
        if opening in template or closing in template:
            return name
    return None


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request says about tools.

    Attributes:
        tools: those that may be called; for the choice `named` the one that must be.
        parallel: more than one call is welcome; else the first one counts.
    """

    tools: Tools = field(default_factory=dict)
    choice: Literal["none", "auto", "required", "named"] = "none"
    parallel: bool = True

    @property
    def forced(self) -> bool:
        """Whether a grammar sees to it that a tool is called."""
        return self.choice in ("required", "named")


class AnswerParser:
    """Thoughts, then calls among content; either may be missing."""

    def __init__(self, thinking: Parser | None, calling: Parser | None, *, parallel: bool = True) -> None:
        self._thinking = thinking
        self._calling = calling
        self._parallel = parallel

    def push(self, text: str) -> list[Part]:
        parts: list[Part] = [Content(text)] if self._thinking is None else self._thinking.push(text)
        return self._welcome(self._through_calls(parts))

    def finish(self) -> list[Part]:
        parts = [] if self._thinking is None else self._thinking.finish()
        return self._welcome([*self._through_calls(parts), *([] if self._calling is None else self._calling.finish())])

    def _through_calls(self, parts: list[Part]) -> list[Part]:
        if self._calling is None:
            return parts
        passed: list[Part] = []
        for part in parts:
            passed += self._calling.push(part.text) if isinstance(part, Content) else [part]
        return passed

    def _welcome(self, parts: list[Part]) -> list[Part]:
        if self._parallel:
            return joined(parts)
        return joined(p for p in parts if not (isinstance(p, CallBegun | CallArguments) and p.index))


def answer_parser(
    languages: Languages, use: ToolUse, *, prompt: str, continued: str = "", constrained: bool = False
) -> AnswerParser | None:
    """The parser of one answer; None when it is plain text.

    Args:
        prompt: the rendered template: it may end by opening the thoughts.
        continued: text of the assistant's that the prompt ends with; thoughts in it may be open.
        constrained: a grammar rules the whole answer, so that there are no thoughts in it and no calls among text.
    """
    thinking = None
    if languages.thoughts is not None and not (constrained or use.forced):
        opening, closing = thoughts.TAGS[languages.thoughts]
        begun = prompt.rstrip().endswith(opening) or continued.rfind(opening) > continued.rfind(closing)
        thinking = Thoughts((opening, closing), begun=begun)
    calling: Parser | None = None
    if use.choice == "required":
        calling = RequiredCalls(use.tools)
    elif use.choice == "named":
        calling = NamedCall(next(iter(use.tools)))
    elif use.choice == "auto" and use.tools and languages.calls is not None and not constrained:
        calling = calls.LANGUAGES[languages.calls](use.tools)
    return None if thinking is None and calling is None else AnswerParser(thinking, calling, parallel=use.parallel)


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool; `arguments` is JSON as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """A whole answer. `content` is None where there are calls alone, `reasoning` where there are no thoughts."""

    content: str | None
    reasoning: str | None = None
    calls: tuple[Call, ...] = ()

    @classmethod
    def of(cls, text: str, parser: AnswerParser | None) -> Message:
        """`text` taken apart."""
        if parser is None:
            return cls(text)
        content = reasoning = ""
        begun: dict[int, CallBegun] = {}
        arguments: dict[int, str] = {}
        for part in parser.push(text) + parser.finish():
            match part:
                case Content(more):
                    content += more
                case Reasoning(more):
                    reasoning += more
                case CallBegun(index):
                    begun[index] = part
                case CallArguments(index, more):
                    arguments[index] = arguments.get(index, "") + more
        calls = tuple(Call(each.id, each.name, arguments.get(index, "")) for index, each in begun.items())
        return cls(content or (None if calls else ""), reasoning or None, calls)
