"""H2, G3, G4: everything that a choice may carry, whole and streamed, against the SDK's own types."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from raytier.serve.http import build_api
from tests.serve.conftest import MakeServed
from tests.serve.echo import MODEL, Served
from tests.serve.helpers import events

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
#: Log-probabilities and samples, in a chat's words.
RICH = {"n": 2, "logprobs": True, "top_logprobs": 2}
SORCERY = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "sorcery"}}}
ADD: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}
CALLS = (
    'Well.\n<tool_call>{"name": "add", "arguments": {"a": "東京"}}</tool_call><tool_call>{"name": "now"}</tool_call>'
)
#: What the SDK does not know, and clients of vLLM do.
OTHERS = {"reasoning_content", "prompt_logprobs"}


def user(content: str) -> Any:
    return [{"role": "user", "content": content}]


def conforms(answer: bytes, kind: type[BaseModel]) -> None:
    """`answer` is what the SDK's type means: required fields there, values of their types, no field unknown to it."""
    _all_known(kind.model_validate_json(answer, strict=True))


def _all_known(value: object) -> None:
    if isinstance(value, BaseModel):
        extra = set(value.model_extra or ()) - OTHERS
        assert not extra, f"{type(value).__name__} does not know {extra}"
        for _, field in value:
            _all_known(field)
    elif isinstance(value, list):
        for item in value:
            _all_known(item)


@pytest.mark.parametrize(
    ("path", "body", "whole", "chunk"),
    [
        (CHAT, {"messages": user("one two")}, ChatCompletion, ChatCompletionChunk),
        (CHAT, {"messages": user("Köln 🙂"), **RICH}, ChatCompletion, ChatCompletionChunk),
        (TEXT, {"prompt": "one two"}, Completion, Completion),
        (TEXT, {"prompt": ["Köln 🙂", "dog"], "n": 2, "logprobs": 2}, Completion, Completion),
    ],
)
async def test_answers_are_what_the_sdk_knows(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], whole: type[BaseModel], chunk: type[BaseModel]
) -> None:
    conforms((await http.post(path, json=body)).content, whole)
    streamed = await http.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    *chunks, done = events(streamed.content)
    assert done == "[DONE]"
    for each in chunks:
        # The SDK has one type for both forms of a completion; only a whole one always says how it ended.
        for choice in each["choices"]:
            if path == TEXT and choice["finish_reason"] is None:
                choice["finish_reason"] = "stop"
        conforms(json.dumps(each).encode(), chunk)


async def test_calls_of_tools(tools: AsyncOpenAI) -> None:
    whole = await tools.chat.completions.create(model=MODEL, messages=user(CALLS), tools=[ADD])
    conforms(whole.to_json().encode(), ChatCompletion)
    choice = whole.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is not None
    assert choice.message.content.startswith("Well.")
    calls: Any = choice.message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("add", '{"a": "東京"}'),
        ("now", "{}"),
    ]
    assert len({call.id for call in calls}) == 2

    stream = await tools.chat.completions.create(model=MODEL, messages=user(CALLS), tools=[ADD], stream=True)
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    content = ""
    reason = None
    async for chunk in stream:
        delta = chunk.choices[0].delta
        content += delta.content or ""
        for call in delta.tool_calls or ():
            if call.id is not None:
                assert call.function is not None and call.function.name is not None
                names[call.index] = call.function.name
            assert call.function is not None
            arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
        reason = chunk.choices[0].finish_reason or reason
    assert (content, reason) == (choice.message.content, "tool_calls")
    assert names == {0: "add", 1: "now"}
    assert arguments == {0: '{"a": "東京"}', 1: "{}"}


async def test_no_calls_where_none_are_wanted(tools: AsyncOpenAI) -> None:
    for options in ({}, {"tools": [ADD], "tool_choice": "none"}):
        said = await tools.chat.completions.create(model=MODEL, messages=user(CALLS), **options)  # type: ignore[call-overload]
        assert said.choices[0].message.content == CALLS
        assert said.choices[0].message.tool_calls is None
        assert said.choices[0].finish_reason == "stop"
    one = await tools.chat.completions.create(model=MODEL, messages=user(CALLS), tools=[ADD], parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls or ()) == 1


async def test_thoughts(tools: AsyncOpenAI) -> None:
    text = "<think>\nOne or two?\n</think>\n\nTwo."
    whole = await tools.chat.completions.create(model=MODEL, messages=user(text))
    assert whole.choices[0].message.content == "Two."
    assert whole.choices[0].message.model_extra == {"reasoning_content": "One or two?"}
    thought = said = ""
    async for chunk in await tools.chat.completions.create(model=MODEL, messages=user(text), stream=True):
        delta = chunk.choices[0].delta
        thought += (delta.model_extra or {}).get("reasoning_content", "")
        said += delta.content or ""
    assert (thought, said) == ("One or two?", "Two.")


