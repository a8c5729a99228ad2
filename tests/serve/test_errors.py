"""H6: every refusal: the status, OpenAI's shape, and a message that names the field, the value and the fix."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from raytier.errors import BudgetError, EngineDeadError, QueueFullError, RaytierError
from raytier.serve.handles import generate
from raytier.serve.http import MAX_BODY_BYTES, build_api
from tests.serve.echo import MODEL, Served
from tests.serve.helpers import Exchange

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = [{"role": "user", "content": "dog"}]


def call_of(arguments: str) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, its shape checked."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert "Traceback" not in answer.text
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("max_tokens", "5", "valid integer (value '5', string)"),
        ("max_tokens", 1.5, "valid integer"),
        ("max_tokens", True, "valid integer"),
        ("max_tokens", 0, "at least 1"),
        ("temperature", "hot", "valid number (value 'hot', string)"),
        ("temperature", -0.1, "between 0"),
        ("temperature", 2.1, "between 0"),
        ("top_p", 0, "above 0"),
        ("top_p", 1.01, "at most 1"),
        ("top_k", -2, "-1"),
        ("seed", 2**64, "64-bit"),
        ("seed", "x", "valid integer"),
        ("stop", "", "1 to"),
        ("stop", [""], "1 to"),
        ("stop", 5, "list"),
        ("stop", [5], "valid string"),
        ("stop_token_ids", ["a"], "valid integer"),
        ("stop_token_ids", [-1], "at least 0"),
        ("ignore_eos", "yes", "valid boolean"),
        ("stream", 1, "valid boolean"),
        ("stream_options", {"include_usage": True}, "stream=true"),
        ("model", 5, "valid string"),
        ("best_friend", 1, "unknown field"),
        ("n", 0, "between 1 and"),
        ("n", 1000, "between 1 and"),
        ("n", True, "valid integer"),
        ("presence_penalty", 2.5, "between -2 and 2"),
        ("frequency_penalty", -3, "between -2 and 2"),
        ("repetition_penalty", 0, "above 0"),
        ("min_p", 1.5, "between 0 and 1"),
        ("min_tokens", -1, "at least 0"),
        ("logit_bias", {"5": 200}, "-100 and 100"),
        ("logit_bias", {"five": 1}, "token ids"),
        ("logit_bias", [5], "valid dictionary"),
        ("bad_words", [""], "1 to"),
        ("bad_words", ["a\ud800"], "lone surrogate"),
        ("stop", ["\ud800"], "lone surrogate"),
        ("structured_outputs", {"regex": "\ud800"}, "lone surrogate"),
        ("structured_outputs", {"choice": ["a", "\ud800"]}, "lone surrogate"),
        ("structured_outputs", {"json": '{"const": "\ud800"}'}, "lone surrogate"),
        ("structured_outputs", {"json": True}, "json"),
        ("structured_outputs", {"json": "true"}, "an object is expected, got bool"),
        ("allowed_token_ids", [], "at least one"),
        ("prompt_logprobs", 99, "between 0 and 20"),
        ("response_format", "json", "valid dictionary"),
        ("response_format", {"type": "xml"}, "json_object"),
        ("response_format", {"type": "json_schema"}, "goes with type json_schema"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, "required"),
        ("structured_outputs", {"xml": "a"}, "json"),
        ("structured_outputs", {}, "exactly one"),
        ("structured_outputs", {"choice": []}, "choice"),
        ("functions", [{"name": "f"}], "not supported"),
        ("best_of", 3, "not supported"),
        ("service_tier", "flex", "not supported"),
        ("store", True, "not supported"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_bad_field(http: httpx.AsyncClient, path: str, field: str, value: object, said: str) -> None:
    body = {"model": MODEL, **({"messages": USER} if path == CHAT else {"prompt": "dog"}), field: value}
    answer = await http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = error_of(answer, 400)
    assert error["param"] is not None
    assert re.split(r"[.\[]", error["param"])[0] == field
    assert field in error["message"]
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


NEUTRAL = {
    "n": 1,
    "best_of": 1,
    "logprobs": None,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_p": 0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "functions": [],
    "structured_outputs": None,
    "service_tier": "auto",
    "store": False,
    "user": "me",
    "metadata": {"any": "thing"},
    "stop": None,
    "temperature": None,
    "max_tokens": None,
    "seed": None,
    "stream_options": None,
    "top_k": -1,
}


@pytest.mark.parametrize(("path", "prompt"), [(CHAT, {"messages": USER}), (TEXT, {"prompt": "dog"})])
async def test_neutral_values_are_accepted(http: httpx.AsyncClient, path: str, prompt: dict[str, Any]) -> None:
    answer = await http.post(path, json={**prompt, **NEUTRAL})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == MODEL


@pytest.mark.parametrize(
    ("messages", "param", "said"),
    [
        (None, "messages", "valid list"),
        ("hi", "messages", "valid list"),
        ([], "messages", "at least 1 item"),
        (["hi"], "messages[0]", ""),
        ([{"content": "x"}], "messages[0].role", "required"),
        ([{"role": "wizard", "content": "x"}], "messages[0].role", "'user'"),
        ([{"role": "user"}], "messages[0].content", "needs content"),
        ([{"role": "user", "content": None}], "messages[0].content", "needs content"),
        ([{"role": "user", "content": 5}], "messages[0].content", "text"),
        ([{"role": "user", "content": []}], "messages[0].content", "text"),
        ([*USER, {"role": "user", "content": [{"type": "image_url"}]}], "messages[1].content", "image_url"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content", "string"),
        ([{"role": "user", "content": "x", "mood": "{good}"}], "messages[0].mood", "{good}"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].id", "required"),
        ([{"role": "assistant", "tool_calls": [call_of("{")]}], "messages[0].tool_calls[0].function.arguments", "JSON"),
        (
            [{"role": "assistant", "tool_calls": [call_of("[]")]}],
            "messages[0].tool_calls[0].function.arguments",
            "object",
        ),
        ([{"role": "user", "content": "x", "tool_calls": [call_of("{}")]}], "messages[0].tool_calls", "assistant"),
        ([{"role": "user", "content": "x", "tool_call_id": "1"}], "messages[0].tool_call_id", "tool's message"),
        ([{"role": "assistant", "content": "x"}], "messages", "a user has to speak first"),
        ([{"role": "user", "content": "x" * 9000}], "messages", "context is 4096"),
    ],
)
async def test_bad_messages(http: httpx.AsyncClient, messages: object, param: str, said: str) -> None:
    error = error_of(await http.post(CHAT, json={"messages": messages}), 400)
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (None, "non-empty"),
        ("", "empty"),
        ([], "non-empty"),
        ([""], "empty"),
        ([[]], "at least one token"),
        ([1, "a"], "non-empty"),
        ([[1], "a"], "non-empty"),
        ([1.5], "non-empty"),
        ([True], "non-empty"),
        ([-1], "-1"),
        ([10**6], "1000000"),
        (["a"] * 65, "at most 64"),
        ("x" * 9000, "context is 4096"),
    ],
)
async def test_bad_prompt(http: httpx.AsyncClient, prompt: object, said: str) -> None:
    error = error_of(await http.post(TEXT, json={"prompt": prompt}), 400)
    assert error["param"] == "prompt"
    assert said in error["message"]


async def test_bad_ids_with_echo(http: httpx.AsyncClient) -> None:
    error = error_of(await http.post(TEXT, json={"prompt": [-1], "echo": True}), 400)
    assert (error["param"], "between 0 and" in error["message"]) == ("prompt", True)


async def test_more_samples_than_ever_fit(http: httpx.AsyncClient) -> None:
    """429 would say that it is worth trying again."""
    error = error_of(await http.post(TEXT, json={"prompt": ["a"] * 33, "n": 2}), 400)
    assert error["param"] == "prompt"
    assert "33 prompts of 2 samples each" in error["message"]
    assert "at most 64" in error["message"]


async def test_what_takes_time_is_done_once_and_not_on_the_event_loop(
    http: httpx.AsyncClient, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grammars are compiled on threads of their own: health checks use the event loop's."""
    tokenizer, compiled, encoded = served.only.tokenizer, [], []
    grammar, encode = tokenizer.grammar, tokenizer.encode

    def note_grammar(*args: Any) -> str:
        compiled.append(threading.current_thread().name)
        return grammar(*args)

    def note_text(text: str, **options: Any) -> list[int]:
        encoded.append((text, threading.current_thread() is threading.main_thread()))
        return encode(text, **options)

    monkeypatch.setattr(tokenizer, "grammar", note_grammar)
    monkeypatch.setattr(tokenizer, "encode", note_text)
    body = {"prompt": ["one", "two", "dog"], "bad_words": ["sky"], "structured_outputs": {"regex": "[a-z ]+"}}
    assert (await http.post(TEXT, json=body)).status_code == 200
    assert [name.rpartition("_")[0] for name in compiled] == ["grammar-compiler"]
    assert sorted(encoded) == [(" sky", False), ("dog", False), ("one", False), ("sky", False), ("two", False)]


