"""What /metrics shows, in the words of the field: requests as their readers see them, engines as they count themselves.

A histogram here is a list of counters that one thread changes: an observation costs about a third of a microsecond, and
a scrape makes Prometheus' families of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from raytier.engine.outputs import EngineStats, FinishedSample, StepReport

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
_SAMPLES = (1, 2, 5, 10, 20)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Histogram:
    """Counts of observations by bucket; `bounds` are upper ones, the last bucket has none."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self.name, self.text = name, text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, label: str) -> Metric:
        family = HistogramMetricFamily(PREFIX + self.name, self.text, labels=["model_name"])
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = list(zip(names, map(float, accumulate(self._counts)), strict=True))
        family.add_metric([label], buckets, self._sum)
        return family


class RequestMetrics:
    """Requests of one model, over the life of the replica, whichever engines served them.

    `take` is called on the engine's thread and everything else on the event loop's: a scrape may see half of a step.
    """

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
        self.samples = Histogram("request_params_n", "Samples that requests ask for.", _SAMPLES)
        self.step_tokens = Histogram("iteration_tokens_total", "Tokens that a step carries.", _STEP_TOKENS)
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter()

    def take(self, report: StepReport) -> None:
        """Count a step of the engine."""
        for seconds in report.first_tokens:
            self.first_token.observe(seconds)
        for seconds in report.token_gaps:
            self.between_tokens.observe(seconds)
        self.generation_tokens += len(report.first_tokens) + len(report.token_gaps)
        if report.stats is not None:
            self.step_tokens.observe(report.stats.num_tokens)
        for sample in report.finished:
            self._ended(sample)

    def _ended(self, sample: FinishedSample) -> None:
        self.finished[sample.finish_reason] += 1
        self.latency.observe(sample.times.total_s)
        self.queue.observe(sample.times.queue_s)
        self.output_length.observe(sample.completion_tokens)
        if sample.index == 0:
            self.prompt_tokens += sample.prompt_tokens
            self.prompt_length.observe(sample.prompt_tokens)
            self.samples.observe(sample.n)
        if sample.times.prefill_s is not None:
            self.prefill.observe(sample.times.prefill_s)
        if sample.times.decode_s is not None:
            self.decode.observe(sample.times.decode_s)

    def families(self) -> Iterable[Metric]:
        for histogram in vars(self).values():
            if isinstance(histogram, Histogram):
                yield histogram.family(self.model_id)
        one = (self.model_id,)
        yield counter("prompt_tokens", "Tokens of the prompts of requests that ended.", [(one, self.prompt_tokens)])
        yield counter("generation_tokens", "Tokens generated.", [(one, self.generation_tokens)])
        finished = [((self.model_id, reason), float(count)) for reason, count in sorted(self.finished.items())]
        text = "Samples by how they ended: stop, length, abort, timeout, error."
        yield counter("request_success", text, finished, ("model_name", "finished_reason"))


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
    cached = stats.kv_blocks_cached / max(1, stats.kv_blocks_total)
    text = "Share of the KV blocks that no sequence uses and that are found by what they hold, 0 to 1."
    yield gauge("kv_cache_cached_perc", text, [((model_id, "device"), cached)], tier)
    yield counter(
        "kv_cache_evictions", "Cached KV blocks given up.", [((model_id, "device"), stats.kv_evictions)], tier
    )
    yield counter("kv_block_copies", "Shared KV blocks copied to be written to.", [(one, stats.kv.copies)])
    yield counter("kv_allocation_failures", "Times that a sequence found no KV block.", [(one, stats.kv.failures)])
    yield counter("prefix_cache_queries", "Tokens looked up in the prefix cache.", [(one, stats.kv.queries)])
    yield counter("prefix_cache_hits", "Of these, those found.", [(one, stats.kv.hits)])
    text = "Tokens of prompts that were found and not computed, by where."
    counts = stats.kv
    found = [
        ((model_id, "device"), counts.hits - counts.host_hits - counts.disk_hits),
        ((model_id, "host"), counts.host_hits),
        ((model_id, "nvme"), counts.disk_hits),
    ]
    yield counter("prompt_tokens_cached_by_source", text, found, ("model_name", "source"))
    yield counter("num_preemptions", "Sequences put back into the queue.", [(one, stats.preemptions)])
    yield counter("engine_steps", "Steps.", [(one, stats.steps)])
    yield counter("kv_restarts", "Sequences begun again because their KV was lost.", [(one, stats.kv_restarts)])
    if (below := stats.kv_below) is not None:
        both = (("host", below.host), ("nvme", below.disk))
        blocks = [((model_id, name), use.cached) for name, use in both]
        yield gauge("kv_below_blocks", "KV blocks below the device that are found by what they hold.", blocks, tier)
        blocks = [((model_id, name), use.loaded) for name, use in both]
        yield counter("kv_blocks_loaded", "KV blocks brought to the device, by where they were.", blocks, tier)
        yield counter("kv_write_failures", "KV blocks not written to the disk.", [(one, below.write_failures)])
        yield counter("kv_blocks_dropped", "KV blocks given up for lack of room below.", [(one, below.dropped)])
        yield counter("kv_tokens_refused", "Tokens found below and computed again.", [(one, below.refused)])
    total = stats.total
    yield counter("step_tokens", "Tokens that steps carried, prompts and decodes.", [(one, total.num_tokens)])
    ramdisk = total.bytes_streamed_ramdisk
    by_tier = [((model_id, "ramdisk"), ramdisk), ((model_id, "nvme"), total.bytes_streamed - ramdisk)]
    yield counter("weight_bytes_streamed", "Parameter bytes that steps consumed, by their tier.", by_tier, tier)
    ramdisk = total.bytes_read_ramdisk
    read = [((model_id, "ramdisk"), ramdisk), ((model_id, "nvme"), total.bytes_read - ramdisk)]
    yield counter("bytes_read", "Bytes read by the computing process, by tier.", read, tier)
    yield counter(
        "bytes_decoded", "Bytes into which compressed ones were decoded.", [((model_id,), total.bytes_decoded)]
    )
    damaged = [((model_id, "ramdisk"), total.damaged_ramdisk)]
    damaged.append(((model_id, "nvme"), total.damaged - total.damaged_ramdisk))
    yield counter("reads_damaged", "Reads that did not bring what they should, by tier.", damaged, tier)
    yield counter("files_mended", "Parameters whose damaged files were made again.", [(one, total.mended)])
    parts = [((model_id, "wait"), total.io_wait_s), ((model_id, "compute"), total.compute_s)]
    text = "Time of steps: waiting for bytes, and the rest."
    yield counter("step_part_seconds", text, parts, ("model_name", "part"))
    yield counter("step_seconds", "Time of steps in the computing process.", [(one, total.wall_s)])
    loop = stats.loop
    thread = [("schedule", loop.schedule_s), ("execute", loop.execute_s), ("process", loop.process_s)]
    text = "Time of the engine's thread: making steps, waiting for them, and with their results."
    seconds = [((model_id, part), value) for part, value in thread]
    yield counter("engine_loop_seconds", text, seconds, ("model_name", "part"))


def merged(families: Iterable[Metric]) -> list[Metric]:
    """One family for each name, with the samples of all: Prometheus takes no name twice."""
    found: dict[str, Metric] = {}
    for family in families:
        if family.name in found:
            found[family.name].samples += family.samples
        else:
            found[family.name] = family
    return list(found.values())


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
