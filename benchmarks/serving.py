"""What HTTP costs: tokens per second and time to first token through Ray Serve over those of the bare engine.

What runs: a Llama-shaped bf16 model of random weights (0.29 B parameters; `--quick` 0.15 B), resident, served by
`raytier.serve:build_app` under Ray Serve, and asked with streaming completions of token ids over sockets on
localhost. A process of its own asks (asyncio, nothing parsed but the events' borders): as many streams at once as the
table says, prompts of 32 tokens, 64 tokens each (`--quick` 32), greedy, ends of sequence ignored.

Against: the bare engine, `raytier.LLM`: the same engine and settings over a DeviceActor in its own process in the same
Ray, without Serve, proxy or HTTP; requests go to `engine.submit`, a sink on the engine's thread counts tokens.

- serving.throughput32: tokens per second over HTTP at 32 streams over the bare engine's, from the first request sent to
  the last token received.
- serving.ttft1: time to first token over HTTP with one stream less the bare engine's, in milliseconds.

`--haproxy` has Ray Serve put HAProxy in front of the replica instead of its own Python proxy
(RAY_SERVE_ENABLE_HA_PROXY=1; it then listens on every interface): ids end in `.haproxy`.

Both sides are up all the time and are asked in turn, round by round; the value is the median over the rounds of each
round's ratio (or difference). Why it is fair: same machine, model, budget, prompts and engine; everything that HTTP
needs, the client included, runs on the cores that the model computes with.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from threading import Event
from typing import Any

# Before Ray starts: its workers would run at nice 15, behind everything else on the machine.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1" if "--haproxy" in sys.argv else "0"

import ray
from random_model import LLAMA_QUICK, Shape, random_model
from ray import serve
from rich.console import Console
from rich.table import Table

from raytier import LLM
from raytier.engine.outputs import OutputDelta
from raytier.engine.sampling_params import SamplingParams
from raytier.serve import build_app

MIB = 2**20
SHAPE = Shape(hidden=1280, intermediate=3584, layers=14, heads=20, kv_heads=4, vocab=16000)
PROMPT_TOKENS = 32
STREAMS = (1, 8, 32, 128)
GATES = {"throughput": (0.9, 0.97), "ttft_ms": (10.0, 5.0)}


@dataclass(frozen=True)
class Round:
    """Streams run to their end: tokens per second of all of them, and the median time to first token in seconds."""

    rate: float
    first: float


def prompt(number: int, vocab: int) -> list[int]:
    return [1 + (7919 * i + 104729 * number) % (vocab - 1) for i in range(PROMPT_TOKENS)]


def measure_engine(llm: LLM, streams: int, tokens: int) -> Round:
    """Ask the bare engine."""
    params = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=tokens, ignore_eos=True)
    firsts: dict[int, float] = {}
    ended: list[int] = []
    done = Event()

    def sink(number: int, delta: OutputDelta) -> None:  # on the engine's thread
        firsts.setdefault(number, time.perf_counter())
        if delta.finish_reason is not None:
            ended.append(delta.completion_tokens)
            if len(ended) == streams:
                done.set()

    prompts = [prompt(number, llm.manifest.vocab_size) for number in range(streams)]
    sent = []
    began = time.perf_counter()
    for number, token_ids in enumerate(prompts):
        sent.append(time.perf_counter())
        llm.engine.submit(token_ids, params, partial(sink, number))
    done.wait()
    seconds = time.perf_counter() - began
    if sum(ended) != streams * tokens:
        raise SystemExit(f"the engine gave {sum(ended)} tokens instead of {streams * tokens}: {llm.engine.dead}")
    return Round(streams * tokens / seconds, median(firsts[number] - sent[number] for number in range(streams)))


async def ask(port: int, number: int, vocab: int, tokens: int) -> tuple[float, float]:
    """One stream over a socket: when it was sent, when its first event came."""
    body = json.dumps(
        {"prompt": prompt(number, vocab), "stream": True, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent = time.perf_counter()
    writer.write(head.encode() + body)
    first = 0.0
    end = b""
    while part := await reader.read(1 << 16):
        if not first and b"data: " in part:
            first = time.perf_counter()
        end = (end + part)[-64:]
    writer.close()
    if b"data: [DONE]" not in end:
        raise SystemExit(f"a stream ended with {end!r}")
    return sent, first


def client(connection: Connection, port: int, vocab: int) -> None:
    """The process that asks: takes (streams, tokens), gives a `Round`, until it is told to end."""

    async def run(streams: int, tokens: int) -> Round:
        began = time.perf_counter()
        times = await asyncio.gather(*(ask(port, number, vocab, tokens) for number in range(streams)))
        seconds = time.perf_counter() - began
        return Round(streams * tokens / seconds, median(first - sent for sent, first in times))

    while (order := connection.recv()) is not None:
        connection.send(asyncio.run(run(*order)))


def settings(model: Path, shape: Shape) -> dict[str, Any]:
    """Of both sides."""
    budget = 1.2 * shape.nbytes / MIB + max(STREAMS) * 128 * shape.kv_token_bytes / MIB + 200
    return {
        "tiers": {"device": {"max_mb": budget, "reserved_mb": 0, "max_utilization": 1}, "host": {"max_mb": 0}},
        "kv": {"expected_sequences": max(STREAMS), "expected_context": 128},
        "scheduler": {"max_num_seqs": max(STREAMS)},
        "compute": {"device": "cpu"},
        "cache_dir": str(model / "cache"),  # rates are measured for this run
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def measure(
    console: Console, sides: dict[str, Callable[[int, int], Round]], streams: tuple[int, ...], rounds: int, tokens: int
) -> dict[int, list[tuple[Round, Round]]]:
    """Pairs (bare, HTTP) by number of streams."""
    found: dict[int, list[tuple[Round, Round]]] = {}
    for count in streams:
        for side in sides.values():  # first touch of blocks and caches is not measured
            side(count, 4)
        found[count] = [(sides["bare"](count, tokens), sides["http"](count, tokens)) for _ in range(rounds)]
        console.print(f"{count} streams: load average {os.getloadavg()[0]:.2f}")
    return found


def ids(found: dict[int, list[tuple[Round, Round]]]) -> dict[str, dict[str, Any]]:
    throughput = median(http.rate / bare.rate for bare, http in found[32])
    first = median((http.first - bare.first) * 1e3 for bare, http in found[1])
    gate, goal = GATES["throughput"]
    rows: dict[str, dict[str, Any]] = {
        "serving.throughput32": {
            "value": round(throughput, 3),
            "gate": gate,
            "goal": goal,
            "unit": "of the bare engine",
        }
    }
    gate, goal = GATES["ttft_ms"]
    rows["serving.ttft1"] = {
        "value": round(first, 2),
        "gate": gate,
        "goal": goal,
        "unit": "ms beyond the bare engine",
        "lower_is_better": True,
    }
    return rows


def show(console: Console, found: dict[int, list[tuple[Round, Round]]]) -> None:
    table = Table(title="streams of 32 prompt tokens, medians")
    for column in ("streams", "bare tok/s", "HTTP tok/s", "HTTP/bare", "bare TTFT", "HTTP TTFT"):
        table.add_column(column, justify="right")
    for count, pairs in found.items():
        table.add_row(
            str(count),
            f"{median(bare.rate for bare, _ in pairs):.0f}",
            f"{median(http.rate for _, http in pairs):.0f}",
            f"{median(http.rate / bare.rate for bare, http in pairs):.3f}",
            f"{median(bare.first for bare, _ in pairs) * 1e3:.1f} ms",
            f"{median(http.first for _, http in pairs) * 1e3:.1f} ms",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="What HTTP costs, against the bare engine.")
    parser.add_argument("--quick", action="store_true", help="a 300 MB model, 1 and 32 streams, fewer rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--haproxy", action="store_true", help="HAProxy in front, on every interface")
    parser.add_argument("--dir", default="/var/tmp", help="directory for the model")
    arguments = parser.parse_args()
    console = Console(width=120)
    shape, streams, rounds, tokens = (LLAMA_QUICK, (1, 32), 2, 32) if arguments.quick else (SHAPE, STREAMS, 7, 64)
    console.print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} CPUs at the start")
    port = free_port()
    with ExitStack() as stack:
        model = stack.enter_context(random_model(shape, arguments.dir))
        # More CPUs than there are: both sides are placed, and one computes at a time.
        ray.init(
            address="local",
            num_cpus=2 * (os.cpu_count() or 1) + 2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * MIB,
        )
        stack.callback(ray.shutdown)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # after Ray's own: the model is removed
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        stack.callback(serve.shutdown)
        section = settings(model, shape)
        serve.run(build_app({"models": [{"model_id": "m", "source_path": str(model)}], **section}), route_prefix="/")
        llm = stack.enter_context(LLM(str(model), **section))
        here, there = multiprocessing.get_context("spawn").Pipe()
        asking = multiprocessing.get_context("spawn").Process(target=client, args=(there, port, shape.vocab))
        asking.start()
        stack.callback(asking.join)
        stack.callback(here.send, None)

        def http(count: int, length: int) -> Round:
            here.send((count, length))
            answer: Round = here.recv()
            return answer

        sides: dict[str, Callable[[int, int], Round]] = {"bare": partial(measure_engine, llm), "http": http}
        found = measure(console, sides, streams, rounds, tokens)
    show(console, found)
    console.print(f"load average {os.getloadavg()[0]:.2f} at the end")
    if arguments.json:
        suffix = ".haproxy" if arguments.haproxy else ""
        print(json.dumps({name + suffix: row for name, row in ids(found).items()}))


if __name__ == "__main__":
    main()
