"""H2, H4, H5, G3, G4, G6: the API as clients use it, against a real server: OpenAI's client, forms of answers, keys."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytier.serve import build_app
from raytier.serve.parsers.parts import CallBegun
from tests.integration.application import GREEDY, Application

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Köln", "東京"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
NOW: Any = {"type": "function", "function": {"name": "now"}}
HELLO: Any = [{"role": "user", "content": "Hello you"}]
#: An answer of a random model that has a form still has to end.
LONG = 400


@pytest.fixture
def client(served: Application) -> Iterator[OpenAI]:
    with served.client() as client:
        yield client


def test_a_schema_is_kept(client: OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "forecast", "schema": SCHEMA}}
    for seed in range(3):
        said = client.chat.completions.create(
            model="tiny", messages=HELLO, response_format=form, temperature=1, seed=seed, max_tokens=LONG
        )
        assert said.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(said.choices[0].message.content or ""), SCHEMA)
    text = client.completions.create(
        model="tiny", prompt="x", max_tokens=LONG, extra_body={"structured_outputs": {"regex": "(ab|cd){3}-[0-9]{2}"}}
    )
    assert len(text.choices[0].text) == 9
    assert text.choices[0].text[6] == "-"
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "sorcery"}}}
    with pytest.raises(openai.BadRequestError, match="response_format") as refused:
        client.chat.completions.create(model="tiny", messages=HELLO, response_format=wrong)
    assert refused.value.param == "response_format"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_that_has_to_be_called_is(client: OpenAI, served: Application, choice: Any) -> None:
    options: dict[str, Any] = {"tools": [WEATHER, NOW], "tool_choice": choice, "temperature": 1, "max_tokens": LONG}
    options["parallel_tool_calls"] = False
    for seed in range(3):
        said = client.chat.completions.create(model="tiny", messages=HELLO, seed=seed, **options).choices[0]
        calls: Any = said.message.tool_calls
        assert (said.finish_reason, said.message.content, len(calls)) == ("tool_calls", None, 1)
        assert calls[0].function.name in ("weather", "now")
        given = json.loads(calls[0].function.arguments)
        if calls[0].function.name == "weather":
            jsonschema.validate(given, SCHEMA)
        else:
            assert given == {}, "it takes nothing"
        name, arguments = "", ""
        for chunk in client.chat.completions.create(model="tiny", messages=HELLO, seed=seed, stream=True, **options):
            for call in chunk.choices[0].delta.tool_calls or ():
                assert call.function is not None
                name += call.function.name or ""
                arguments += call.function.arguments or ""
        assert (name, arguments) == (calls[0].function.name, calls[0].function.arguments)
    by_handle = served.handle.chat.remote(HELLO, seed=2, **options).result(timeout_s=60)
    assert by_handle.message.calls[0].arguments == arguments
    deltas = list(served.handle.options(stream=True).chat_stream.remote(HELLO, seed=2, **options))
    assert [part.name for delta in deltas for part in delta.parts if isinstance(part, CallBegun)] == [name]


def test_log_likelihood_is_transformers(client: OpenAI, tiny_dir: Path) -> None:
    """What evaluations ask: the log-probability of every token of a text, and whether it is the likeliest."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32, attn_implementation="eager")
    ids = tokenizer("Hello world, the quick brown fox").input_ids
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    echo = client.completions.create(model="tiny", prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0)
    logprobs = echo.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    got: list[Any] = logprobs.token_logprobs
    assert got[0] is None
    assert len(got) == len(ids) + 1
    following = [*ids[1:], int(wanted[-1].argmax())]
    assert got[1:] == pytest.approx([wanted[i, token].item() for i, token in enumerate(following)], abs=1e-3)
    tops = [max(each.values()) for each in logprobs.top_logprobs[1:]]
    assert tops == pytest.approx(wanted.max(-1).values.tolist(), abs=1e-3)
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=3, max_tokens=5, extra_body=GREEDY
    )
    content = chat.choices[0].logprobs
    assert content is not None and content.content is not None
    assert [entry.logprob for entry in content.content] == [entry.top_logprobs[0].logprob for entry in content.content]
    assert all(len(entry.top_logprobs) == 3 for entry in content.content)


def test_samples_follow_their_seed(client: OpenAI) -> None:
    def ask(**more: Any) -> list[str]:
        options: dict[str, Any] = {"n": 3, "seed": 7, "temperature": 1.5, "max_tokens": 12, **more}
        answer = client.completions.create(model="tiny", prompt="Hello", extra_body={"ignore_eos": True}, **options)
        return [choice.text for choice in answer.choices]

    first = ask()
    assert len(set(first)) == 3
    assert ask() == first
    assert ask(n=1) == first[:1]
    assert ask(seed=8) != first