async def test_a_conversation_with_tools_goes_on(tools: AsyncOpenAI) -> None:
    """The answer as the SDK gives it is sent back; the template gets the arguments as an object."""
    first = await tools.chat.completions.create(model=MODEL, messages=user(CALLS), tools=[ADD])
    said = first.choices[0].message
    calls: Any = said.tool_calls
    history: Any = [*user("x"), said, {"role": "tool", "tool_call_id": calls[0].id, "content": "5"}]
    second = await tools.chat.completions.create(model=MODEL, messages=history, tools=[ADD])
    assert second.choices[0].message.content == f"x{said.content}東京51 tools"


@pytest.mark.parametrize(
    ("options", "param", "said"),
    [
        ({"tools": [ADD], "tool_choice": "required", "guided_regex": "a"}, "tool_choice", "form"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice", "'sub'"),
        ({"tools": [ADD, ADD]}, "tools", "every name may stand once"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type", "function"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "one of the two"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs", "between 0 and 20"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "stream"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "one of the two"),
        ({"guided_regex": "("}, "guided_regex", "guided_regex"),
        ({"response_format": SORCERY}, "response_format", "sorcery"),
    ],
)  # fmt: skip
async def test_what_does_not_go_together(tools: AsyncOpenAI, options: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await tools.chat.completions.create(model=MODEL, messages=user("dog"), extra_body=options)
    assert refused.value.param == param
    assert said in refused.value.message


async def test_a_model_without_tools_says_so(client: AsyncOpenAI, make_served: MakeServed) -> None:
    with pytest.raises(openai.BadRequestError, match="takes no tools"):
        await client.chat.completions.create(model=MODEL, messages=user("dog"), tools=[ADD])


async def test_the_last_message_is_continued(tools: AsyncOpenAI) -> None:
    history: Any = [*user("dog"), {"role": "assistant", "content": "one two"}]
    said = await tools.chat.completions.create(
        model=MODEL, messages=history, extra_body={"continue_final_message": True, "skip_special_tokens": False}
    )
    assert said.choices[0].message.content == "<|user|>dog<|assistant|>one two"


async def test_choices_of_every_prompt_follow_each_other(client: AsyncOpenAI) -> None:
    whole = await client.completions.create(model=MODEL, prompt=["one", "two"], n=3)
    assert [(c.index, c.text) for c in whole.choices] == list(enumerate(["one"] * 3 + ["two"] * 3))
    usage = whole.usage
    assert usage is not None
    assert usage.completion_tokens == 3 * (usage.prompt_tokens + 2), "prompts count once, and every sample ends itself"
    got = [""] * 6
    async for chunk in await client.completions.create(model=MODEL, prompt=["one", "two"], n=3, stream=True):
        got[chunk.choices[0].index] += chunk.choices[0].text
    assert got == ["one"] * 3 + ["two"] * 3
    roles = []
    async for event in await client.chat.completions.create(model=MODEL, messages=user("dog"), n=2, stream=True):
        roles += [choice.index for choice in event.choices if choice.delta.role is not None]
    assert roles == [0, 1]


def _merged(chunks: list[Any]) -> Any:
    """Log-probabilities of a streamed completion as one object."""
    whole: dict[str, list[Any]] = {}
    for chunk in chunks:
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            whole.setdefault(name, []).extend(values)
    return whole


@pytest.mark.parametrize("echo", [False, True])
async def test_logprobs_of_a_completion(http: httpx.AsyncClient, served: Served, echo: bool) -> None:
    text = "Köln 🙂 dog"
    ids = served.only.tokenizer.encode(text)
    body = {"prompt": text, "logprobs": 1, "echo": echo}
    choice = (await http.post(TEXT, json=body)).json()["choices"][0]
    assert choice["text"] == (text * 2 if echo else text)
    logprobs = choice["logprobs"]
    said = [*(ids if echo else []), *ids, served.only.tokenizer.spec.eos_token_ids[0]]
    assert len(logprobs["tokens"]) == len(said)
    assert logprobs["token_logprobs"] == [None if echo else -0.5, *[-0.5] * (len(said) - 1)]
    assert logprobs["tokens"][-1] == "<|end|>"
    assert any(token.startswith("bytes:\\xf0") for token in logprobs["tokens"]), "a part of a character"
    tops = [top for top in logprobs["top_logprobs"] if top is not None]
    assert all(token in top for token, top in zip(logprobs["tokens"][-len(tops) :], tops, strict=True))
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"][-1] == sum(map(len, logprobs["tokens"][:-1]))
    *chunks, _ = events((await http.post(TEXT, json={**body, "stream": True})).content)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
    assert _merged(chunks) == logprobs
    by_ids = (await http.post(TEXT, json={**body, "prompt": ids})).json()["choices"][0]
    assert by_ids["logprobs"] == logprobs


@pytest.mark.parametrize("n", [1, 3])
async def test_a_streamed_echo_whose_log_probabilities_take_several_steps(make_served: MakeServed, n: int) -> None:
    """A step computes them of some tokens of a prompt, and they are the first sample's: the others are faster."""
    served = make_served(max_num_batched_tokens=1024)
    await served.load()
    text = "".join(f"{number} " for number in range(100))
    body = {"prompt": text, "logprobs": 1, "echo": True, "n": n, "max_tokens": 3}
    transport = httpx.ASGITransport(app=build_api(served))
    async with httpx.AsyncClient(transport=transport, base_url="http://raytier", timeout=30) as http:
        choices = (await http.post(TEXT, json=body)).json()["choices"]
        *chunks, _ = events((await http.post(TEXT, json={**body, "stream": True})).content)
    for index, choice in enumerate(choices):
        mine = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(chunk["choices"][0]["text"] for chunk in mine) == choice["text"]
        assert choice["text"].startswith(text)
        assert _merged(mine) == choice["logprobs"]
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in mine]
        assert reasons == [None] * (len(mine) - 1) + ["length"]


async def test_a_streamed_echo_that_runs_out_of_time(make_served: MakeServed) -> None:
    """The error is the time-out's, although the prompt's log-probabilities never came."""
    served = make_served(timeout_s=0.2)
    await served.load()
    served.executor.before_step[1] = lambda: time.sleep(0.4)
    transport = httpx.ASGITransport(app=build_api(served))
    body = {"prompt": "".join(f"{number} " for number in range(200)), "logprobs": 1, "echo": True, "stream": True}
    async with httpx.AsyncClient(transport=transport, base_url="http://raytier", timeout=30) as http:
        answer = await http.post(TEXT, json=body)
    [error] = [event for event in events(answer.content) if event != "[DONE]"]
    assert "api.request_timeout_s" in error["error"]["message"]


async def test_echo_alone(http: httpx.AsyncClient) -> None:
    """What evaluations of log-likelihood ask."""
    body = {"prompt": "one two", "logprobs": 1, "echo": True, "max_tokens": 0}
    choice = (await http.post(TEXT, json=body)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one two", "length")
    assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"])
    assert (await http.post(TEXT, json={"prompt": "one two", "max_tokens": 0})).status_code == 400


async def test_logprobs_of_a_chat(http: httpx.AsyncClient, served: Served) -> None:
    body = {"messages": user("Köln 🙂"), "logprobs": True, "top_logprobs": 1}
    choice = (await http.post(CHAT, json=body)).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode().endswith("<|end|>")
    assert all(entry["logprob"] == -0.5 and entry["top_logprobs"][0]["token"] == entry["token"] for entry in content)
    *chunks, _ = events((await http.post(CHAT, json={**body, "stream": True})).content)
    streamed = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == content
    without = (await http.post(CHAT, json={**body, "top_logprobs": 0})).json()["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in without)


async def test_prompt_logprobs(http: httpx.AsyncClient, served: Served) -> None:
    ids = served.only.tokenizer.encode("one two")
    choice = (await http.post(TEXT, json={"prompt": "one two", "prompt_logprobs": 1})).json()["choices"][0]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    assert [each[str(token)]["logprob"] for each, token in zip(rest, ids[1:], strict=True)] == [-0.5] * len(rest)
    chat = (await http.post(CHAT, json={"messages": user("dog"), "prompt_logprobs": 0})).json()
    assert chat["prompt_logprobs"][0] is None


async def test_a_request_that_takes_too_long(make_served: MakeServed) -> None:
    served = make_served(timeout_s=0.2)
    await served.load()
    served.executor.before_step[3] = served.executor.gate.clear
    transport = httpx.ASGITransport(app=build_api(served))
    async with httpx.AsyncClient(transport=transport, base_url="http://raytier") as http:
        asked = asyncio.ensure_future(http.post(TEXT, json={"prompt": "one two three"}))
        await served.eventually(lambda: served.executor.steps >= 3)
        await asyncio.sleep(0.3)
        served.executor.gate.set()
        answer = await asked
    assert answer.status_code == 504
    assert "api.request_timeout_s" in answer.json()["error"]["message"]
    await served.idle()


async def test_tokenize_and_back(http: httpx.AsyncClient, served: Served) -> None:
    tokens = served.only.tokenizer.encode("Köln 🙂")
    answer = (await http.post("/tokenize", json={"prompt": "Köln 🙂", "return_token_strs": True})).json()
    assert (answer["tokens"], answer["count"], answer["max_model_len"]) == (tokens, len(tokens), 4096)
    assert len(answer["token_strs"]) == len(tokens)
    assert (await http.post("/detokenize", json={"tokens": tokens})).json() == {"prompt": "Köln 🙂"}
    chat = (await http.post("/tokenize", json={"messages": user("dog"), "model": MODEL})).json()
    back = await http.post("/detokenize", json={"tokens": chat["tokens"]})
    assert back.json() == {"prompt": "<|user|>dog<|assistant|>"}
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": user("b")}, "prompt"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
    ):
        refused = await http.post(path, json=body)
        assert refused.status_code in (400, 422)
        assert refused.json()["error"]["param"] == param
