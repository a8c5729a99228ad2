"""G5, G6, H2: event streams to the letter, and requests whose client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from raytier.serve.handles import chat, chat_stream, generate, generate_stream
from raytier.serve.http import build_api
from tests.serve.echo import MODEL, Served, die
from tests.serve.helpers import Exchange, events

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
LONG = "one two three four " * 20


def _chat(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "one two"}], **more}


async def test_chat_events(http: httpx.AsyncClient) -> None:
    answer = await http.post(CHAT, json=_chat(stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    first, *middle, last, done = events(answer.content)
    head = {"object": "chat.completion.chunk", "created": first["created"], "model": MODEL, "id": first["id"]}

    def chunk(delta: dict[str, str], reason: str | None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}

    assert first == chunk({"role": "assistant", "content": ""}, None)
    assert all(each == chunk({"content": each["choices"][0]["delta"]["content"]}, None) for each in middle)
    assert "".join(each["choices"][0]["delta"]["content"] for each in middle) == "one two"
    assert last == chunk({}, "stop")
    assert done == "[DONE]"


async def test_usage_is_null_until_the_last_event(http: httpx.AsyncClient) -> None:
    for path, body in ((CHAT, _chat()), (TEXT, {"prompt": "one two"})):
        answer = await http.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}})
        *chunks, last, done = events(answer.content)
        assert all(chunk["usage"] is None for chunk in chunks)
        assert last["choices"] == []
        usage = last["usage"]
        assert set(usage) == {"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"}
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
        assert done == "[DONE]"


async def test_completion_events(http: httpx.AsyncClient) -> None:
    answer = await http.post(TEXT, json={"prompt": "one two", "stream": True})
    *chunks, done = events(answer.content)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one two"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])
    assert all("usage" not in chunk for chunk in chunks)
    assert done == "[DONE]"


async def test_no_character_is_split_and_no_line_either(http: httpx.AsyncClient) -> None:
    """Clients that cut lines at Unicode's separators (httpx among them) must find whole events."""
    text = "a\u2028b\u2029c\u0085d\r\ne 🙂é"
    body = {"prompt": text, "stream": True}
    got = ""
    async with http.stream("POST", TEXT, json=body) as answer:
        async for line in answer.aiter_lines():
            if line and line != "data: [DONE]":
                got += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    assert got == text


async def test_headers_come_before_the_first_token(app: FastAPI, served: Served) -> None:
    """Admission is what the status waits for, not the prefill of a long prompt."""
    served.executor.gate.clear()
    exchange = Exchange(app, CHAT, _chat(stream=True))
    await exchange.until(lambda: b"assistant" in exchange.body)
    assert exchange.status == 200
    assert served.only.stats().generated_tokens == 0
    served.executor.gate.set()
    await exchange.task
    assert events(exchange.body)[-1] == "[DONE]"


async def test_error_in_mid_stream(app: FastAPI, served: Served) -> None:
    served.executor.before_step[7] = die
    exchange = Exchange(app, TEXT, {"prompt": LONG, "stream": True})
    await exchange.task
    last = events(exchange.body)[-1]
    assert last == {"error": {"message": last["error"]["message"], "type": "server_error", "param": None, "code": None}}
    assert "the device actor died (OOM)" in last["error"]["message"]
    assert exchange.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.mark.parametrize("stream", [False, True])
async def test_engine_closed_on_the_way(app: FastAPI, served: Served, stream: bool) -> None:
    """Half an answer is not passed off as a whole one."""
    served.executor.before_step[6] = served.only.close
    exchange = Exchange(app, TEXT, {"prompt": LONG, "stream": stream})
    await exchange.task
    assert exchange.status == (200 if stream else 503)
    error = events(exchange.body)[-1] if stream else json.loads(exchange.body)
    assert "closed" in error["error"]["message"]
    assert error["error"]["type"] == "server_error"


def _cancel(exchange: Exchange) -> None:
    exchange.task.cancel()


PROMPTS = pytest.mark.parametrize("prompt", [LONG, [LONG, "dog " * 60, LONG]], ids=["one", "batch"])