async def test_bad_template_arguments(http: httpx.AsyncClient) -> None:
    for kwargs, said in (
        ({"messages": []}, "use the field"),
        ({"self": 1}, "use the field"),
        ([], "dictionary"),
    ):
        error = error_of(await http.post(CHAT, json={"messages": USER, "chat_template_kwargs": kwargs}), 400)
        assert error["param"] == "chat_template_kwargs"
        assert said in error["message"]


async def test_two_limits(http: httpx.AsyncClient) -> None:
    body = {"messages": USER, "max_tokens": 3, "max_completion_tokens": 4}
    assert error_of(await http.post(CHAT, json=body), 400)["param"] == "max_completion_tokens"
    same = await http.post(CHAT, json={**body, "max_completion_tokens": 3})
    assert same.status_code == 200


async def test_several_problems_are_all_named(http: httpx.AsyncClient) -> None:
    error = error_of(await http.post(TEXT, json={"prompt": "x", "seed": "a", "top_k": "b", "foo": 1}), 400)
    assert error["param"] == "top_k"
    assert all(name in error["message"] for name in ("seed", "top_k", "foo"))


@pytest.mark.parametrize(
    ("content", "headers", "said"),
    [
        (b'{"prompt": "a",}', {"content-type": "application/json"}, "not valid JSON"),
        (b"", {"content-type": "application/json"}, "required"),
        (b"[]", {"content-type": "application/json"}, "body"),
        (b"\xff\xfe\xfd", {"content-type": "application/json"}, "JSON"),
        (b'{"prompt": "\\ud800"}', {"content-type": "application/json"}, "prompt"),
        (b'{"prompt": "a", "temperature": NaN}', {"content-type": "application/json"}, "finite"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", {"content-type": "application/json"}, "JSON"),
        (b"[" * 100_000, {"content-type": "application/json"}, "JSON"),
        (b'{"prompt": "a"}', {"content-type": "text/plain"}, "Content-Type: application/json"),
        (b'{"prompt": "a"}', {}, "Content-Type: application/json"),
    ],
)
async def test_bad_body(http: httpx.AsyncClient, content: bytes, headers: dict[str, str], said: str) -> None:
    error = error_of(await http.post(TEXT, content=content, headers=headers), 400)
    assert said in error["message"]


async def test_surrogates_through_the_template(http: httpx.AsyncClient, served: Served) -> None:
    content = b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"shout": "\\ud800"}}'
    served.only.tokenizer.__dict__.pop("_template", None)
    answer = await http.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    with pytest.raises(RaytierError, match=r"lone surrogate \(U\+D800\)"):
        await generate(await served.model(None), "a\ud800")