def test_a_hundred_streams_some_of_which_are_left(served: Application) -> None:
    """G6. Nothing stays behind, whoever goes."""

    async def all_of_them() -> list[int]:
        async with AsyncOpenAI(api_key="none", base_url=f"{served.url}/v1", max_retries=20, timeout=120) as client:
            return await asyncio.gather(*(_count_events(client, number) for number in range(100)))

    before = served.idle()
    arrived = asyncio.run(all_of_them())
    assert [bool(count) for count in arrived] == [number % 3 > 0 for number in range(100)]
    after = served.idle()
    assert after.kv_blocks_used == 0
    assert after.finished.get("length", 0) - before.finished.get("length", 0) >= 66


async def _count_events(client: AsyncOpenAI, number: int) -> int:
    """Events of a stream; 0 for those that are left after the first."""
    stream = await client.completions.create(
        model="tiny",
        prompt=f"number {number} Köln 🙂",
        stream=True,
        max_tokens=20,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    got = 0
    async for _ in stream:
        got += 1
        if number % 3 == 0:
            await stream.close()
            return 0
    return got


@pytest.mark.parametrize(
    "text", ["", "🙂", "a\u0301e\u0301", "👩‍👩‍👧‍👦", "\u2028\u2029\x85", "\x00\x01", "\ufeffx", "ﷺ" * 50, "‮abc"]
)
def test_odd_texts(client: OpenAI, text: str) -> None:
    said = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": f"x{text}"}], max_tokens=8, temperature=0
    ).choices[0]
    parts = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": f"x{text}"}], max_tokens=8, temperature=0, stream=True
    )
    assert "".join(part.choices[0].delta.content or "" for part in parts) == said.message.content


def test_metrics_of_a_server(served: Application) -> None:
    served.generate([5, 6, 7], max_tokens=4)
    stats = served.idle()
    families = {f.name: f for f in text_string_to_metric_families(httpx.get(f"{served.url}/metrics").text)}
    streamed = {s.labels["tier"]: s.value for s in families["raytier:weight_bytes_streamed"].samples}
    assert streamed == {"nvme": stats.total.bytes_streamed, "ramdisk": 0}
    assert families["raytier:engine_steps"].samples[0].value == stats.steps
    assert families["raytier:time_to_first_token_seconds"].type == "histogram"


@pytest.fixture
def guarded(served: Application, serve_port: int, tiny_dir: Path, cache_dir: str, tmp_path: Path) -> Iterator[str]:
    """URL of an application with keys, which holds no model and forwards to the other one."""
    (tmp_path / "api").write_text("sesame\n")
    (tmp_path / "admin").write_text("root\n")
    args = {
        "models": [{"model_id": "own", "source_path": str(tiny_dir)}],
        "startup_model": None,
        "tiers": {"device": {"max_mb": 32}, "host": {"max_mb": 0}},
        "compute": {"threads": 1},
        "api": {
            "key": {"file": str(tmp_path / "api")},
            "admin_key": {"file": str(tmp_path / "admin")},
            "upstream": {"base_url": f"{served.url}/v1"},
        },
        "cache_dir": cache_dir,
    }
    serve.run(build_app(args), name="guarded", route_prefix="/guarded")
    yield f"http://127.0.0.1:{serve_port}/guarded"
    serve.delete("guarded")


def test_keys_and_forwarding_behind_serve(guarded: str, served: Application) -> None:
    with httpx.Client(base_url=guarded, timeout=60) as http:
        assert http.get("/health").status_code == 200
        assert http.get("/v1/models").status_code == 401
        wrong = http.get("/api/status", headers={"X-API-Key": "guess"})
        assert (wrong.status_code, len(wrong.headers.get_list("x-request-id"))) == (403, 1)
        http.headers["Authorization"] = "Bearer sesame"
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["own", "tiny"]
        load = {"model_name_or_path": "own"}
        assert http.post("/api/models/load", json=load).status_code == 403
        assert http.post("/v1/completions", json={"model": "own", "prompt": "x"}).status_code == 409
        assert http.post("/v1/completions", json={"model": "nobody", "prompt": "x"}).json()["error"]["code"] == (
            "model_not_found"
        )
    with served.client() as near, OpenAI(api_key="sesame", base_url=f"{guarded}/v1", max_retries=0) as far:
        for stream in (False, True):
            texts = []
            for client in (near, far):
                answer: Any = client.completions.create(
                    model="tiny", prompt="Hello", stream=stream, max_tokens=8, temperature=0
                )
                texts.append("".join(part.choices[0].text for part in answer) if stream else answer.choices[0].text)
            assert texts[0] == texts[1] != ""
