"""I2: /metrics says what happened, in the field's words."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from raytier.serve.metrics import Histogram
from tests.serve.echo import MODEL, Served

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scrape(http: httpx.AsyncClient) -> Samples:
    answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = list(text_string_to_metric_families(answer.text))
    assert len({family.name for family in families}) == len(families)
    return {
        (sample.name.removeprefix("raytier:"), tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted({"model_name": MODEL, **labels}.items()))]


async def test_requests_are_counted(http: httpx.AsyncClient, served: Served) -> None:
    before = await scrape(http)
    assert of(before, "num_requests_running") == of(before, "generation_tokens_total") == 0
    prompt = served.only.tokenizer.encode("one two three")
    answers = await asyncio.gather(
        *(http.post("/v1/completions", json={"prompt": "one two three", "n": 2}) for _ in range(3)),
        http.post("/v1/completions", json={"prompt": "one two three", "max_tokens": 2, "stream": True}),
    )
    assert all(answer.status_code == 200 for answer in answers)
    await served.idle()
    after = await scrape(http)
    tokens = 6 * (len(prompt) + 1) + 2
    assert of(after, "prompt_tokens_total") == 4 * len(prompt)
    assert of(after, "generation_tokens_total") == tokens
    assert of(after, "request_success_total", finished_reason="stop") == 6
    assert of(after, "request_success_total", finished_reason="length") == 1
    assert of(after, "time_to_first_token_seconds_count") == of(after, "e2e_request_latency_seconds_count") == 7
    assert of(after, "inter_token_latency_seconds_count") == tokens - 7
    assert of(after, "request_queue_time_seconds_count") == of(after, "request_generation_tokens_count") == 7
    assert of(after, "request_generation_tokens_sum") == tokens
    assert of(after, "request_params_n_count") == 4
    assert of(after, "engine_steps_total") == served.only.stats().steps
    assert of(after, "kv_cache_usage_perc", tier="device") == 0
    assert of(after, "kv_cache_blocks", tier="device") == served.pool.num_blocks
    assert of(after, "weight_bytes_streamed_total", tier="nvme") == 0
    assert of(after, "model_state", state="loaded") == of(after, "engine_up") == 1


async def test_without_a_model_requests_stay_counted(http: httpx.AsyncClient, served: Served) -> None:
    await http.post("/v1/completions", json={"prompt": "dog"})
    await served.idle()
    await served.control.unload(None)
    samples = await scrape(http)
    assert of(samples, "request_success_total", finished_reason="stop") == 1
    assert of(samples, "engine_up") == 0
    assert of(samples, "model_state", state="no_model_loaded") == 1
    await served.load()
    await http.post("/v1/completions", json={"prompt": "dog"})
    await served.idle()
    assert of(await scrape(http), "request_success_total", finished_reason="stop") == 2


def test_buckets_are_cumulative_and_bounds_belong_to_them() -> None:
    histogram = Histogram("x", "text", (1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    samples = {(sample.name, sample.labels.get("le")): sample.value for sample in histogram.family("m").samples}
    assert samples == {
        ("raytier:x_bucket", "1.0"): 2,
        ("raytier:x_bucket", "2.0"): 4,
        ("raytier:x_bucket", "+Inf"): 5,
        ("raytier:x_count", None): 5,
        ("raytier:x_sum", None): 14.0,
    }


async def test_the_dashboard_shows_what_there_is(http: httpx.AsyncClient) -> None:
    """Every metric that the dashboard asks for is one of ours."""
    text = (Path(__file__).parents[2] / "dashboards/grafana.json").read_text()
    asked = set(re.findall(r"raytier:(\w+)", text))
    assert len(asked) > 15
    families = text_string_to_metric_families((await http.get("/metrics")).text)
    known = {sample.name.removeprefix("raytier:") for family in families for sample in family.samples}
    assert asked - known - {"request_success_total"} == set(), "of a family without samples there is no name yet"