@PROMPTS
@pytest.mark.parametrize(
    ("spec_version", "how"),
    [("2.3", _cancel), ("2.4", _cancel), ("2.3", Exchange.hang_up)],  # from 2.4 on, `send` raises OSError instead
)
async def test_disconnect_in_mid_stream_frees_blocks(
    app: FastAPI, served: Served, prompt: Any, spec_version: str, how: Callable[[Exchange], object]
) -> None:
    served.executor.before_step[20] = served.executor.gate.clear
    exchange = Exchange(app, TEXT, {"prompt": prompt, "stream": True}, spec_version)
    await exchange.until(lambda: b'"text"' in exchange.body)
    how(exchange)
    await asyncio.wait([exchange.task], timeout=10)
    assert exchange.task.done()
    served.executor.gate.set()
    await served.idle()
    assert served.executor.steps <= 20, "aborted within a step"
    assert set(served.only.stats().finished) == {"abort"}


@PROMPTS
async def test_disconnect_while_an_event_is_sent(app: FastAPI, served: Served, prompt: Any) -> None:
    """The generator is suspended then: nobody but the response itself can close it."""

    async def send(message: dict[str, Any]) -> None:
        if b"data:" in message.get("body", b""):
            raise OSError("broken pipe")

    exchange = Exchange(app, TEXT, {"prompt": prompt, "stream": True}, "2.4", on_send=send)
    await asyncio.wait([exchange.task], timeout=10)
    assert exchange.task.exception() is not None
    await served.idle()


@PROMPTS
async def test_disconnect_while_waiting_for_the_whole_answer(app: FastAPI, served: Served, prompt: Any) -> None:
    served.executor.gate.clear()
    exchange = Exchange(app, TEXT, {"prompt": prompt})
    await served.until(lambda stats: stats.running)
    exchange.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange.task
    served.executor.gate.set()
    await served.idle()
    assert exchange.sent == []
    assert set(served.only.stats().finished) == {"abort"}


async def test_a_slow_reader_gets_merged_events(app: FastAPI, served: Served) -> None:
    release = asyncio.Event()

    async def send(message: dict[str, Any]) -> None:
        if b'"text"' in message.get("body", b""):
            await release.wait()

    exchange = Exchange(app, TEXT, {"prompt": LONG, "stream": True, "max_tokens": 1000}, on_send=send)
    await exchange.until(lambda: b'"text"' in exchange.body)
    await served.idle()
    release.set()
    await exchange.task
    chunks = events(exchange.body)[:-1]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == LONG
    assert len(chunks) < 10, "one event per token would be 180"


async def test_a_refused_batch_leaves_nothing(make_served: Callable[..., Served]) -> None:
    served = make_served(max_queue=2, max_num_seqs=1)
    await served.load()
    app = build_api(served)
    served.executor.gate.clear()
    running = Exchange(app, TEXT, {"prompt": "one two"})
    await served.until(lambda stats: stats.running)
    waiting = Exchange(app, TEXT, {"prompt": "dog"})
    await served.until(lambda stats: stats.waiting)
    batch = Exchange(app, TEXT, {"prompt": ["one", "two"], "stream": True})
    await batch.task
    assert batch.status == 429
    assert served.only.stats().waiting == 1
    served.executor.gate.set()
    await asyncio.gather(running.task, waiting.task)
    assert json.loads(running.body)["choices"][0]["text"] == "one two"
    assert json.loads(waiting.body)["choices"][0]["text"] == "dog"


async def test_the_same_from_python(served: Served) -> None:
    """What deployment handles call."""
    model = await served.model(None)
    result = await generate(model, "one two", max_tokens=50)
    assert (result.text, result.finish_reason) == ("one two", "stop")
    assert result.completion_tokens == len(result.token_ids) == result.prompt_tokens + 1
    assert result.seconds > 0
    said = await chat(model, [{"role": "user", "content": "dog"}])
    assert said.text == "dog"
    assert "".join([delta.text async for delta in generate_stream(model, result.token_ids[:-1])]) == "one two"
    served.executor.before_step[served.executor.steps + 6] = served.executor.gate.clear
    stream = chat_stream(model, [{"role": "user", "content": LONG}])
    async for delta in stream:
        assert delta.delta.finish_reason is None
        break
    await stream.aclose()
    served.executor.gate.set()
    await served.idle()
    assert served.only.stats().finished == {"stop": 3, "abort": 1}
