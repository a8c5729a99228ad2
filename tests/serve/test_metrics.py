"""I2: /metrics says what happened, in the field's words."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from raytier.serve.metrics import Histogram
from tests.serve.echo import BLOCK, MODEL, Served

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


async def test_what_is_found_in_the_prefix_cache_is_counted(http: httpx.AsyncClient, served: Served) -> None:
    prompt = "one two three four five six!"
    length = len(served.only.tokenizer.encode(prompt))
    assert (length - 1) % BLOCK, "samples share a block that is not full, too"
    found = (length - 1) // BLOCK * BLOCK
    for expected in (0, found):
        answer = (await http.post("/v1/completions", json={"prompt": prompt, "n": 2})).json()
        usage = answer["usage"]
        assert (usage["prompt_tokens"], usage["prompt_tokens_details"]) == (length, {"cached_tokens": expected})
        assert answer["choices"][1]["text"] == prompt
    await served.idle()
    samples = await scrape(http)
    assert of(samples, "prefix_cache_queries_total") == 2 * length
    assert of(samples, "prefix_cache_hits_total") == found
    assert of(samples, "prompt_tokens_cached_by_source_total", source="device") == found
    assert of(samples, "kv_block_copies_total") == 2
    assert of(samples, "kv_cache_cached_perc", tier="device") == served.pool.num_cached / served.pool.num_blocks > 0
    assert of(samples, "kv_cache_evictions_total", tier="device") == 0
    assert of(samples, "kv_allocation_failures_total") == 0

    kv = (await http.get("/api/kv")).json()
    [device], [group] = kv["tiers"], kv["groups"]
    assert (device["tier"], device["used_blocks"]) == ("device", 0)
    assert device["cached_blocks"] == group["cached_blocks"] == served.pool.num_cached
    assert device["total_bytes"] == device["total_blocks"] * group["block_bytes"] > device["cached_bytes"] > 0
    assert (kv["pressure"], kv["free_fraction"], kv["forks"], kv["copies"]) == ("low", 1, 2, 2)
    assert kv["prefix_cache"] == {
        "queries": 2 * length,
        "hits": found,
        "hit_rate": found / (2 * length),
        "hits_by_tier": {"device": found},
    }
    assert (kv["sequences"], kv["ledger"], kv["active_sequences"]) == ([], None, 0)


async def test_sequences_that_run_show_their_blocks(http: httpx.AsyncClient, served: Served) -> None:
    prompt = "one two three four five six"
    length = len(served.only.tokenizer.encode(prompt))
    served.executor.before_step[3] = served.executor.gate.clear
    asked = asyncio.ensure_future(http.post("/v1/completions", json={"prompt": prompt, "n": 3}))
    await served.eventually(lambda: served.executor.steps == 3)
    kv = (await http.get("/api/kv")).json()
    served.executor.gate.set()
    assert (await asked).status_code == 200
    shared = (length - 1) // BLOCK
    assert [sequence["index"] for sequence in kv["sequences"]] == [0, 1, 2]
    assert all(sequence["shared_blocks"] == shared for sequence in kv["sequences"])
    used = kv["tiers"][0]["used_blocks"]
    assert used == shared + sum(s["num_blocks"] - s["shared_blocks"] for s in kv["sequences"])


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
