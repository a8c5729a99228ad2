"""H2, H6, H7, I1, A6, D4: one application behind Serve.

OpenAI's client, deployment handles, many at once, refusals, readers that go away.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import ray
from openai import OpenAI
from ray.serve.exceptions import RequestCancelledError

from raytier.errors import InvalidRequestError, ModelNotFoundError
from tests.integration.application import (
    GREEDY,
    Application,
    actors_of,
    eventually,
    has_torch,
    repr_of,
)
from tests.models import random_prompts, transformers_greedy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

EXTRA: dict[str, Any] = {"extra_body": {"ignore_eos": True}}
#: More tokens than any test waits for.
ENDLESS = 8000


@pytest.fixture
def client(served: Application) -> Iterator[OpenAI]:
    with served.client() as client:
        yield client


@pytest.fixture
def http(served: Application) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as http:
        yield http


def test_handles_give_what_transformers_gives(served: Application, tiny_dir: Any) -> None:
    prompts = random_prompts(5, 70)
    wanted = transformers_greedy(tiny_dir, prompts, 12)
    for prompt, tokens in zip(prompts, wanted, strict=True):
        whole = served.handle.generate.remote(prompt, **GREEDY, max_tokens=12).result(timeout_s=60)
        assert list(whole.token_ids) == tokens
        assert (whole.prompt_tokens, whole.completion_tokens, whole.finish_reason) == (len(prompt), 12, "length")
        deltas = list(served.handle.options(stream=True).generate_stream.remote(prompt, **GREEDY, max_tokens=12))
        assert [token for delta in deltas for token in delta.token_ids] == tokens
        assert "".join(delta.text for delta in deltas) == whole.text
        assert deltas[-1].finish_reason == "length"


def test_openai_client(served: Application, client: OpenAI) -> None:
    wanted = served.handle.generate.remote("Hello world", **GREEDY, max_tokens=20).result(timeout_s=60)
    whole = client.completions.create(model="tiny", prompt="Hello world", temperature=0, max_tokens=20, **EXTRA)
    assert whole.choices[0].text == wanted.text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (wanted.prompt_tokens, 20)
    parts = client.completions.create(
        model="tiny", prompt="Hello world", temperature=0, max_tokens=20, stream=True, **EXTRA
    )
    assert "".join(part.choices[0].text for part in parts) == wanted.text

    messages: Any = [{"role": "user", "content": "Hello you"}]
    said = served.handle.chat.remote(messages, **GREEDY, max_tokens=20).result(timeout_s=60)
    assert said.text != wanted.text
    chat = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=20, **EXTRA)
    assert chat.choices[0].message.content == said.text
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=messages,
            temperature=0,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
            **EXTRA,
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == said.text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20


def test_models_health_version(client: OpenAI, http: httpx.Client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "raytier"
    assert http.get("/health").json() == {"status": "ok", "models": ["tiny"]}
    assert http.get("/version").json()["version"]
    assert http.get("/api/openapi.json").json()["info"]["title"] == "raytier"


def test_a_request_has_one_id(http: httpx.Client) -> None:
    body = {"prompt": "Hello", "max_tokens": 2}
    for path, send in (("/health", None), ("/v1/nowhere", None), ("/v1/completions", body | {"stream": True})):
        for given in ({}, {"X-Request-Id": "mine-1"}):
            response = http.get(path, headers=given) if send is None else http.post(path, json=send, headers=given)
            (shown,) = response.headers.get_list("x-request-id")
            assert shown == given.get("X-Request-Id", shown)


def test_errors_over_a_handle_are_raytiers(served: Application) -> None:
    with pytest.raises(InvalidRequestError, match="temperature"):
        served.handle.generate.remote("Hello", temperature=3).result(timeout_s=60)
    with pytest.raises(ModelNotFoundError, match="served are: tiny"):
        served.handle.generate.remote("Hello", model="other").result(timeout_s=60)


def test_sixteen_streams_at_once(served: Application, client: OpenAI) -> None:
    prompts = random_prompts(*range(3, 35, 2))
    wanted = [served.handle.generate.remote(p, **GREEDY, max_tokens=24).result(timeout_s=60).text for p in prompts]
    assert len(set(wanted)) > 8

    def stream(prompt: list[int]) -> str:
        parts = client.completions.create(
            model="tiny", prompt=prompt, temperature=0, max_tokens=24, stream=True, **EXTRA
        )
        return "".join(part.choices[0].text for part in parts)

    before = served.stats().steps
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(stream, prompts)) == wanted
    assert served.idle().steps - before < len(prompts) * 24, "nothing ran together"


def test_a_full_queue_is_429(served: Application, http: httpx.Client) -> None:
    """16 sequences run, 16 wait, and whoever comes then is told when to come again."""
    batch = {"prompt": [[5, 6, 7]] * 16, "max_tokens": ENDLESS, "temperature": 0, "ignore_eos": True, "stream": True}
    served.idle()
    with http.stream("POST", "/v1/completions", json=batch) as first:
        assert first.status_code == 200
        eventually(lambda: served.stats().running == 16)
        with http.stream("POST", "/v1/completions", json=batch) as second:
            assert second.status_code == 200
            eventually(lambda: served.stats().waiting == 16)
            refused = http.post("/v1/completions", json={"prompt": "Hello"})
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert "scheduler.max_queue" in refused.json()["error"]["message"]
    served.idle()
    assert http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2}).status_code == 200


def test_actors_say_what_they_are(served: Application) -> None:
    actors = actors_of("tiny")
    held = {(a["namespace"], a["name"]) for a in ray.util.list_named_actors(all_namespaces=True)}
    assert {("raytier", f"raytier:tiny:{role}:0") for role in actors} <= held
    shown = {role: repr_of(actor) for role, actor in actors.items()}
    status = served.status()
    assert shown["device"] == "DeviceActor(cpu, 1 threads)"
    assert shown["host"].startswith("HostPoolActor(")
    assert shown["disk"].startswith("DiskTierActor(")
    assert shown["kv"] == f"KVBlockActor(tiny: {status.kv['tiny'].total_blocks} blocks)"


def test_only_the_device_actor_has_torch(served: Application) -> None:
    """D7: importing torch costs 400 MB."""
    served.generate([5, 6, 7], max_tokens=2)
    found = {role: has_torch(pid) for role, pid in served.pids().items()}
    assert found == {"replica": False, "device": True, "host": False, "disk": False, "kv": False}


def test_every_tier_is_used_and_counted(served: Application) -> None:
    before = served.idle()
    served.generate([5, 6, 7], max_tokens=10)
    after = served.idle()
    steps = after.steps - before.steps
    assert steps == 10
    streamed = after.total.bytes_streamed - before.total.bytes_streamed
    assert streamed == steps * 4 * 48 * 32 * 4, "the up projections of four layers, fp32, in every step"
    status = eventually(lambda: (s := served.status()) and s.disk.bytes_read == served.stats().total.bytes_read and s)
    assert status.host.owners == {"tiny": status.device.host_bytes + status.device.kv_host_bytes}
    assert status.device.host_bytes >= 4 * 48 * 32 * 4
    assert status.device.steps == served.stats().steps, "one message per step"
    assert status.kv["tiny"].used_blocks == 0


@contextmanager
def _killed_process(served: Application) -> Iterator[Callable[[], None]]:
    code = (
        "import http.client, json, sys\n"
        "host, path, body = sys.argv[1:]\n"
        "connection = http.client.HTTPConnection(host, timeout=60)\n"
        "connection.request('POST', path, body, {'Content-Type': 'application/json'})\n"
        "answer = connection.getresponse()\n"
        "print(answer.readline(), flush=True)\n"
        "while answer.readline(): pass\n"
    )
    host, path = served.url.removeprefix("http://").split("/", 1)
    body = json.dumps({"prompt": "Hello", "max_tokens": ENDLESS, "stream": True, **GREEDY})
    command = [sys.executable, "-c", code, host, f"/{path}/v1/completions", body]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "data: " in process.stdout.readline()
        yield process.kill


@contextmanager
def _closed_socket(served: Application) -> Iterator[Callable[[], None]]:
    with served.raw_stream(prompt="Hello", max_tokens=ENDLESS) as connection:
        yield connection.close


@contextmanager
def _cancelled_stream(served: Application) -> Iterator[Callable[[], None]]:
    deltas = served.handle.options(stream=True).generate_stream.remote("Hello", **GREEDY, max_tokens=ENDLESS)
    next(iter(deltas))
    yield deltas.cancel


@contextmanager
def _cancelled_call(served: Application) -> Iterator[Callable[[], None]]:
    response = served.handle.generate.remote("Hello", **GREEDY, max_tokens=ENDLESS)
    eventually(lambda: served.stats().running)
    yield response.cancel
    with pytest.raises(RequestCancelledError):
        response.result(timeout_s=60)


@pytest.mark.parametrize("reader", [_killed_process, _closed_socket, _cancelled_stream, _cancelled_call])
def test_a_reader_that_goes_away_frees_its_blocks_within_a_step(served: Application, reader: Any) -> None:
    """G6. Nothing else runs, so the engine stops with the step that was in flight when the request was aborted."""
    before = served.idle()
    with reader(served) as leave:
        running = served.stats()
        assert running.running == 1
        assert running.kv_blocks_used > 0
        leave()
        gone = time.monotonic()
        aborted = eventually(
            lambda: (s := served.stats()) and s.finished.get("abort", 0) > before.finished.get("abort", 0) and s,
            every=0,
        )
        freed = eventually(lambda: (s := served.stats()) and not s.kv_blocks_used and s, every=0)
        assert freed.steps - aborted.steps <= 1
        assert time.monotonic() - gone < 10
    after = served.idle()
    assert after.generated_tokens - before.generated_tokens < ENDLESS
    ledger = eventually(lambda: (s := served.status().kv["tiny"]) and not s.used_blocks and s)
    assert ledger.active_sequences == 0
    assert len(served.generate([5, 6, 7], max_tokens=5)) == 5