async def test_body_over_the_limit(http: httpx.AsyncClient, served: Served) -> None:
    error = error_of(await http.post(TEXT, json={"prompt": "x" * MAX_BODY_BYTES}), 413)
    assert error["code"] == "request_too_large"
    small = httpx.ASGITransport(app=build_api(served, max_body_bytes=100))
    async with httpx.AsyncClient(transport=small, base_url="http://raytier") as other:
        assert error_of(await other.post(TEXT, json={"prompt": "x" * 100}), 413)["message"].startswith(
            "The body is larger"
        )
        assert (await other.post(TEXT, json={"prompt": "x"})).status_code == 200


async def test_ten_megabytes(http: httpx.AsyncClient) -> None:
    """They are refused before they are tokenized, which would take a core for many seconds."""
    began = time.monotonic()
    text = "one two " * (10 * 2**20 // 8)
    for path, body in ((TEXT, {"prompt": text}), (CHAT, {"messages": [{"role": "user", "content": text}]})):
        error = error_of(await http.post(path, json=body), 400)
        assert "context is 4096" in error["message"]
        assert error["param"] == ("prompt" if path == TEXT else "messages")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("path", ["/v2", "/v1/embeddings", "/v1", "/"])
async def test_unknown_route(http: httpx.AsyncClient, path: str) -> None:
    error = error_of(await http.post(path), 404)
    assert path in error["message"]
    assert error["code"] == "not_found"


async def test_wrong_method(http: httpx.AsyncClient) -> None:
    answer = await http.get(CHAT)
    error = error_of(answer, 405)
    assert "POST" in error["message"]
    assert answer.headers["allow"] == "POST"


async def test_unknown_model(http: httpx.AsyncClient) -> None:
    for answer in (
        await http.post(CHAT, json={"model": "other", "messages": USER}),
        await http.post(TEXT, json={"model": "other", "prompt": "a", "stream": True}),
        await http.get("/v1/models/other/name"),
    ):
        error = error_of(answer, 404)
        assert (error["param"], error["code"], error["type"]) == ("model", "model_not_found", "not_found_error")
        assert "other" in error["message"]
        assert MODEL in error["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_full_queue(make_served: Callable[..., Served], stream: bool) -> None:
    served = make_served(max_queue=1, max_num_seqs=1)
    await served.load()
    app = build_api(served)
    served.executor.gate.clear()
    first = Exchange(app, TEXT, {"prompt": "one"})
    await served.until(lambda stats: stats.running)
    second = Exchange(app, TEXT, {"prompt": "two"})
    await served.until(lambda stats: stats.waiting)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://raytier") as http:
        answer = await http.post(TEXT, json={"prompt": "three", "stream": stream})
    error = error_of(answer, 429)
    assert error["type"] == "rate_limit_error"
    assert int(answer.headers["retry-after"]) >= 1
    served.executor.gate.set()
    await asyncio.gather(first.task, second.task)
    assert (first.status, second.status) == (200, 200)


@pytest.mark.parametrize(
    ("raised", "status", "kind"),
    [
        (EngineDeadError("the device actor died"), 503, "server_error"),
        (BudgetError("needs 5 GiB, has 4"), 503, "server_error"),
        (QueueFullError("full", retry_after_s=2.2), 429, "rate_limit_error"),
        (RaytierError("odd"), 500, "internal_error"),
    ],
)
async def test_errors_of_the_backend(
    http: httpx.AsyncClient,
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
    raised: RaytierError,
    status: int,
    kind: str,
) -> None:
    def refuse(model_id: str | None) -> None:
        raise raised

    monkeypatch.setattr(served, "using", refuse)
    answer = await http.post(TEXT, json={"prompt": "a"})
    error = error_of(answer, status)
    assert (error["type"], error["message"]) == (kind, raised.message)
    assert answer.headers.get("retry-after") == ("3" if status == 429 else None)


async def test_a_bug_is_logged_and_not_shown(
    http: httpx.AsyncClient, served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def bug(model_id: str | None) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(served, "using", bug)
    with caplog.at_level(logging.ERROR):
        answer = await http.post(TEXT, json={"prompt": "a"}, headers={"X-Request-Id": "mine-1"})
    error = error_of(answer, 500)
    assert "secret" not in answer.text
    assert "mine-1" in error["message"]
    assert answer.headers["x-request-id"] == "mine-1"
    assert "mine-1" in caplog.text
    assert "secret detail" in caplog.text


async def test_request_ids(http: httpx.AsyncClient, served: Served) -> None:
    assert (await http.get("/version", headers={"X-Request-Id": "abc"})).headers["x-request-id"] == "abc"
    made = (await http.get("/version")).headers["x-request-id"]
    assert len(made) == 32
    assert (await http.get("/nowhere", headers={"X-Request-Id": "e404"})).headers["x-request-id"] == "e404"
    for hostile in ("a b", "x" * 129, "t\tb"):
        assert (await http.get("/version", headers={"X-Request-Id": hostile})).headers["x-request-id"] != hostile
    behind_serve = httpx.ASGITransport(app=build_api(served, echo_request_id=False))
    async with httpx.AsyncClient(transport=behind_serve, base_url="http://raytier") as other:
        assert "x-request-id" not in (await other.get("/version")).headers


async def test_health(http: httpx.AsyncClient, served: Served) -> None:
    answer = await http.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok", "models": [MODEL]})
    served.reason = "the engine died"
    answer = await http.get("/health")
    assert (answer.status_code, answer.json()) == (503, {"status": "unavailable", "reason": "the engine died"})


async def test_docs(http: httpx.AsyncClient, app: FastAPI) -> None:
    assert (await http.get("/api/docs")).status_code == 200
    assert (await http.get("/api/redoc")).status_code == 200
    schema = (await http.get("/api/openapi.json")).json()
    assert schema["info"]["title"] == "raytier"
    paths = {path: routes for path, routes in schema["paths"].items() if not path.startswith("/api")}
    own = {"/health", "/version", "/metrics", "/tokenize", "/detokenize"}
    assert set(paths) == {CHAT, TEXT, "/v1/models", "/v1/models/{model_id}", *own}
    assert "422" not in json.dumps({path: routes for path, routes in paths.items() if path not in own})
    fields = schema["components"]["schemas"]["CompletionRequest"]["properties"]
    assert {"prompt", "model", "max_tokens", "stop", "stream_options"} <= set(fields)
