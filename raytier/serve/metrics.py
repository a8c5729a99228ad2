"""What /metrics shows, in the words of the field: requests as their readers see them, engines as they count themselves.

A histogram here is a list of counters that one event loop changes: an observation costs about a third of a microsecond,
and a scrape makes Prometheus' families of them.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from raytier.engine.outputs import EngineStats, OutputDelta

PREFIX = "raytier:"
#: Labels, and the value that they have.
Values = Iterable[tuple[tuple[str, ...], float]]

# vLLM's, so that its dashboards and alerts fit.
_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
_BETWEEN_TOKENS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_LATENCY = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Histogram:
    """Counts of observations by bucket; `bounds` are upper ones, the last bucket has none."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self.name, self.text = name, text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, label: str) -> Metric:
        family = HistogramMetricFamily(PREFIX + self.name, self.text, labels=["model_name"])
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = list(zip(names, map(float, accumulate(self._counts)), strict=True))
        family.add_metric([label], buckets, self._sum)
        return family


class RequestMetrics:
    """Requests of one model, over the life of the replica, whichever engines served them."""

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self.first_token = Histogram("time_to_first_token_seconds", "Submission to first token.", _FIRST_TOKEN)
        self.between_tokens = Histogram("inter_token_latency_seconds", "Between tokens of a sample.", _BETWEEN_TOKENS)
        self.latency = Histogram("e2e_request_latency_seconds", "Submission to end.", _LATENCY)
        self.queue = Histogram("request_queue_time_seconds", "Submission to first step.", _LATENCY)
        self.prefill = Histogram("request_prefill_time_seconds", "First step to first token.", _LATENCY)
        self.decode = Histogram("request_decode_time_seconds", "First token to last.", _LATENCY)
        self.prompt_length = Histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.output_length = Histogram("request_generation_tokens", "Tokens of a sample.", _TOKENS)
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter()

    def timer(self) -> Timer:
        """Of one generation."""
        return Timer(self)

    def families(self) -> Iterable[Metric]:
        for histogram in vars(self).values():
            if isinstance(histogram, Histogram):
                yield histogram.family(self.model_id)
        for name, text, value in (
            ("prompt_tokens", "Tokens of prompts whose first token was drawn.", self.prompt_tokens),
            ("prompt_tokens_cached", "Of these, tokens whose KV was found.", self.cached_tokens),
            ("prefix_cache_queries", "Tokens of prompts that were looked up in the prefix cache.", self.prompt_tokens),
            ("prefix_cache_hits", "Of these, tokens that were found.", self.cached_tokens),
            ("generation_tokens", "Tokens generated.", self.generation_tokens),
        ):
            yield counter(name, text, [((self.model_id,), value)])
        finished = [((self.model_id, reason), float(count)) for reason, count in sorted(self.finished.items())]
        yield counter("request_success", "Samples by how they ended.", finished, ("model_name", "finished_reason"))


class Timer:
    """Measures a generation as its reader sees it, from submission on."""

    def __init__(self, metrics: RequestMetrics) -> None:
        self._metrics = metrics
        self._began = time.monotonic()
        # Choice -> when its last delta came, and the tokens that it had by then.
        self._last: dict[int, tuple[float, int]] = {}
        self._ended_choices = 0

    def take(self, choice: int, delta: OutputDelta) -> None:
        """A delta has been read."""
        metrics = self._metrics
        now = time.monotonic()
        tokens = delta.completion_tokens
        if (last := self._last.get(choice)) is None:
            metrics.first_token.observe(now - self._began)
            metrics.generation_tokens += tokens
            if delta.index == 0:
                metrics.prompt_tokens += delta.prompt_tokens
                metrics.cached_tokens += delta.cached_tokens
                metrics.prompt_length.observe(delta.prompt_tokens)
        elif more := tokens - last[1]:
            metrics.between_tokens.observe((now - last[0]) / more, more)
            metrics.generation_tokens += more
        self._last[choice] = (now, tokens)
        if delta.finish_reason is not None:
            self._ended(delta, now)

    def close(self, choices: int) -> None:
        """What has not ended by now was given up."""
        if unfinished := choices - self._ended_choices:
            self._metrics.finished["abort"] += unfinished
            self._ended_choices = choices

    def _ended(self, delta: OutputDelta, now: float) -> None:
        metrics = self._metrics
        self._ended_choices += 1
        metrics.finished[str(delta.finish_reason)] += 1
        metrics.latency.observe(now - self._began)
        metrics.output_length.observe(delta.completion_tokens)
        if (times := delta.times) is not None:
            metrics.queue.observe(times.queue_s)
            if times.prefill_s is not None:
                metrics.prefill.observe(times.prefill_s)
            if times.decode_s is not None:
                metrics.decode.observe(times.decode_s)


def engine_families(model_id: str, stats: EngineStats | None, state: str) -> Iterable[Metric]:
    """What an engine says of itself; without one, that there is none. Its counters begin anew with every load."""
    yield gauge(
        "engine_up", "1 while an engine takes requests.", [((model_id,), stats is not None and stats.dead is None)]
    )
    yield gauge("model_state", "1 for the state of the model.", [((model_id, state), 1)], ("model_name", "state"))
    if stats is None:
        return
    one = (model_id,)
    yield gauge("num_requests_running", "Sequences in the steps.", [(one, stats.running)])
    yield gauge("num_requests_waiting", "Sequences in the queue.", [(one, stats.waiting)])
    used = stats.kv_blocks_used / max(1, stats.kv_blocks_total)
    tier = ("model_name", "tier")
    yield gauge("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", [((model_id, "device"), used)], tier)
    yield gauge("kv_cache_blocks", "KV blocks that there are.", [((model_id, "device"), stats.kv_blocks_total)], tier)
    yield counter("num_preemptions", "Sequences put back into the queue.", [(one, stats.preemptions)])
    yield counter("engine_steps", "Steps.", [(one, stats.steps)])
    total = stats.total
    yield counter("step_tokens", "Tokens that steps carried, prompts and decodes.", [(one, total.num_tokens)])
    ramdisk = total.bytes_streamed_ramdisk
    by_tier = [((model_id, "ramdisk"), ramdisk), ((model_id, "nvme"), total.bytes_streamed - ramdisk)]
    yield counter("weight_bytes_streamed", "Parameter bytes that steps consumed, by their tier.", by_tier, tier)
    ramdisk = total.bytes_read_ramdisk
    read = [((model_id, "ramdisk"), ramdisk), ((model_id, "nvme"), total.bytes_read - ramdisk)]
    yield counter("bytes_read", "Bytes read by the computing process, by tier.", read, tier)
    parts = [((model_id, "wait"), total.io_wait_s), ((model_id, "compute"), total.compute_s)]
    text = "Time of steps: waiting for bytes, and the rest."
    yield counter("step_part_seconds", text, parts, ("model_name", "part"))
    yield counter("step_seconds", "Time of steps.", [(one, total.wall_s)])


def counter(name: str, text: str, values: Values, labels: Sequence[str] = ("model_name",)) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for label, value in values:
        family.add_metric(list(label), value)
    return family


def gauge(name: str, text: str, values: Values, labels: Sequence[str] = ("model_name",)) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for label, value in values:
        family.add_metric(list(label), value)
    return family


def exposition(families: Iterable[Metric]) -> bytes:
    """Prometheus' text format."""
    kept = list(families)

    class _Collected(Collector):
        def collect(self) -> Iterable[Metric]:
            return kept

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected())
    return generate_latest(registry)
