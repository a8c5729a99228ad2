"""G4: calls of tools and thoughts in every language, whatever the borders between the deltas of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytier.config import ModelEntry
from raytier.serve.parsers import calls, thoughts
from raytier.serve.parsers.answer import AnswerParser, Languages, ToolUse, answer_parser
from raytier.serve.parsers.parts import CallArguments, CallBegun, Content, Parser, Part, Reasoning, joined
from raytier.serve.parsers.thoughts import Thoughts

TOOLS: dict[str, dict[str, Any]] = {
    "weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "add": {"type": "object", "properties": {"a": {"type": "number"}, "b": {}}},
}
KOELN = '{"city": "Köln \\"}{", "days": [1, {"a": 2}]}'


def hermes() -> Parser:
    return calls.LANGUAGES["hermes"](TOOLS)


def qwen3() -> Parser:
    return calls.LANGUAGES["qwen3"](TOOLS)


def llama() -> Parser:
    return calls.LANGUAGES["llama3_json"](TOOLS)


def mistral() -> Parser:
    return calls.LANGUAGES["mistral"](TOOLS)


def required() -> Parser:
    return calls.RequiredCalls(TOOLS)


def named() -> Parser:
    return calls.NamedCall("weather")


def thinking() -> Parser:
    return AnswerParser(Thoughts(thoughts.TAGS["think"], begun=False), hermes())


def thinking_already() -> Parser:
    return AnswerParser(Thoughts(thoughts.TAGS["think"], begun=True), hermes())


def parse(make: Callable[[], Parser], pieces: Iterable[str]) -> list[tuple[str, ...]]:
    """The parts of an answer: kind and text; of calls the name, and the arguments once for each call."""
    parser = make()
    parts: list[Part] = []
    for piece in pieces:
        parts += parser.push(piece)
    parts += parser.finish()
    seen: list[tuple[str, ...]] = []
    open_call = -1
    for part in joined(parts):
        match part:
            case Content(text):
                seen.append(("content", text))
            case Reasoning(text):
                seen.append(("reasoning", text))
            case CallBegun(index, identity, name):
                assert index == open_call + 1
                assert identity
                open_call = index
                seen.append(("call", name))
            case CallArguments(index, text):
                assert index == open_call
                seen.append(("arguments", text))
    return seen


CASES: list[tuple[Callable[[], Parser], str, list[tuple[str, ...]]]] = [
    (hermes, "No call, 1 < 2 <tool", [("content", "No call, 1 < 2 <tool")]),
    (
        hermes,
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": ' + KOELN + "}\n</tool_call>",
        [("content", "Let me see."), ("call", "weather"), ("arguments", KOELN)],
    ),
    (
        hermes,
        '<tool_call>{"arguments":{"a": 1},"name":"add"}</tool_call>\n<tool_call>{"name": "now"}</tool_call> Done. ',
        [("call", "add"), ("arguments", '{"a": 1}'), ("call", "now"), ("arguments", "{}"), ("content", "Done. ")],
    ),
    (
        hermes,
        '<tool_call>{"name": "a\\u0064d", "arguments": "{\\"a\\": 1}"}<tool_call>{"name": "add", "arguments": null}',
        [("call", "add"), ("arguments", '{"a": 1}'), ("call", "add"), ("arguments", "{}")],
    ),
    (hermes, '<tool_call>{"nome": "add"}</tool_call>', [("content", '<tool_call>{"nome": "add"}</tool_call>')]),
    (hermes, "<tool_call>\nadd(1)", [("content", "<tool_call>\nadd(1)")]),
    (hermes, '<tool_call>{"name": "add", "arguments": {"a": 1', [("call", "add"), ("arguments", '{"a": 1')]),
    (hermes, '<tool_call>{"name": "ad', [("content", '<tool_call>{"name": "ad')]),
    (hermes, '<tool_call>{"name": 5, "arguments": {}}', [("content", '<tool_call>{"name": 5, "arguments": {}}')]),
    (
        qwen3,
        "I look.\n\n<tool_call>\n<function=weather>\n<parameter=city>\n5\n</parameter>\n<parameter=days>\n2\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=add>\n<parameter=b>\na <b>\n"
        "</parameter>\n</function>\n</tool_call>",
        [
            ("content", "I look."),
            ("call", "weather"),
            ("arguments", '{"city": "5", "days": 2}'),
            ("call", "add"),
            ("arguments", '{"b": "a <b>"}'),
        ],
    ),
    (qwen3, "<tool_call><function=now></function></tool_call>", [("call", "now"), ("arguments", "{}")]),
    (qwen3, '<tool_call>{"name": "add", "arguments": {}}</tool_call>', [("call", "add"), ("arguments", "{}")]),
    (qwen3, "<tool_call><fun", [("content", "<tool_call><fun")]),
    (llama, '{"name": "weather", "parameters": ' + KOELN + "}", [("call", "weather"), ("arguments", KOELN)]),
    (
        llama,
        '<|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"type": "function", "name": "add", "parameters": {}}',
        [("call", "add"), ("arguments", '{"a": 1}'), ("call", "add"), ("arguments", "{}")],
    ),
    (llama, '{"name": "Alice", "parameters": {}}', [("content", '{"name": "Alice", "parameters": {}}')]),
    (llama, ' {"colour": "red"}\n', [("content", ' {"colour": "red"}\n')]),
    (llama, "<|python said", [("content", "<|python said")]),
    (llama, "  ", [("content", "  ")]),
    (
        mistral,
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": [1]}}, {"name": "weather", "arguments": {}}]',
        [("call", "add"), ("arguments", '{"a": [1]}'), ("call", "weather"), ("arguments", "{}")],
    ),
    (
        mistral,
        'Well. [TOOL_CALLS]add{"a": 1}[TOOL_CALLS]weather[ARGS]{"city": "[TOOL_CALLS]"}'
        "[TOOL_CALLS]now[CALL_ID]abc[ARGS]{}",
        [
            ("content", "Well."),
            ("call", "add"),
            ("arguments", '{"a": 1}'),
            ("call", "weather"),
            ("arguments", '{"city": "[TOOL_CALLS]"}'),
            ("call", "now"),
            ("arguments", "{}"),
        ],
    ),
    (mistral, "[TOOL_CALLS] none [needed]", [("content", "[TOOL_CALLS] none [needed]")]),
    (mistral, "[TOOL_CALLS] [1]", [("content", "[TOOL_CALLS] [1]")]),
    (
        required,
        '[{"name": "add", "parameters": {"a": 1}}, {"name": "weather", "parameters": {}}]',
        [("call", "add"), ("arguments", '{"a": 1}'), ("call", "weather"), ("arguments", "{}")],
    ),
    (required, "not what a grammar gives", [("content", "not what a grammar gives")]),
    (named, KOELN, [("call", "weather"), ("arguments", KOELN)]),
    (
        thinking,
        "<think>\nHm, <tool_call> is a tag.\n</think>\n\nYes.",
        [("reasoning", "Hm, <tool_call> is a tag."), ("content", "Yes.")],
    ),
    (thinking, "<think></think>x", [("content", "x")]),
    (thinking, "<thin ice", [("content", "<thin ice")]),
    (
        thinking,
        '<think>a </thi b</think> <tool_call>{"name": "add", "arguments": {}}</tool_call>',
        [("reasoning", "a </thi b"), ("call", "add"), ("arguments", "{}")],
    ),
    (thinking_already, "a\n\nb </think>c\n", [("reasoning", "a\n\nb"), ("content", "c\n")]),
    (thinking_already, "<think>a<think>", [("reasoning", "a<think>")]),
    (thinking_already, "never ends </thin", [("reasoning", "never ends </thin")]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "text", "wanted"), CASES)
def test_whole_and_by_character(make: Callable[[], Parser], text: str, wanted: list[tuple[str, ...]]) -> None:
    assert parse(make, [text]) == wanted
    assert parse(make, text) == wanted


@pytest.mark.parametrize(("make", "text", "wanted"), CASES)
def test_every_border(make: Callable[[], Parser], text: str, wanted: list[tuple[str, ...]]) -> None:
    for border in range(1, len(text)):
        assert parse(make, [text[:border], text[border:]]) == wanted, border


SCRAPS = [
    "<tool_call>", "</tool_call>", '{"name": "add", ', '"arguments": ', '"parameters":', '{"a": 1}', "}", "]", "[", ",",
    ";", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<function=add>", "<parameter=a>", "</parameter>", "</function>",
    "<think>", "</think>", "<|python_tag|>", " ", "\n", '"', "\\", "x", "null", '"name": "add"', "{", ":", "<",
]  # fmt: skip
MAKERS = [hermes, qwen3, llama, mistral, required, named, thinking, thinking_already]


@given(st.sampled_from(MAKERS), st.lists(st.sampled_from(SCRAPS), max_size=14), st.data())
def test_any_text_at_any_borders(make: Callable[[], Parser], scraps: list[str], data: st.DataObject) -> None:
    """Nothing that a model may write breaks a parser, and a stream says what the whole says."""
    text = "".join(scraps)
    borders = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *borders], [*borders, len(text)], strict=True)]
    whole = parse(make, [text])
    assert parse(make, pieces) == whole
    if make in (hermes, qwen3, llama, mistral, required) and not any(kind == "call" for kind, _ in whole):
        assert whole == ([("content", text)] if text else []), "something of a text without calls is lost"


@given(st.text(alphabet="ab <\n{[", max_size=40))
def test_text_without_calls_is_content_unchanged(text: str) -> None:
    for make in (hermes, qwen3, mistral, llama):
        assert parse(make, [text]) == ([("content", text)] if text else [])


def test_arguments_stream_as_they_come() -> None:
    parser = hermes()
    assert parser.push('<tool_call>{"name": "add", ') == [CallBegun(0, parser_id(parser), "add")]
    assert parser.push('"arguments": {"a"') == [CallArguments(0, '{"a"')]
    assert parser.push(": 1}}") == [CallArguments(0, ": 1}")]
    assert parser.push("</tool_call>") == []
    assert parser.finish() == []


def parser_id(parser: Parser) -> Any:
    """Equal to any id."""

    class Any_:
        def __eq__(self, other: object) -> bool:
            return isinstance(other, str) and other.startswith("call_")

        __hash__ = None  # type: ignore[assignment]

    return Any_()


def test_ids_of_mistral_are_what_its_templates_take() -> None:
    (begun, _) = mistral().push('[TOOL_CALLS]add{"a": 1}')
    assert isinstance(begun, CallBegun)
    assert len(begun.id) == 9
    assert begun.id.isalnum()


def test_one_call_when_more_are_not_welcome() -> None:
    use = ToolUse(TOOLS, "auto", parallel=False)
    parser = answer_parser(Languages("hermes"), use, prompt="")
    assert parser is not None
    text = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    assert [type(part) for part in parser.push(text * 2)] == [CallBegun, CallArguments]


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (None, Languages()),
        ("{{ messages }}", Languages()),
        ("{% if tools %}<tool_call>{% endif %}", Languages("hermes")),
        ("{% if tools %}<tool_call><function=x>{% endif %}<think>", Languages("qwen3", "think")),
        ("{{ tools }}[TOOL_CALLS] [THINK]", Languages("mistral", "mistral")),
        ('{{ tools }}{"name": function name, "parameters": dictionary of argument name}', Languages("llama3_json")),
        ("{{ tools }} in some way of its own", Languages()),
    ],
)  # fmt: skip
def test_the_template_shows_the_language(template: str | None, wanted: Languages) -> None:
    assert Languages.of(template) == wanted


def test_the_configuration_comes_first() -> None:
    template = "{{ tools }}<tool_call><think>"
    assert Languages.of(template, calls_as="mistral", thoughts_as="none") == Languages("mistral", None)
    known = ModelEntry.model_fields
    assert {"auto", "none", *calls.LANGUAGES} == set(get_args(known["tool_call_parser"].annotation))
    assert {"auto", "none", *thoughts.TAGS} == set(get_args(known["reasoning_parser"].annotation))


def test_which_parsers_an_answer_goes_through() -> None:
    both = Languages("hermes", "think")
    auto = ToolUse(TOOLS, "auto")
    assert answer_parser(Languages(), ToolUse(), prompt="") is None
    assert answer_parser(both, auto, prompt="", constrained=True) is None
    opened = answer_parser(both, auto, prompt="<user>What is <think>?<assistant><think>\n")
    closed = answer_parser(both, auto, prompt="<user>What is <think>?<assistant>")
    continued = answer_parser(both, auto, prompt="<assistant><think> I", continued="<think> I")
    assert opened is not None and closed is not None and continued is not None
    assert opened.push("Hm") == continued.push("Hm") == [Reasoning("Hm")]
    assert closed.push("Hm") == [Content("Hm")]
    forced = answer_parser(both, ToolUse({"add": {}}, "named"), prompt="")
    assert forced is not None
    assert forced.push('{"a": 1}')[1:] == [CallArguments(0, '{"a": 1}')]
    assert json.loads("".join(p.text for p in forced.push("") if isinstance(p, CallArguments)) or "{}") == {}


def test_joining_takes_time_in_proportion_to_the_text() -> None:
    """A million characters of a whole answer: copied for each of them it would be 500 GB."""
    began = time.process_time()
    parts = joined(Content("x") for _ in range(1_000_000))
    assert time.process_time() - began < 10
    assert parts == [Content("x" * 1_000_000)]


def test_only_what_belongs_together_is_joined() -> None:
    begun = [CallBegun(0, "a", "add"), CallBegun(1, "b", "add")]
    arguments = [CallArguments(0, "{"), CallArguments(0, "}"), CallArguments(1, "{"), CallArguments(1, "}")]
    parts = [Content("a"), Content("b"), Reasoning("c"), Reasoning("d"), Content("e"), *begun, *arguments]
    assert joined(parts) == [
        Content("ab"),
        Reasoning("cd"),
        Content("e"),
        *begun,
        CallArguments(0, "{}"),
        CallArguments(1, "{}"),
    ]
